"""Checkpoints while training: signals in every phase, disks that refuse, writing in the background."""

import contextlib
import errno
import json
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from helpers import ROOT, assert_same, complaint, final_state, on_step, run_program, send
from safetensors import SafetensorError

import checkpointing
from checkpointing import find_checkpoints, verify
from outside_in.reports import charts, comparison
from outside_in.storage import metrics
from outside_in.storage.run_directory import RunDirectory
from outside_in.training import checkpoint_writer, loop

pytestmark = pytest.mark.slow

NO_SPACE = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.fixture
def train(call_program):
    return partial(call_program, "train")


@pytest.fixture(autouse=True)
def a_sample_of_any_vocabulary_and_quick_charts(monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "sample", lambda state: [f"a sample of step {state.global_step}"])
    for name in ("draw_loss", "draw_learning_rate", "draw_gradient_norm"):
        monkeypatch.setattr(charts, name, lambda path, *args, **options: path.write_bytes(b""))


@pytest.fixture
def alone(train, make_run):
    """The final state of the run that nothing disturbs."""
    if not UNDISTURBED:
        run = make_run("alone")
        assert train(run).returncode == 0
        UNDISTURBED.update(final_state(run))
    return UNDISTURBED


UNDISTURBED = {}


def on_call(monkeypatch, owner, name, number, action):
    """Before the `number`th call of `owner.name`, do something."""
    original, calls = getattr(owner, name), 0

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


PHASES = {  # what is called then, which call of it, changes to train.json, the step that is saved
    "stepping": (None, "training step", 3, {}, 3),
    "between microbatches": (None, "training step", 6, {"microbatches_per_call": 1}, 2),
    "validating": (None, "evaluation step", 1, {}, 5),
    "sampling": (checkpoint_writer, "sample", 1, {}, 5),
    "copying": (checkpointing, "copy_to_host", 1, {}, 5),
    "saving": (checkpointing, "_write", 1, {}, None),
    "pruning": (checkpointing, "prune", 1, {}, None),
    "drawing charts": (charts, "draw_loss", 1, {}, None),
    "validating at the end": (None, "evaluation step", 5, {}, 12),
    "saving at the end": (checkpointing, "_write", 3, {}, None),
}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_saves_and_the_resumed_run_is_the_undisturbed_one(
    train, make_run, monkeypatch, alone, phase, number, code
):
    owner, name, call, changes, saved_step = PHASES[phase]
    run = make_run(train=changes)
    with monkeypatch.context() as patches:
        before = partial(on_call, patches, owner) if owner else partial(on_step, patches)
        before(name, call, lambda: send(number))
        finished = train(run)
    assert finished.returncode == code, finished.stderr
    newest = find_checkpoints(run / "checkpoints")[-1]
    verify(newest)
    assert newest.global_step == len(metrics.read(run / "metrics.jsonl"))
    assert saved_step in (newest.global_step, None)
    assert not list((run / "checkpoints").glob(".*"))
    if phase != "saving at the end":
        assert re.search(
            rf"stopped and saved at step {newest.global_step} of 12; to resume, type the same line again",
            finished.stdout,
        )
    assert train(run).returncode == 0
    state = final_state(run)
    if not changes:  # MultiSteps has a state of its own
        assert_same(alone, state)
    assert "finished: step 12 of 12" in train(run).stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
def test_a_signal_while_compiling_ends_a_run_that_has_nothing_to_save_yet(
    train, make_run, monkeypatch, alone, number, code
):
    run = make_run()
    with monkeypatch.context() as patches:
        on_call(patches, loop, "compile_train_step", 1, lambda: send(number))
        finished = train(run)
    assert finished.returncode == code, finished.stderr
    assert "stopped before the first step; to resume, type the same line again" in finished.stdout
    assert find_checkpoints(run / "checkpoints") == []
    assert train(run).returncode == 0
    assert_same(alone, final_state(run))


def test_validation_that_was_broken_off_is_made_up_for(train, make_run, monkeypatch):
    run = make_run()
    with monkeypatch.context() as patches:
        on_step(patches, "evaluation step", 1, lambda: send(signal.SIGINT))
        assert train(run).returncode == 130
    [interrupted] = find_checkpoints(run / "checkpoints")
    assert interrupted.meta["val_loss"] is None and not interrupted.is_best
    assert train(run).returncode == 0
    assert "val_loss" in metrics.read(run / "metrics.jsonl")[4]
    assert [c.global_step for c in find_checkpoints(run / "checkpoints")] == [5, 10, 12]


