"""The manners of the programs: exit codes, one-line errors, `--debug`."""

import json
import os
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
from helpers import ROOT

from outside_in.runtime import cli
from outside_in.runtime.log import log, set_up
from outside_in.storage import metrics


@pytest.fixture
def outcome(monkeypatch, capsys):
    """Run a `main` under the shared manners: its exit code, standard output and standard error."""

    def run(main, *arguments):
        parser = cli.ArgumentParser("A program.")
        parser.add_argument("--steps", type=int)
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.run(main, parser)
        return caught.value.code, *capsys.readouterr()

    return run


def raising(error):
    def main(args):
        raise error

    return main


@pytest.mark.parametrize("code", [0, 1, 143])
def test_the_exit_code_is_what_main_returns(outcome, code):
    assert outcome(lambda args: code) == (code, "", "")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("train.json: bad"), 2, "train.json: bad"),
        (RuntimeError("the loss is not finite"), 1, "the loss is not finite"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (RuntimeError("first\n  second\r\n\tthird"), 1, "first second third"),
        (KeyError("emb_dim"), 1, "KeyError: 'emb_dim'; --debug shows where"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero; --debug shows where"),
        (RuntimeError(), 1, "RuntimeError: ; --debug shows where"),
        (MemoryError(), 1, "out of memory; use a smaller microbatch_size and more gradient_accumulation_steps ()"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(outcome, error, code, line):
    assert outcome(raising(error)) == (code, "", f"error: {line}\n")


def test_an_exhausted_device_is_out_of_memory_in_one_short_line(outcome):
    code, _, stderr = outcome(raising(RuntimeError("RESOURCE_EXHAUSTED: Out of memory\n" + "buffer\n" * 1000)))
    assert code == 1
    assert stderr.startswith("error: out of memory; use a smaller microbatch_size")
    assert stderr.count("\n") == 1
    assert len(stderr) < 400


def test_an_interrupt_exits_130(outcome):
    assert outcome(raising(KeyboardInterrupt())) == (130, "", "interrupted\n")


@pytest.mark.parametrize("error", [ValueError("bad"), KeyError("bad")])
def test_debug_shows_the_traceback_and_ends_on_the_same_line(outcome, error):
    code, _, stderr = outcome(raising(error), "--debug")
    *traceback, last = stderr.splitlines()
    assert traceback[0] == "Traceback (most recent call last):"
    assert any("raise error" in line for line in traceback)
    assert (code, "", f"{last}\n") == outcome(raising(error))


@pytest.mark.parametrize(
    "arguments", [["--unknown"], ["extra"], ["--steps", "many"], ["--steps"], ["--deb"], ["two\nlines"]]
)
def test_a_wrong_argument_is_one_line_and_exits_2(outcome, arguments):
    code, stdout, stderr = outcome(lambda args: 0, *arguments)
    assert (code, stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+; see \S+ --help\n", stderr)


def test_help_exits_0_and_knows_debug(outcome):
    code, stdout, _ = outcome(lambda args: 1, "--help")
    assert code == 0
    assert "--debug" in stdout


def test_arguments_reach_main(outcome):
    assert outcome(lambda args: args.steps, "--steps", "7")[0] == 7


def test_a_warning_is_one_line_without_its_place_in_the_code(outcome):
    def main(args):
        warnings.warn("a library\nis worried", UserWarning, stacklevel=1)
        return 0

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert outcome(main) == (0, "", "WARNING a library is worried\n")


def test_every_line_that_is_said_carries_a_date(capsys):
    set_up()
    log.info("step 3")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  step 3\n", capsys.readouterr().out)


CHATTY = """
import sys
from outside_in.runtime import cli as command_line
def main(args):
    for number in range(50_000):
        print("line")
    print("the last word", file=sys.stderr)
    return 7
command_line.run(main, command_line.ArgumentParser("A program."))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_the_program_goes_on_where_its_output_finds_a_full_disk():
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([sys.executable, "-c", CHATTY], cwd=ROOT, stdout=full, stderr=full).returncode == 7


def test_the_program_goes_on_when_its_reader_leaves():
    command = [sys.executable, "-c", CHATTY]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "the last word\n"
        assert process.wait(timeout=60) == 7


@pytest.mark.parametrize(
    "arguments",
    [
        "train --help",
        "train --help-keys",
        "train runs/quickstart model.n_layers=6",
        "train --learning_rate=1",
        "train runs/nowhere",
        "train --check --debug-checks",
        "compare_runs runs/nowhere",
        "inspect_checkpoint one two three",
        "test_a_to_a --help",
        "test_generation model.safetensors --tokens 0",
    ],
)
def test_help_and_usage_errors_do_not_wait_for_jax(arguments):
    name, *rest = arguments.split()
    code = f"import sys, {name}; from outside_in.runtime import cli; sys.argv = {[f'{name}.py', *rest]}"
    code += f"\ntry: cli.run({name}.main, {name}.make_parser())"
    code += "\nfinally: print(*{'jax', 'flax', 'orbax', 'matplotlib', 'numpy'} & sys.modules.keys(), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    helps = {"--help": "usage: ", "--help-keys": "key "}
    told = done.stdout.startswith(helps[rest[0]]) if rest[0] in helps else done.stderr.startswith("error: ")
    assert told and done.stderr.splitlines()[-1] == "", done.stderr


@pytest.mark.parametrize("swallows", [False, True])
def test_ctrl_c_during_an_import_leaves_at_once(tmp_path, swallows):
    waiting = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)"
    swallowing = f"try:\n{textwrap.indent(waiting, '    ')}\nexcept BaseException:\n    pass"
    (tmp_path / "heavy.py").write_text(swallowing if swallows else waiting)
    program = (
        "from outside_in.runtime import cli\n"
        "def main(args):\n    import heavy\n    return 0\n"
        "cli.run(main, cli.ArgumentParser('a program'), [])"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=50)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize(("program", "code"), [(["train.py", "--help-keys"], 0), (["compare_runs.py"], 1)])
def test_results_that_are_lost_are_a_failure_but_a_log_is_not(program, code, make_run, tmp_path):
    run = make_run()
    record = dict.fromkeys(metrics.NUMBERS | metrics.NULLABLE, 1.0) | {"global_step": 1}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    more = [run, "--output", tmp_path / "chart.png"] if code else []
    command = [sys.executable, ROOT / program[0], *program[1:], *more]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=100)
    assert ended.returncode == code
    assert ("error: the output could not be written" in ended.stderr) == bool(code)
