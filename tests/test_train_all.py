"""`train.py` on a folder of runs: one after the other, resumable as a whole, compared at the end."""

import json
import signal

import pytest
from helpers import TINY_TRAIN, complaint
from test_train import LONG, start_and_signal

from outside_in.runtime import cli
from outside_in.storage.metrics import read
from outside_in.training import run

pytestmark = pytest.mark.slow


@pytest.fixture
def ladder(make_run, tmp_path):
    """Make a folder with two tiny runs, `01` and `02`; returns the folder."""
    folder = tmp_path / "ladder"
    folder.mkdir()
    make_run("ladder/01", model={"n_layers": 0}, train={"checkpoint_interval": 12})
    make_run("ladder/02", train={"checkpoint_interval": 12})
    return folder


def steps(run):
    return [record["global_step"] for record in read(run / "metrics.jsonl")]


def test_every_run_is_trained_in_order_and_compared(call_program, ladder):
    finished = call_program("train", ladder)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.index("run 1 of 2: ") < finished.stdout.index("run 2 of 2: ")
    assert steps(ladder / "01") == steps(ladder / "02") == list(range(1, 13))
    rows = [line.split("|")[1].strip() for line in finished.stdout.splitlines() if line.startswith("|")]
    assert rows == ["run", "---", "01", "02"]
    assert (ladder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    again = call_program("train", ladder)
    assert again.returncode == 0
    assert again.stdout.count("is finished") == 2


def test_an_interrupted_folder_goes_on_with_the_run_it_stopped_in(call_program, ladder):
    config = ladder / "02" / "train.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | LONG))
    assert call_program("train", ladder / "01").returncode == 0
    code, output = start_and_signal(ladder, signal.SIGINT, metrics=ladder / "02" / "metrics.jsonl")
    assert code == 130, output
    assert f"to resume, type the same line again (uv run train.py {ladder})" in output
    assert "parameters" not in output.split("run 2 of 2")[0]
    assert 20 <= len(steps(ladder / "02")) < 96
    finished = call_program("train", ladder)
    assert finished.returncode == 0
    assert "resuming from step" in finished.stdout
    assert steps(ladder / "02") == list(range(1, 97))


def test_a_run_that_fails_does_not_keep_the_others_from_training(call_program, ladder):
    config = ladder / "01" / "train.json"
    config.write_text(json.dumps(TINY_TRAIN | {"dataset": str(ladder / "nowhere")}))
    finished = call_program("train", ladder)
    assert finished.returncode == 2
    assert [line.startswith("error: ") for line in finished.stderr.splitlines() if "nowhere" in line] == [True]
    assert finished.stdout.splitlines()[-1].endswith("ERROR not finished: 01 (1 of 2 runs)")
    assert not (ladder / "01" / "metrics.jsonl").exists()
    assert steps(ladder / "02") == list(range(1, 13))


def test_a_folder_in_which_every_run_fails_has_nothing_to_compare(call_program, ladder):
    for config in ladder.glob("*/train.json"):
        config.write_text(json.dumps(TINY_TRAIN | {"dataset": str(ladder / "nowhere")}))
    finished = call_program("train", ladder)
    assert finished.returncode == 2
    assert finished.stderr.count("error: ") == finished.stderr.count("nowhere") == 2


def test_a_run_that_the_user_cannot_mend_decides_the_exit_code(call_program, ladder, monkeypatch):
    (ladder / "02" / "train.json").write_text(json.dumps(TINY_TRAIN | {"dataset": str(ladder / "nowhere")}))
    monkeypatch.setattr(run, "train", lambda *_: cli.FAILED)
    finished = call_program("train", ladder)
    assert finished.returncode == 1
    assert finished.stdout.splitlines()[-1].endswith("ERROR not finished: 01, 02 (2 of 2 runs)")


def test_a_signal_while_a_run_ends_keeps_the_next_one_from_starting(ladder):
    code, output = start_and_signal(ladder, signal.SIGTERM, after_step=12, metrics=ladder / "01" / "metrics.jsonl")
    assert code == 143, output
    assert steps(ladder / "01") == list(range(1, 13))
    assert "run 2 of 2" not in output


def test_a_run_that_fails_as_it_is_stopped_keeps_the_next_one_from_starting(call_program, ladder, monkeypatch):
    def cannot_save(state, stop, monitor):
        stop.received_signal = signal.SIGTERM
        raise OSError("step 3 could not be saved")

    monkeypatch.setattr(run, "train", cannot_save)
    finished = call_program("train", ladder)
    assert finished.returncode == 1
    assert finished.stderr.count("could not be saved") == 1
    assert "run 2 of 2" not in finished.stdout


def test_a_config_error_in_any_run_shows_before_the_first_one_trains(call_program, ladder):
    (ladder / "02" / "model.json").write_text("{}")
    finished = call_program("train", ladder)
    assert finished.returncode == 2
    assert str(ladder / "02" / "model.json") in finished.stderr
    assert not (ladder / "01" / "metrics.jsonl").exists()


def test_no_run_of_so_few_layers_is_a_mistake(call_program, ladder):
    assert call_program("train", ladder, "--max-layers", "0").stdout.count("run 1 of 1") == 1
    (ladder / "01" / "model.json").write_text((ladder / "02" / "model.json").read_text())
    told = complaint(call_program("train", ladder, "--max-layers", "0"))
    assert told.endswith(f"--max-layers 0: expected at least 1, the fewest of {ladder}")


def test_the_layers_of_a_single_run_are_no_choice(call_program, ladder):
    told = complaint(call_program("train", ladder / "01", "--max-layers", "0"))
    assert told.endswith(f"--max-layers 0: expected a folder of runs, got the run {ladder / '01'}")


def test_check_describes_every_run_and_trains_none(call_program, ladder):
    finished = call_program("train", ladder, "--check")
    assert finished.returncode == 0
    assert finished.stdout.count("parameters: ") == 2
    assert not (ladder / "01" / "metrics.jsonl").exists()


def test_a_checkpoint_belongs_to_one_run(call_program, ladder):
    finished = call_program("train", ladder, "--from", "best")
    assert finished.returncode == 2
    assert "expected one run with --from, got a folder of 2" in finished.stderr