def test_sigusr1_saves_and_goes_on(train, make_run, monkeypatch, alone):
    run = make_run(train={"keep_checkpoints": None})
    on_step(monkeypatch, "training step", 3, lambda: send(signal.SIGUSR1))
    assert train(run).returncode == 0
    assert [c.global_step for c in find_checkpoints(run / "checkpoints")] == [3, 5, 10, 12]
    assert_same(alone, final_state(run))


# The background


def test_training_goes_on_while_a_checkpoint_is_written_and_the_exit_waits_for_it(train, make_run, monkeypatch, alone):
    run, steps_while_writing, write = make_run(), [], checkpointing._write

    def slow_write(*args):
        assert threading.current_thread() is not threading.main_thread()
        before = len(metrics.read(run / "metrics.jsonl"))
        deadline = time.monotonic() + 20
        while (now := len(metrics.read(run / "metrics.jsonl"))) < min(before + 2, 11) and time.monotonic() < deadline:
            time.sleep(0.01)
        steps_while_writing.append(now - before)
        write(*args)

    monkeypatch.setattr(checkpointing, "_write", slow_write)
    assert train(run).returncode == 0
    assert steps_while_writing[0] >= 2
    assert_same(alone, final_state(run))


def test_what_is_saved_is_the_moment_of_the_checkpoint_not_what_training_made_of_it_since(train, make_run, monkeypatch):
    quick, slow, write = make_run("quick"), make_run("slow"), checkpointing._write
    assert train(quick).returncode == 0

    def write_later(*args):
        time.sleep(0.5)
        write(*args)

    monkeypatch.setattr(checkpointing, "_write", write_later)
    assert train(slow).returncode == 0
    files = [find_checkpoints(run / "checkpoints")[0].path / "model.safetensors" for run in (quick, slow)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_time_lost_to_checkpoints_is_in_the_metrics_and_said_at_the_end(train, make_run, monkeypatch):
    run = make_run()
    on_call(monkeypatch, checkpointing, "copy_to_host", 1, lambda: time.sleep(0.3))
    finished = train(run)
    records = metrics.read(run / "metrics.jsonl")
    lost = {r["global_step"]: r["checkpoint_seconds"] for r in records if "checkpoint_seconds" in r}
    assert lost.keys() == {6, 11} and lost[6] >= 0.3
    assert find_checkpoints(run / "checkpoints")[-1].meta["seconds_paused"] >= 0.3
    [seconds] = re.findall(r"([\d.]+) s checkpoints \(", finished.stdout)
    assert float(seconds) >= 0.3


def test_a_reader_never_sees_a_torn_state_while_the_run_is_trained(train, make_run, monkeypatch):
    monkeypatch.undo()  # real charts
    run, ended, seen = make_run(train={"checkpoint_interval": 2}), threading.Event(), []

    def read():
        while not ended.is_set():
            trained = comparison.read(RunDirectory(run))
            if trained:
                assert trained.records.column("global_step").tolist() == list(range(1, len(trained.records) + 1))
                seen.append(len(trained.records))
            for chart in run.glob("*.png"):
                image = chart.read_bytes()
                assert image.startswith(b"\x89PNG") and image.endswith(b"IEND\xaeB`\x82")
            for link in ("latest", "best"):
                with contextlib.suppress(FileNotFoundError):  # not yet, or pruned under our hands
                    json.loads((run / "checkpoints" / link / "meta.json").read_bytes())

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        finished = train(run)
        ended.set()
        reader.result()
    assert finished.returncode == 0
    assert len(set(seen)) > 2


# Disks that refuse


def fail(error):
    def action():
        raise error

    return action


WRITERS = {
    "weights": (checkpointing, "save_weights"),
    "optimizer": (checkpointing.ocp, "save"),
    "fsync": (checkpointing, "fsync_tree"),
    "copy": (checkpointing, "copy_to_host"),
}


@pytest.mark.parametrize(
    ("writer", "error"),
    [
        ("weights", NO_SPACE),
        ("optimizer", ValueError("RESOURCE_EXHAUSTED: Failed to write to file 17 [os_error_code='28']")),
        ("fsync", OSError(errno.EIO, "Input/output error")),
        ("copy", OSError(errno.ENOSPC, "No space left on device")),
    ],
    ids=["weights", "optimizer", "fsync", "copy"],
)
def test_one_failed_save_is_a_warning_and_changes_nothing(train, make_run, monkeypatch, alone, writer, error):
    run = make_run()
    on_call(monkeypatch, *WRITERS[writer], 1, fail(error))
    finished = train(run)
    assert finished.returncode == 0, finished.stderr
    reason = "Input/output error" if writer == "fsync" else "No space left on device"
    [warning] = [line for line in finished.stdout.splitlines() if "WARNING" in line]
    assert reason in warning and "step 5 could not be saved" in warning and "training continues" in warning
    assert [c.global_step for c in find_checkpoints(run / "checkpoints")] == [10, 12]
    assert not list((run / "checkpoints").glob(".staging*"))
    assert_same(alone, final_state(run))


def test_a_failed_last_save_is_tried_again(train, make_run, monkeypatch, alone):
    run = make_run()
    on_call(monkeypatch, checkpointing, "_write", 3, fail(NO_SPACE))
    finished = train(run)
    assert finished.returncode == 0 and "step 12 could not be saved" in finished.stdout
    assert_same(alone, final_state(run))


@pytest.mark.parametrize("disturbed", ["at milestones", "at the stop"])
def test_saves_that_go_on_failing_are_one_error_and_what_was_committed_stays(
    train, make_run, monkeypatch, alone, disturbed
):
    run = make_run(train={"checkpoint_interval": 2})
    write, calls = checkpointing._write, 0
    monkeypatch.setattr(checkpoint_writer, "RETRY_SECONDS", 0.0)

    def write_once(*args):
        nonlocal calls
        calls += 1
        if calls > 1:
            raise NO_SPACE
        write(*args)

    with monkeypatch.context() as patches:
        patches.setattr(checkpointing, "_write", write_once)
        if disturbed == "at the stop":
            on_step(patches, "training step", 3, lambda: send(signal.SIGINT))
        line = complaint(train(run), code=1)
    assert "could not be saved" in line and "No space left on device" in line and "resumes from step 2" in line
    assert [c.global_step for c in find_checkpoints(run / "checkpoints")] == [2]
    assert not list((run / "checkpoints").glob(".staging*"))
    assert train(run).returncode == 0
    assert final_state(run)["step"] == 12


def test_a_disk_that_became_read_only_is_an_error_at_once(train, make_run, monkeypatch):
    run = make_run()
    on_call(monkeypatch, checkpointing, "_write", 1, fail(OSError(errno.EROFS, "Read-only file system")))
    assert "Read-only file system" in complaint(train(run), code=1)


def test_metrics_that_cannot_be_written_are_kept_and_written_later(train, make_run, monkeypatch, alone):
    run, append, calls = make_run(), metrics.append, 0

    def sometimes(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls in (2, 3, 4):
            raise OSError(errno.ENOSPC, "No space left on device")
        append(*args, **kwargs)

    monkeypatch.setattr(metrics, "append", sometimes)
    finished = train(run)
    assert finished.returncode == 0
    assert finished.stdout.count("metrics cannot be written") == 1
    assert_same(alone, final_state(run))


@pytest.mark.parametrize("name", ["draw_loss", "draw_gradient_norm"])
def test_a_chart_that_cannot_be_drawn_costs_no_checkpoint(train, make_run, monkeypatch, alone, name):
    run = make_run()
    on_call(monkeypatch, charts, name, 1, fail(OSError(errno.ENOSPC, "No space left on device")))
    finished = train(run)
    assert (
        finished.returncode == 0
        and "WARNING the checkpoint is saved, but pruning or drawing charts failed" in finished.stdout
    )
    assert_same(alone, final_state(run))


def test_a_quota_of_the_system_is_one_error_and_the_run_goes_on_without_it(train, make_run):
    run = make_run(train={"checkpoint_interval": 1, "min_train_tokens": 6 * 128}, model={"emb_dim": 128})
    command = f"ulimit -f 60; exec {sys.executable} train.py {run}"  # KiB a file: enough for all but the arrays
    finished = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    line = complaint(finished, code=1)
    assert "File too large" in line
    assert finished.stdout.count("WARNING") == 2
    assert find_checkpoints(run / "checkpoints") == [] and not list((run / "checkpoints").iterdir())
    assert train(run).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, where we may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_a_warning_until_there_is_space_again(make_run, small_disk, alone):
    folder = make_run()
    run = small_disk / "run"
    run.mkdir()
    for name in ("model.json", "train.json"):
        (run / name).write_bytes((folder / name).read_bytes())
    ballast = small_disk / "ballast"

    def fill():
        with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))

    fill()
    line = complaint(run_program("train.py", run), code=1)
    assert "No space left on device" in line
    assert not list(run.glob("checkpoints/*"))
    ballast.unlink()
    assert run_program("train.py", run).returncode == 0
    state = final_state(run)
    fill()
    again = run_program("train.py", run)
    assert again.returncode == 0 and "finished: step 12 of 12" in again.stdout
    assert final_state(run)["step"] == state["step"] == 12
