"""`test_generation.py RUN --interactive`, at a terminal and in a pipe."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time

import pytest
from flax import nnx
from helpers import ROOT, run_program
from test_model import with_larger_weights

from checkpointing import MODEL_FILE
from model import GPTModel
from outside_in.config import ModelConfig
from outside_in.data.tokenizer_files import load
from outside_in.inference import generation
from outside_in.weights import host_arrays, save_weights

CONFIG = ModelConfig(vocab_size=257, context_length=32, emb_dim=32, n_heads=2, n_layers=1, qkv_bias=False)
ON_A_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
SECONDS = 120  # at most, for what takes a few


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model of bytes that writes gibberish."""
    path = tmp_path_factory.mktemp("gibberish") / MODEL_FILE
    arrays = host_arrays(nnx.state(with_larger_weights(GPTModel(CONFIG, nnx.Rngs(0))), nnx.Param))
    save_weights(path, arrays, CONFIG.model_dump_json(), load("bytes").identity)
    return path


class Terminal:
    """The program on a terminal that we type into."""

    def __init__(self, *arguments):
        program = [sys.executable, ROOT / "test_generation.py", *map(str, arguments)]
        command = [sys.executable, "-c", ON_A_TERMINAL, *program]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, bufsize=0)
        self.shown = ""

    def type(self, text):
        self.process.stdin.write(text.encode())

    def read(self, *, until, more_than=0):
        """Return what is shown up to some text, and `more_than` characters behind it."""
        deadline = time.monotonic() + SECONDS
        while len(self.shown) <= self.shown.find(until) + more_than or until not in self.shown:
            assert select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))[0], self.shown
            new = os.read(self.process.stdout.fileno(), 4096).decode(errors="replace")
            assert new, self.shown
            self.shown += new.replace("\r\n", "\n")
        text, self.shown = self.shown[: self.shown.find(until)], self.shown[self.shown.find(until) + len(until) :]
        return text

    def finish(self):
        self.process.stdin.close()
        return self.process.wait(SECONDS)


@pytest.fixture
def start(weights):
    with contextlib.ExitStack() as stack:

        def open_terminal(*options):
            terminal = Terminal(weights, "--interactive", *options)
            stack.callback(terminal.process.stdout.close)
            stack.callback(terminal.process.wait)
            stack.callback(terminal.process.kill)
            return terminal

        yield open_terminal


@pytest.fixture
def pipe(weights, call_program, monkeypatch, tmp_path):
    """Type lines into a pipe; returns the finished program."""

    def call(content, *options, model=weights):
        (tmp_path / "input").write_bytes(content if isinstance(content, bytes) else content.encode())
        with (tmp_path / "input").open() as lines:
            monkeypatch.setattr("sys.stdin", lines)
            return call_program("test_generation", model, "--interactive", *options)

    return call


@pytest.mark.slow
def test_a_session_at_a_terminal(start):
    terminal = start("--ignore-end", "--tokens", 1_000_000)
    assert terminal.read(until="> ") == (
        "temperature 0.7, top-k off, top-p off, seed 0, tokens 1000000; /help lists commands, Ctrl-D leaves\n"
    )
    terminal.type("mariner\n")
    terminal.read(until="only its second half is kept\nmariner", more_than=100)  # it streams: a million never end
    terminal.type(CTRL_C)
    terminal.read(until="the completion stops; Ctrl-C again leaves the program\n")
    terminal.read(until="> ")
    terminal.type("/tokens 3\n")
    assert "tokens 3\n" in terminal.read(until="> ")
    terminal.type("/temperature warm\n")
    assert "error: /temperature: expected 0 (greedy) or a positive number, got warm\n" in terminal.read(until="> ")
    terminal.type("mariner\n")
    echo, completion, rest = terminal.read(until="> ").split("\n", 2)
    assert echo == "mariner" and completion.startswith("mariner") and len(completion) <= 10
    terminal.type(UP + "\n")  # from the history
    assert terminal.read(until="> ").endswith(f"\n{completion}\n{rest}")
    terminal.type("albatross")
    terminal.read(until="albatross")
    time.sleep(0.3)  # Python misses a Ctrl-C that comes after the last letter was shown, before it waits for the next
    terminal.type(CTRL_C)
    assert "\nCtrl-D leaves\n" in terminal.read(until="> ")
    terminal.type(CTRL_D)
    assert terminal.finish() == 0


