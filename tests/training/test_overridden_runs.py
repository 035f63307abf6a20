"""Runs that are trained under overrides: what is recorded, what the next start says, and what it needs."""

import json
import shlex
import signal
from functools import partial

import pytest
from helpers import final_state
from test_train import LONG, start_and_signal

from checkpointing import find_checkpoints
from outside_in.storage.metrics import read

pytestmark = pytest.mark.slow


@pytest.fixture
def train(call_program):
    return partial(call_program, "train")


def newest(run):
    return find_checkpoints(run / "checkpoints")[-1].meta


def test_overrides_are_recorded_and_hold_for_one_start_alone(train, make_run, call_program, monkeypatch):
    run = make_run()
    files = {path: path.read_bytes() for path in run.iterdir()}
    first = train(run, "learning_rate=2e-3", "checkpoint_interval=4", "min_train_tokens=640")
    assert first.returncode == 0, first.stderr
    assert f"for this start: learning_rate=0.002 ({run}/train.json: 0.01)" in first.stdout
    values = {"learning_rate": 0.002, "checkpoint_interval": 4, "min_train_tokens": 640}
    meta = newest(run)
    assert meta["events"][0]["text"].endswith(", with learning_rate=0.002 checkpoint_interval=4 min_train_tokens=640")
    assert meta["overrides"] == values and values.items() <= meta["train_config"].items()
    assert [c.global_step for c in find_checkpoints(run / "checkpoints")] == [4, 5]
    shown = "learning_rate=0.002 checkpoint_interval=4 min_train_tokens=640"
    assert f", trained with {shown}\n" in call_program("inspect_checkpoint", run).stdout
    assert {path: path.read_bytes() for path in files} == files

    monkeypatch.setattr("train.RUNS", run.parent)
    assert f"{run}  finished, with {shown}\n" in train().stdout

    plain = train(run)
    assert plain.returncode == 2
    for change in ("learning_rate: 0.002 → 0.01 (the last start had learning_rate=0.002 on its", "640 → 1536 ("):
        assert change in plain.stderr
    again = plain.stderr.partition(": repeat ")[2].partition(", or resume with")[0]
    repeated = train(run, *shlex.split(again))
    assert repeated.returncode == 0 and "finished: step 5 of 5" in repeated.stdout
    assert "checkpoint_interval: 4 → 5 (the last start had checkpoint_interval=4 on its" in repeated.stdout

    longer = train(run, "learning_rate=0.002", "min_train_tokens=1280")
    assert longer.returncode == 0, longer.stderr
    assert "since the checkpoint: min_train_tokens: 640 → 1280 (on the command line)" in longer.stdout
    assert newest(run)["overrides"] == {"learning_rate": 0.002, "min_train_tokens": 1280}

    back = train(run, "--accept-changes")
    assert back.returncode == 0, back.stderr
    assert len(read(run / "metrics.jsonl")) == 12
    assert newest(run)["overrides"] == {} and newest(run)["train_config"]["learning_rate"] == 0.01


def test_a_run_under_overrides_is_the_run_whose_file_has_those_values(train, make_run):
    overridden, written = make_run("overridden"), make_run("written", train={"learning_rate": 2e-3, "drop_rate": 0.1})
    assert train(overridden, "learning_rate=2e-3", "drop_rate=0.1").returncode == 0
    assert train(written).returncode == 0
    states = [final_state(run) for run in (overridden, written)]
    assert states[0]["metrics"] == states[1]["metrics"]
    assert all((array == states[1]["parameters"][name]).all() for name, array in states[0]["parameters"].items())


def test_going_back_to_a_checkpoint_forgets_overrides_that_are_not_repeated(train, make_run):
    run = make_run()
    assert train(run, "sample_prompt=Once").returncode == 0
    first = find_checkpoints(run / "checkpoints")[0].path.name
    assert train(run, "--from", first, "learning_rate=2e-3").returncode == 0
    assert newest(run)["overrides"] == {"learning_rate": 0.002}
    assert newest(run)["train_config"]["sample_prompt"] == "Every effort moves you"


def test_other_validation_tokens_may_be_wished_for_on_the_command_line(train, make_run, token_folder):
    run = make_run()
    assert train(run, "min_train_tokens=640").returncode == 0
    assert train(run, "val_tokens=96").returncode == 2
    assert train(run, "min_train_tokens=1280", "val_tokens=96").returncode == 0
    assert newest(run)["data"]["validation"].startswith("97 tokens")
    (token_folder / "validation.safetensors").write_bytes((token_folder / "train.safetensors").read_bytes())
    changed = train(run, "min_train_tokens=1500", "val_tokens=96")
    assert changed.returncode == 2 and "the validation tokens differ" in changed.stderr


def test_the_line_that_resumes_an_interrupted_run_has_its_overrides(train, make_run):
    run = make_run(train=LONG)
    changes = ["sample_prompt=it's = 1", "learning_rate=2e-3"]
    code, output = start_and_signal(run, signal.SIGINT, arguments=changes)
    assert code == 130, output
    line = output.partition("type the same line again (")[2].partition(")\n")[0]
    assert shlex.split(line) == ["uv", "run", "train.py", str(run), *changes]
    resumed = train(*shlex.split(line)[3:])
    assert resumed.returncode == 0 and "resuming from step" in resumed.stdout


def test_all_runs_of_a_folder_are_trained_under_the_overrides(train, make_run, tmp_path):
    (tmp_path / "folder").mkdir()
    runs = [make_run(f"folder/{name}", model={"n_layers": 0}) for name in ("01", "02")]
    finished = train(tmp_path / "folder", "min_train_tokens=256")
    assert finished.returncode == 0, finished.stderr
    for run in runs:
        assert f"for this start: min_train_tokens=256 ({run}/train.json: 1536)" in finished.stdout
        assert len(read(run / "metrics.jsonl")) == 2 and newest(run)["overrides"] == {"min_train_tokens": 256}


def test_a_model_learns_its_first_batch_under_overrides(train, make_run):
    run = make_run(train={"learning_rate": 1e-30})
    assert train(run, "--overfit-one-batch", "learning_rate=0.01").returncode == 0
    assert not json.loads((run / "train.json").read_text())["learning_rate"] > 1e-29
