"""`prove_resume.py`: kills that a run must survive, and differences that it must find."""

import json
import os
import re
import shutil
from functools import partial

import numpy as np
import pytest
from helpers import complaint

import checkpointing
import prove_resume
from checkpointing import HostCopy, find_checkpoints
from outside_in.storage import metrics
from outside_in.storage.run_directory import RunDirectory

pytestmark = pytest.mark.slow


@pytest.fixture
def prove(call_program):
    return partial(call_program, "prove_resume")


def test_a_run_is_identical_after_twelve_kills_and_its_folder_is_untouched(prove, make_run):
    run = make_run(train={"min_train_tokens": -1, "drop_rate": 0.1, "microbatches_per_call": 2})
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    finished = prove(run, "--kills", 12, "--steps", 15, "--seed", 1)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.splitlines()[-1] == "identical after 12 kills"
    kills = {
        row[0]: int(row[1]) for row in re.findall(r"^\| (starting|stepping|saving) +\| +(\d+)", finished.stdout, re.M)
    }
    assert sum(kills.values()) == 12 and min(kills.values()) >= 2
    compared = re.findall(r"^\| ([a-z ]+?) +\| .* \| identical +\|$", finished.stdout, re.M)
    assert compared == ["parameters", "optimizer state", "metrics", "data consumed", "samples", "checkpoints kept"]
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A checkpoint and metrics as `compare` reads them, quickly made."""
    run = RunDirectory(tmp_path_factory.mktemp("finished") / "run")
    run.path.mkdir()
    state = HostCopy({"a": np.zeros(3, np.float32), "b": np.ones(2, np.float32)}, {"m": np.zeros((), np.int32)})
    checkpointing.save(run.checkpoints, state, {"global_step": 2, "is_best": True}, "{}")
    records = [{"global_step": n, "loss": 1 / n, "data_crc32": n, "seconds": 0.1 * n} for n in (1, 2)]
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    run.samples.write_text("step 2 | so it goes\n")
    return run


def change_weights(run, optimizer=False):
    """Commit the newest checkpoint again with one bit of one array changed."""
    [checkpoint] = find_checkpoints(run.checkpoints)
    state, meta = checkpointing.read(checkpoint), checkpoint.meta
    shutil.rmtree(checkpoint.path)
    array = state.optimizer["m"] if optimizer else state.weights["b"]
    array = array.copy()
    array.view(np.int32)[...] ^= 1
    changed = (
        HostCopy(state.weights, {"m": array}) if optimizer else HostCopy(state.weights | {"b": array}, state.optimizer)
    )
    checkpointing.save(run.checkpoints, changed, meta, "{}")


CHANGES = {
    "parameters": lambda run: change_weights(run),
    "optimizer state": lambda run: change_weights(run, optimizer=True),
    "metrics": lambda run: run.metrics.write_text(run.metrics.read_text().replace("0.5", "0.5000001", 1)),
    "data consumed": lambda run: run.metrics.write_text(
        run.metrics.read_text().replace('"data_crc32": 1', '"data_crc32": 7')
    ),
    "samples": lambda run: run.samples.write_text(""),
    "checkpoints kept": lambda run: checkpointing.save(
        run.checkpoints,
        checkpointing.read(find_checkpoints(run.checkpoints)[0]),
        {"global_step": 2, "is_best": False},
        "{}",
    ),
}


def differences(left, right):
    return {name for name, _, difference in prove_resume.compare(left, right) if difference}


@pytest.mark.parametrize("change", CHANGES)
def test_any_difference_is_found(finished_run, tmp_path, change):
    other = RunDirectory(tmp_path / "other")
    shutil.copytree(finished_run.path, other.path, symlinks=True)
    assert differences(finished_run, other) == set()
    CHANGES[change](other)
    assert differences(finished_run, other) - {"metrics"} == {change} - {"metrics"}
    assert change in differences(finished_run, other)


def test_times_are_no_difference(finished_run, tmp_path):
    other = RunDirectory(tmp_path / "other")
    shutil.copytree(finished_run.path, other.path, symlinks=True)
    other.metrics.write_text(other.metrics.read_text().replace('"seconds": 0.1', '"seconds": 5.0'))
    assert differences(finished_run, other) == set()


def test_a_difference_is_the_verdict_and_exit_code_1(prove, make_run, monkeypatch):
    run = make_run()
    row = ("parameters", "3 arrays", "1 differ, such as a")
    monkeypatch.setattr(prove_resume, "train_alone", lambda run: {})
    monkeypatch.setattr(prove_resume, "train_and_kill", lambda *_: [prove_resume.Kill("saving", 3, 1, True)])
    monkeypatch.setattr(prove_resume, "compare", lambda *_: [row])
    finished = prove(run)
    assert finished.returncode == 1
    assert finished.stdout.splitlines()[-1] == "different after 1 kill"
    assert "| parameters | 3 arrays | 1 differ, such as a |" in " ".join(finished.stdout.split())


def test_a_process_that_resumes_or_steps_writes_the_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert prove_resume.last_write(path) == 0
    for write in (lambda: metrics.append(path, []), lambda: metrics.cut_after(path, 0)):
        write()
        assert prove_resume.last_write(path) > 1
        os.utime(path, ns=(1, 1))
        assert prove_resume.last_write(path) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--kills", "0"], "--kills"), (["--steps", "x"], "--steps"), (["--steps", "-1"], "--steps")],
)
def test_a_wrong_number_is_one_line(prove, make_run, arguments, expected):
    assert expected in complaint(prove(make_run(), *arguments))


def test_what_train_refuses_is_said_in_its_own_words(prove, make_run):
    assert "expected at least" in complaint(prove(make_run(), "--steps", 10**6), code=1)
    assert "no folder" in complaint(prove(make_run("other", train={"dataset": "nowhere"})), code=1)