@pytest.mark.slow
def test_sigterm_ends_a_completion_and_the_program(weights):
    command = [
        sys.executable,
        ROOT / "test_generation.py",
        weights,
        "--interactive",
        "--ignore-end",
        "--tokens",
        "9999999",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as program:
        program.stdin.write(b"mariner\n")
        program.stdin.flush()
        assert program.stdout.read(50).startswith(b"mariner")
        program.send_signal(signal.SIGTERM)
        program.stdout.read()
        assert program.wait(SECONDS) == 143


@pytest.mark.slow
def test_a_pipe_is_read_to_its_end_and_no_prompt_is_shown(weights):
    finished = run_program("test_generation.py", weights, "--interactive", "--tokens", 4, input="water\n\nevery\n")
    assert finished.returncode == 0 and not finished.stderr
    assert "> " not in finished.stdout
    assert finished.stdout.startswith("water") and "\nevery" in finished.stdout


def test_a_session_gives_what_the_program_gives_for_the_same_settings(pipe, call_program, weights):
    lines = [
        "water",
        "/seed 7",
        "water",
        "/temperature 1.3",
        "/tokens 60",
        "/top-p 0.8",
        "na\u00efve",
        "/top-k 5",
        "every",
    ]
    lines += [
        "/temperature 0",
        "/top-k off",
        "/top-p off",
        "//etc",
        "/temperature 0.7",
        "/seed 0",
        "/tokens 50",
        "water",
    ]
    finished = pipe("\n".join(lines))
    options = [
        ("water",),
        ("water", "--seed", 7),
        ("na\u00efve", *(others := ("--seed", 7, "--temperature", 1.3, "--tokens", 60, "--top-p", 0.8))),
        ("every", *others, "--top-k", 5),
        ("/etc", "--temperature", 0, "--tokens", 60),
        ("water",),
    ]
    expected = [call_program("test_generation", weights, "--prompt", *of_one).stdout for of_one in options]
    assert finished.stdout == "".join(expected) and finished.returncode == 0
    assert len(set(expected)) == len(expected) - 1


def compiled():
    return generation.prefill._cache_size(), generation.decode._cache_size()


def test_settings_need_no_compilation_and_a_long_prompt_one(pipe):
    pipe("water\n")
    before = prefills, decodes = compiled()
    changes = ["/temperature 0", "/temperature 2", "/top-p 0.3", "/top-p off", "/seed 9", "/tokens 3", "/tokens 99"]
    finished = pipe("".join(f"{change}\nsand\n" for change in changes))
    assert len(set(finished.stdout.split("\nsand"))) > 4 and compiled() == before  # they have effects
    pipe("/top-p 0.4\nwater, water, everywhere\n/seed 3\nwater, water, every where\n")
    assert compiled() == (prefills + 1, decodes)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/temperature", "/temperature: expected 0 (greedy) or a positive number, got nothing"),
        ("/temperature nan", "/temperature: expected 0 (greedy) or a positive number, got nan"),
        ("/temperature off", "/temperature: expected 0 (greedy) or a positive number, got off"),
        ("/top-p 1.5", "/top-p: expected a share above 0, at most 1, or off, got 1.5"),
        ("/top-k 0", "/top-k: expected a number above 0, or off, got 0"),
        ("/seed -1", "/seed: expected a number from 0 to 2,147,483,647, got -1"),
        ("/tokens 1 2", "/tokens: expected a number above 0, got 1 2"),
        ("/sing", "/sing: no such command; /help lists them"),
        ("/", "/: no such command; /help lists them"),
        ("water " * 10, "the prompt: expected fewer than 32 tokens, the context, got 60; shorten it"),
        (b"na\xefve", "standard input: expected UTF-8 text, but byte 2 is 0xef; convert it with iconv"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_one_line_and_the_session_continues(pipe, line, complaint):
    content = line if isinstance(line, bytes) else line.encode()
    finished = pipe(content + b"\n \n/settings\n")
    assert finished.stderr == f"error: {complaint}\n"
    assert finished.stdout == "temperature 0.7, top-k off, top-p off, seed 0, tokens 50\n" and finished.returncode == 2


def test_quit_leaves_and_help_names_every_command(pipe):
    finished = pipe("/help\n/quit\nwater\n")
    assert finished.returncode == 0 and "water" not in finished.stdout
    for command in ("/temperature", "/top-p", "/top-k", "/seed", "/tokens", "/settings", "/quit"):
        assert f"\n  {command} " in finished.stdout


@pytest.mark.parametrize("is_interactive", [True, False])
def test_a_model_that_repeats_its_input_is_refused(pipe, call_program, weights, tmp_path, is_interactive):
    (tmp_path / MODEL_FILE).write_bytes(weights.read_bytes())
    (tmp_path / "meta.json").write_text(json.dumps({"train_config": {"objective": "a-to-a"}}))
    finished = pipe("water\n", model=tmp_path) if is_interactive else call_program("test_generation", tmp_path)
    assert finished.returncode == 2 and not finished.stdout
    assert f"uv run test_a_to_a.py {tmp_path} --text TEXT" in finished.stderr and finished.stderr.count("\n") == 1
