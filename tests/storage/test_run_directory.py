"""Where a run keeps its files, and the lock that keeps a second process out."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT

from outside_in.storage.run_directory import RunDirectory, find_runs

HOLD_THE_LOCK = """
import sys
from pathlib import Path
from outside_in.storage.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another_process_training(folder):
    command = [sys.executable, "-c", HOLD_THE_LOCK, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("model_config", "model.json"),
        ("train_config", "train.json"),
        ("metrics", "metrics.jsonl"),
        ("samples", "samples.txt"),
        ("checkpoints", "checkpoints"),
        ("loss_chart", "loss-chart.png"),
        ("learning_rate_chart", "learning-rate-chart.png"),
        ("gradient_norm_chart", "gradient-norm-chart.png"),
        ("report", "report.html"),
    ],
)
def test_the_files_are_where_the_design_puts_them(tmp_path, name, file):
    assert getattr(RunDirectory(tmp_path), name) == tmp_path / file


def test_a_folder_is_a_fine_run(tmp_path):
    RunDirectory(tmp_path).check()


@pytest.mark.parametrize(("name", "found"), [("none", "found nothing"), ("file", "got a file")])
def test_what_is_no_folder_is_refused_in_one_line(tmp_path, name, found):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"{name}: expected a run folder, {found}") as caught:
        RunDirectory(tmp_path / name).check()
    assert "\n" not in str(caught.value)


def test_the_lock_keeps_a_second_process_out_and_names_the_first(tmp_path):
    with (
        another_process_training(tmp_path) as first,
        pytest.raises(ValueError, match=rf"is being trained by process {first.pid} on \S+;"),
        RunDirectory(tmp_path).lock(),
    ):
        pytest.fail("two processes hold the lock")


def test_the_one_that_was_kept_out_does_not_wipe_the_name_of_the_first(tmp_path):
    with another_process_training(tmp_path) as first:
        for _ in range(2):
            with pytest.raises(ValueError, match=f"process {first.pid} "), RunDirectory(tmp_path).lock():
                pass


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_left_by_a_dead_process_does_not_count(tmp_path, how):
    with another_process_training(tmp_path) as first:
        first.send_signal(how)
        first.wait()
    assert f"process {first.pid} " in (tmp_path / ".lock").read_text()
    with RunDirectory(tmp_path).lock():
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_the_lock_is_free_again_after_an_error(tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.raises(ZeroDivisionError), run.lock():
        1 / 0  # noqa: B018
    with run.lock():
        pass


def test_runs_do_not_lock_each_other(tmp_path):
    (tmp_path / "other").mkdir()
    with another_process_training(tmp_path / "other"), RunDirectory(tmp_path).lock():
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(ValueError, match=r"cannot write here .*; make the folder writable"):
            RunDirectory(tmp_path).lock().__enter__()
    finally:
        tmp_path.chmod(0o755)


def test_a_lock_that_cannot_be_made_is_refused_with_the_reason(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(ValueError, match=r"cannot write here \(Is a directory\)"), RunDirectory(tmp_path).lock():
        pass


def test_runs_are_found_at_and_below_a_folder_in_order_of_their_names(tmp_path):
    for name in ("ladder/b", "zebra", "ladder/a", "alpha", "."):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "train.json").touch()
    (tmp_path / "notes").mkdir()
    found = [run.path.relative_to(tmp_path).as_posix() for run in find_runs(tmp_path)]
    assert sorted(found) == [".", "alpha", "ladder/a", "ladder/b", "zebra"]
    assert [name for name in found if name != "."] == ["alpha", "ladder/a", "ladder/b", "zebra"]


def test_no_folder_has_no_runs(tmp_path):
    assert find_runs(tmp_path / "none") == []


DOUBLE_LAUNCH = """
import os, re, sys
from pathlib import Path
from outside_in.storage.run_directory import RunDirectory

def launch(run, start, end):
    # Say "won" and hold the lock until `end` closes, or say what we were told.
    said, say = os.pipe()
    if not os.fork():
        os.read(start, 1)
        try:
            with run.lock():
                os.write(say, b"won %d" % os.getpid())
                os.read(end, 1)
        except ValueError as error:
            os.write(say, str(error).encode())
        os._exit(0)
    return said

for number in range(100):
    run = RunDirectory(Path(sys.argv[1]))
    (start, go), (end, stop) = os.pipe(), os.pipe()
    answers = [launch(run, start, end) for _ in range(2)]
    os.write(go, b"!!")
    won, lost = sorted((os.read(said, 1000).decode() for said in answers), key=lambda text: not text.startswith("won"))
    winner = re.fullmatch(r"won (\\d+)", won)[1]
    assert f"is being trained by process {winner} on {os.uname().nodename}" in lost, (number, lost)
    os.write(stop, b"!")
    for _ in answers:
        os.wait()
"""


def test_of_two_processes_one_trains_and_the_other_names_it_a_hundred_times_of_a_hundred(tmp_path):
    done = subprocess.run([sys.executable, "-c", DOUBLE_LAUNCH, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
