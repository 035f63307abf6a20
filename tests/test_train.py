"""`train.py` as its users meet it: in a process of its own, on a tiny run."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from helpers import ROOT, assert_same, complaint, final_state, run_program
from safetensors.numpy import load_file, save_file

from checkpointing import find_checkpoints, verify
from outside_in.storage.metrics import read

pytestmark = pytest.mark.slow

LONG = {"min_train_tokens": 12 * 128, "epochs": 8, "checkpoint_interval": 40, "drop_rate": 0.2}  # 96 global steps
FILES = {"loss-chart.png", "learning-rate-chart.png", "gradient-norm-chart.png", "metrics.jsonl", "checkpoints"}


@pytest.fixture
def train(call_program):
    return partial(call_program, "train")


def start_and_signal(run, *signals, after_step=20, metrics=None, arguments=()):
    """Start a run, wait for some steps (of `metrics`), send signals; returns exit code and output."""
    log = run.with_suffix(".log")
    with log.open("w") as output:  # a pipe that nobody empties would stop the program
        command = [sys.executable, ROOT / "train.py", run, *arguments]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    metrics = metrics or run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= after_step):
        time.sleep(0.005)
    for number in signals:
        process.send_signal(number)
    return process.wait(timeout=120), log.read_text()


def test_a_run_trains_to_its_end_and_says_so_when_typed_again(train, make_run):
    run = make_run()
    first = train(run)
    assert first.returncode == 0, first.stderr
    assert {path.name for path in run.iterdir()} >= FILES
    records = read(run / "metrics.jsonl")
    assert [record["global_step"] for record in records] == list(range(1, 13))
    assert [record["global_step"] for record in records if "val_loss" in record] == [5, 10, 12]
    assert [c.global_step for c in find_checkpoints(run / "checkpoints")] == [5, 10, 12]
    meta = find_checkpoints(run / "checkpoints")[1].meta
    period = [record["loss"] for record in records[5:10]]
    assert (meta["min_train_loss"], meta["max_train_loss"]) == (min(period), max(period))
    assert meta["avg_train_loss"] == pytest.approx(np.mean(period))
    assert meta["tokens_seen"] == 10 * 128
    best = min((record for record in records if "val_loss" in record), key=lambda record: record["val_loss"])
    assert (run / "checkpoints" / "best").resolve().name.endswith(f"iteration-{best['global_step']}")
    assert re.search(r"first loss \d\.\d{4}; a uniform guess over 101 tokens is 4\.6151", first.stdout)
    [time_line] = re.findall(r"  time    .* since the start: (.*)", first.stdout)
    parts = {"starting", "compiling", "steps", "preparing data", "validation", "samples", "checkpoints"}
    assert set(re.findall(r"(?:\d s|:\d\d) ([a-z ]+) \(", time_line)) == parts
    for line in (
        r"trained 1,536 tokens in 12 of 12 steps; \d:\d\d:\d\d in all",
        r"speed   [\d,]+ tokens/s in steps alone; [\d,]+ tokens/s with all else",
        rf"loss    training {np.mean([r['loss'] for r in records[10:]]):.4f} \(mean of 2 steps\); "
        rf"validation {records[-1]['val_loss']:.4f} \(perplexity {math.exp(records[-1]['val_loss']):.4g}\)",
        rf"best    step {best['global_step']}, validation loss {best['val_loss']:.4f}: {run}/checkpoints/",
        rf"next    uv run test_generation.py {run} ",
        rf"next    uv run evaluate.py {run} ",
    ):
        assert re.search(rf"  {line}", first.stdout), line
    before = (run / "metrics.jsonl").read_bytes()
    again = train(run)
    assert again.returncode == 0 and "finished: step 12 of 12" in again.stdout
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_whose_end_was_cut_short_is_put_right(train, make_run):
    run = make_run(train={"keep_checkpoints": 1})
    assert train(run).returncode == 0
    good = {path.name: path.readlink() for path in (run / "checkpoints").iterdir() if path.is_symlink()}
    for link in good:
        (run / "checkpoints" / link).unlink()
    assert "finished" in train(run).stdout
    assert {path.name: path.readlink() for path in (run / "checkpoints").iterdir() if path.is_symlink()} == good
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN


def test_the_history_of_a_run_whose_checkpoints_are_gone_is_kept(train, make_run):
    run = make_run()
    assert train(run).returncode == 0
    history = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    again = train(run)
    assert again.returncode == 0 and "no checkpoint, but metrics up to step 12" in again.stdout
    [kept] = run.glob("metrics-before-*.jsonl")
    assert kept.read_bytes() == history
    assert len(read(run / "metrics.jsonl")) == 12


def test_metrics_that_lack_steps_are_said_to(train, make_run):
    run = make_run()
    assert train(run).returncode == 0
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3] + lines[5:]))
    again = train(run, "--from", find_checkpoints(run / "checkpoints")[1].path.name)
    assert again.returncode == 0 and "metrics.jsonl lacks steps before 10" in again.stdout


def test_the_records_are_the_same_without_a_progress_bar(make_run):
    run = make_run()
    assert run_program("train.py", run, env=os.environ | {"TQDM_DISABLE": "1"}).returncode == 0
    assert [record["global_step"] for record in read(run / "metrics.jsonl")] == list(range(1, 13))


@pytest.mark.parametrize("per_call", [1, 4])
def test_an_interrupted_and_resumed_run_is_bit_for_bit_the_uninterrupted_one(train, make_run, per_call):
    changes = LONG | {"microbatches_per_call": per_call}
    alone, interrupted = make_run("alone", train=changes), make_run("interrupted", train=changes)
    assert train(alone).returncode == 0
    code, output = start_and_signal(interrupted, signal.SIGINT)
    assert code == 130, output
    assert re.search(
        r"stopped and saved at step \d+ of 96; to resume, type the same line again \(uv run train.py \S*interrupted\)",
        output,
    )
    assert re.search(r"  time    .*\d s steps \(", output)
    code, output = start_and_signal(interrupted, signal.SIGKILL, after_step=60)
    assert code == -signal.SIGKILL
    assert train(interrupted).returncode == 0
    assert_same(final_state(alone), final_state(interrupted))


def test_sigterm_saves_and_exits_with_143(make_run):
    run = make_run(train=LONG)
    code, output = start_and_signal(run, signal.SIGTERM)
    assert code == 143, output
    assert find_checkpoints(run / "checkpoints")[-1].global_step == len(read(run / "metrics.jsonl"))


def test_a_second_ctrl_c_leaves_at_once_and_what_was_committed_stays_good(train, make_run):
    run = make_run(train=LONG | {"checkpoint_interval": 50})
    code, _ = start_and_signal(run, signal.SIGINT, signal.SIGINT)
    assert code == 130
    for checkpoint in find_checkpoints(run / "checkpoints"):
        verify(checkpoint)
    assert train(run).returncode == 0


def test_a_damaged_checkpoint_is_passed_over_by_name(train, make_run):
    run = make_run()
    assert train(run).returncode == 0
    expected = final_state(run)
    newest = find_checkpoints(run / "checkpoints")[-1].path
    (newest / "model.safetensors").write_bytes(b"damaged")
    finished = train(run)
    assert finished.returncode == 0
    assert f"skipping a damaged checkpoint: {newest}/model.safetensors" in finished.stdout
    assert_same(expected, final_state(run))


def test_changed_keys_are_refused_announced_or_free(train, make_run):
    run = make_run(train={"min_train_tokens": 12 * 128})
    assert train(run).returncode == 0
    original = json.loads((run / "train.json").read_text())

    def with_change(*options, **change):
        (run / "train.json").write_text(json.dumps(original | change))
        return train(run, *options)

    assert "seed: 42 → 43" in complaint(with_change("--accept-changes", seed=43))
    assert "learning_rate: 0.01 → 0.02" in complaint(with_change(learning_rate=0.02))
    assert "learning_rate: 0.01 → 0.02" in with_change("--accept-changes", learning_rate=0.02).stdout
    assert with_change(keep_checkpoints=7).returncode == 0


def test_other_training_tokens_are_refused(train, make_run, token_folder):
    run = make_run()
    assert train(run).returncode == 0
    tokens = load_file(token_folder / "train.safetensors")["tokens"]
    tokens[3] = (tokens[3] + 1) % 101
    save_file({"tokens": tokens}, token_folder / "train.safetensors")
    assert "the train tokens differ from the checkpoint's" in complaint(train(run, "--from", "best"))


def test_rejected_updates_in_a_row_end_the_run_with_the_last_good_parameters(train, make_run):
    run = make_run(
        train={"learning_rate": 1e3, "clipping_max_norm": 1e30, "max_consecutive_rejections": 3}
        | {
            "min_train_tokens": 12 * 128,
            "epochs": 8,
            "warmup_period_percent": 0,
            "weight_decay": 1e30,
            "checkpoint_interval": 1,
        }
    )
    assert "3 updates in a row were rejected" in complaint(train(run), code=1)
    records = read(run / "metrics.jsonl")
    assert [record["rejected"] for record in records[-3:]] == [True] * 3
    assert {record["loss"] for record in records if record["rejected"]} == {None}
    newest = find_checkpoints(run / "checkpoints")[-1]
    verify(newest)
    assert all(np.isfinite(array).all() for array in load_file(newest.path / "model.safetensors").values())


def test_a_second_process_is_told_who_trains(train, make_run):
    run = make_run(train=LONG | {"epochs": 1000})
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", run], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not (run / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.05)
        assert f"is being trained by process {process.pid} on " in complaint(train(run))
    finally:
        process.kill()
        process.communicate()


def test_check_prints_the_preflight_and_nothing_else_happens(train, make_run):
    run = make_run()
    finished = train(run, "--check")
    assert finished.returncode == 0
    assert "12 steps" in finished.stdout
    assert {path.name for path in run.iterdir()} == {"model.json", "train.json"}


def test_check_knows_the_reference_run_without_its_data():
    finished = run_program("train.py", ROOT / "runs" / "gpt2-small", "--check")  # on one device
    assert finished.returncode == 0
    assert "163,009,536 parameters" in finished.stdout and "33,165 steps" in finished.stdout


def test_without_an_argument_the_runs_are_listed(train, make_run, tmp_path):
    (tmp_path / "runs").mkdir()
    done, _, broken = (make_run(f"runs/{name}") for name in ("done", "new", "broken"))
    assert train(done).returncode == 0
    (broken / "train.json").write_text("{")
    finished = run_program("train.py", cwd=tmp_path)
    lines = {line.split()[0]: line for line in finished.stdout.splitlines() if line.startswith("runs/")}
    assert finished.returncode == 0
    assert lines["runs/done"].endswith("finished") and lines["runs/new"].endswith("new")
    assert "not JSON" in lines["runs/broken"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"microbatch_size": 0}, "train.json: microbatch_size: expected"),
        ({"learning_rat": 1}, "did you mean 'learning_rate'?"),
        ({"dataset": "nowhere"}, "no folder 'nowhere'"),
        ({"dataset": "builtin/nothing"}, "no built-in data named"),
        ({"min_train_tokens": 10**6}, "expected at least"),
        ({"val_tokens": 3}, "validation batch"),
    ],
)
def test_a_wrong_config_is_one_line_and_exit_code_2(train, make_run, change, expected):
    assert expected in complaint(train(make_run(train=change)))


def test_a_run_folder_that_is_not_there_or_a_file_is_one_line(train, tmp_path):
    assert "found nothing" in complaint(train(tmp_path / "nothing"))
    (tmp_path / "file").write_text("")
    assert "got a file" in complaint(train(tmp_path / "file"))
