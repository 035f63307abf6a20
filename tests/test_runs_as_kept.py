"""Runs as people keep them: copied, moved, without links, with strays, gone back, and made longer."""

import json
import os
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, assert_same, captured_log, complaint, final_state, on_step, run_program, send
from safetensors.numpy import load_file, save_file

from checkpointing import HostCopy, find_checkpoints, prune, save
from outside_in.config import ModelConfig, TrainConfig
from outside_in.config_files import load_config
from outside_in.data.loader import open_streams
from outside_in.data.run_length import spare_sequences
from outside_in.inference.load import find_weights
from outside_in.storage import metrics
from outside_in.storage.checkpoint_folder import beats, find_best, history
from outside_in.storage.run_directory import RunDirectory, find_runs

pytestmark = pytest.mark.slow


def follow_links(run, copy):
    shutil.copytree(run, copy, symlinks=False)  # as scp -r and cp -rL do


def leave_links_out(run, copy):
    shutil.copytree(run, copy, symlinks=True)
    for name in ("latest", "best"):
        (copy / "checkpoints" / name).unlink()


def make_links_files(run, copy):
    shutil.copytree(run, copy, symlinks=True)
    for name in ("latest", "best"):  # as a zip has them
        target = (copy / "checkpoints" / name).readlink()
        (copy / "checkpoints" / name).unlink()
        (copy / "checkpoints" / name).write_text(str(target))


def add_strays(run, copy):
    shutil.copytree(run, copy, symlinks=True)
    for folder in [copy, *(path for path in copy.rglob("*") if path.is_dir() and not path.is_symlink())]:
        (folder / ".DS_Store").write_bytes(b"\0\1")


COPIES = [follow_links, leave_links_out, make_links_files, add_strays]


@pytest.fixture
def new_run(make_run):
    names = iter("abc")
    return lambda **train: make_run(next(names), train=train)


@pytest.fixture
def trained(call_program, new_run):
    run = new_run(keep_checkpoints=2)
    assert call_program("train", run).returncode == 0
    return run


@pytest.fixture(params=COPIES, ids=lambda copy: copy.__name__)
def copied(request, trained, tmp_path):
    request.param(trained, tmp_path / "copy" / "run")
    return tmp_path / "copy" / "run"


def edit(run, **changes):
    path = run / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_copied_run_is_finished_and_its_links_are_links_again(call_program, copied):
    finished = call_program("train", copied)
    assert finished.returncode == 0 and "is finished" in finished.stdout
    assert (copied / "checkpoints" / "latest").is_symlink() and (copied / "checkpoints" / "best").is_symlink()
    assert len(find_checkpoints(copied / "checkpoints")) <= 3


@pytest.mark.parametrize("copy", COPIES, ids=lambda copy: copy.__name__)
def test_a_copied_run_that_was_stopped_is_resumed_and_pruned(call_program, new_run, tmp_path, monkeypatch, copy):
    run, alone = (new_run(keep_checkpoints=1, checkpoint_interval=4) for _ in range(2))
    with monkeypatch.context() as patched:
        on_step(patched, "training step", 7, lambda: send(signal.SIGTERM))
        assert call_program("train", run).returncode == 143
    copy(run, tmp_path / "copy")
    assert call_program("train", tmp_path / "copy").returncode == call_program("train", alone).returncode == 0
    assert_same(final_state(tmp_path / "copy"), final_state(alone))
    assert len(find_checkpoints(tmp_path / "copy" / "checkpoints")) <= 2


def test_a_read_only_folder_of_checkpoints_is_told_at_the_start(call_program, trained, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != trained / "checkpoints" and access(path, mode))
    told = complaint(call_program("train", trained))
    assert told == f"error: {trained / 'checkpoints'}: cannot write here; make the folder writable"


def test_a_copied_run_is_judged_shown_and_compared(call_program, trained, copied):
    best = find_best(find_checkpoints(trained / "checkpoints"))
    assert find_weights(copied).parent.name == best.path.name
    assert find_weights(copied / "checkpoints" / "best").stat().st_size > 0
    assert call_program("inspect_checkpoint", copied).returncode == 0
    assert call_program("evaluate", copied).returncode == 0
    assert "run" in call_program("compare_runs", trained, copied, "--output", copied / "c.png").stdout
    assert call_program("convert_gpt2", "export", copied, copied.parent / "out").returncode == 0


@pytest.mark.parametrize("which", ["best", "latest"])
def test_a_copied_run_goes_back(call_program, copied, which):
    assert call_program("train", copied, "--from", which).returncode == 0


def test_without_links_on_the_disk_a_run_trains_prunes_and_resumes(call_program, new_run, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    run = new_run(keep_checkpoints=1)
    finished = call_program("train", run)
    assert finished.returncode == 0 and "failed" not in finished.stdout
    assert len(find_checkpoints(run / "checkpoints")) <= 2 and (run / "loss-chart.png").exists()
    assert call_program("train", run, "--from", "best").returncode == 0
    assert find_weights(run).exists()


def test_a_folder_that_is_no_copy_stays_where_a_link_would_be(call_program, trained):
    link = trained / "checkpoints" / "latest"
    link.unlink()
    link.mkdir()
    (link / "mine.txt").write_text("mine")
    assert call_program("train", trained).returncode == 0
    assert (link / "mine.txt").read_text() == "mine"


# Going back


def test_whoever_goes_back_leaves_what_came_after(call_program, new_run):
    run = new_run(keep_checkpoints=None)
    call_program("train", run)
    checkpoints = find_checkpoints(run / "checkpoints")
    assert [c.global_step for c in checkpoints] == [5, 10, 12]
    edit(run, learning_rate=1e-5)
    call_program("train", run, "--from", checkpoints[0].path.name, "--accept-changes")
    now = find_checkpoints(run / "checkpoints")
    assert [c.global_step for c in now] == [5, 10, 12, 5, 10, 12]
    assert [c.global_step for c in history(now)] == [5, 10, 12] and history(now) == now[3:]
    best = find_best(now)
    assert best in now[3:]
    losses = {r["global_step"]: r["val_loss"] for r in metrics.read(run / "metrics.jsonl") if r.get("val_loss")}
    assert best.meta["val_loss"] == min(losses.values())
    assert (run / "checkpoints" / "best").readlink() == Path(best.path.name)


def test_nothing_better_than_the_best_is_removed_without_a_word(tmp_path):
    losses = [(5, 3.7, True), (10, 3.1, True), (15, 3.2, False), (5, 3.7, True), (10, 3.5, True)]
    for step, loss, is_best in losses:  # the fourth is the first once more
        meta = {"global_step": step, "val_loss": loss, "is_best": is_best}
        save(tmp_path, HostCopy({"x": np.zeros(1)}, {"y": np.zeros(1)}), meta, "{}")
    checkpoints = find_checkpoints(tmp_path)
    assert [c.meta["val_loss"] for c in history(checkpoints)] == [3.7, 3.5]
    assert find_best(checkpoints) == checkpoints[-1]
    with captured_log() as messages:
        prune(tmp_path, 1)
    said = f"removing {checkpoints[1].path.name}, which this run has left: its loss, 3.1000, is lower than 3.5000"
    assert [message for message in messages if said in message]
    assert len(messages) == 2  # and one for 3.2


@pytest.mark.parametrize(
    ("measure", "data", "expected"),
    [
        ("val_loss", {"train": "more tokens", "validation": "b", "revision": None}, False),
        ("val_loss", {"train": "a", "validation": "others", "revision": "c"}, True),
        ("avg_train_loss", {"train": "a", "validation": None, "revision": "d"}, False),
        ("avg_train_loss", {"train": "others", "validation": None, "revision": "c"}, True),
    ],
)
def test_the_best_one_is_beaten_on_the_tokens_that_it_was_judged_on(tmp_path, measure, data, expected):
    judged_on = {"train": "a", "validation": "b", "revision": "c"}
    meta = {"global_step": 5, measure: 3.0, "is_best": True, "data": judged_on}
    save(tmp_path, HostCopy({"x": np.zeros(1)}, {"y": np.zeros(1)}), meta, "{}")
    checkpoints = find_checkpoints(tmp_path)
    assert beats({"global_step": 10, measure: 3.5, "data": data}, measure, checkpoints) is expected
    assert beats({"global_step": 10, measure: 2.5, "data": data}, measure, checkpoints)


def test_what_was_saved_between_milestones_goes_without_a_word(tmp_path):
    for step, is_milestone in [(5, True), (7, False), (10, True), (15, True)]:
        loss = {"val_loss": 4.0 - step / 100} if is_milestone else {"val_loss": None, "avg_train_loss": 1.0}
        meta = {"global_step": step, "is_best": is_milestone, "is_milestone": is_milestone} | loss
        save(tmp_path, HostCopy({"x": np.zeros(1)}, {"y": np.zeros(1)}), meta, "{}")
    with captured_log() as messages:
        prune(tmp_path, 1)
    assert not messages and [c.global_step for c in find_checkpoints(tmp_path)] == [15]


# Longer runs, other paths


def tokens_of(run):
    return [(r["global_step"], r["data_crc32"]) for r in metrics.read(run / "metrics.jsonl")]


@pytest.mark.parametrize("stop_at", [12, 5])
def test_a_run_of_more_epochs_is_the_same_run(call_program, new_run, stop_at):
    short, long = new_run(), new_run(epochs=2)
    call_program("train", short)
    call_program("train", long)
    which = [c.path.name for c in find_checkpoints(short / "checkpoints") if c.global_step == stop_at]
    edit(short, epochs=2)
    refused = call_program("train", short, "--from", *which)
    assert "epochs: 1 → 2: undo it, or resume with --accept-changes" in complaint(refused)
    longer = call_program("train", short, "--from", *which, "--accept-changes")
    assert longer.returncode == 0
    assert f"the run has 24 steps now, not 12; by its schedule, the learning rate after step {stop_at}" in longer.stdout
    assert tokens_of(short) == tokens_of(long)


def test_epochs_of_all_tokens_leave_out_other_sequences_each_time_and_resume(call_program, new_run):
    run = new_run(min_train_tokens=-1, epochs=3, checkpoint_interval=10)  # 2,000 tokens: 15 steps and 4 sequences
    call_program("train", run)
    whole = tokens_of(run)
    assert len(whole) == 45
    [middle] = [c.path.name for c in find_checkpoints(run / "checkpoints") if c.global_step == 30]
    assert call_program("train", run, "--from", middle).returncode == 0
    assert tokens_of(run) == whole
    model, train = (
        load_config(run / f"{name}.json", kind) for name, kind in (("model", ModelConfig), ("train", TrainConfig))
    )
    spare = spare_sequences(model, train, 15)
    stream, _ = open_streams(run.parent / "tokens", model, train, 15, spare=spare)
    drawn = [set(np.stack([stream.positions(15 * epoch + step) for step in range(15)]).flat) for epoch in range(3)]
    assert drawn[0] == set(range(0, 1920, 16)) != drawn[1] != drawn[2]
    assert crcs(stream) == [crc for _, crc in whole]


def crcs(stream):
    return [zlib.crc32(stream.batch(i)[1].tobytes(), zlib.crc32(stream.batch(i)[0].tobytes())) for i in range(45)]


def test_more_tokens_come_after_those_of_before_and_none_comes_twice(call_program, new_run):
    run = new_run(min_train_tokens=12 * 128, checkpoint_interval=4)
    call_program("train", run)
    before = tokens_of(run)
    edit(run, min_train_tokens=15 * 128)
    assert call_program("train", run, "--accept-changes").returncode == 0
    after = tokens_of(run)
    assert after[:12] == before and len(after) == 15
    edit(run, min_train_tokens=14 * 128)
    told = complaint(call_program("train", run, "--accept-changes"))
    assert "the run would end at step 14, but it is at step 15" in told
    assert complaint(call_program("train", run, "min_train_tokens=1792", "--check")) == told
    again = new_run(min_train_tokens=12 * 128, checkpoint_interval=4)
    call_program("train", again)
    edit(again, min_train_tokens=15 * 128)
    call_program("train", again, "--accept-changes")
    assert tokens_of(again) == after
    assert final_state(again)["step"] == 15


def test_the_same_data_under_another_path_are_the_same(call_program, new_run, tmp_path):
    run = new_run()
    call_program("train", run)
    newest = find_checkpoints(run / "checkpoints")[0].path.name
    data = Path(json.loads((run / "train.json").read_text())["dataset"])
    shutil.copytree(data, tmp_path / "moved")
    edit(run, dataset=str(tmp_path / "moved"))
    finished = call_program("train", run, "--from", newest)
    assert finished.returncode == 0 and "dataset: " in finished.stdout


def test_runs_are_compared_by_what_they_were_validated_on(call_program, new_run, tmp_path):
    one, two, other = new_run(), new_run(), new_run(val_tokens=32)
    data = Path(json.loads((one / "train.json").read_text())["dataset"])
    shutil.copytree(data, tmp_path / "moved")
    edit(two, dataset=str(tmp_path / "moved"))
    for run in (one, two, other):
        call_program("train", run)
    rows = call_program("compare_runs", one, two, other, "--output", tmp_path / "c.png").stdout.splitlines()[2:5]
    assert [r"\*" in row for row in rows] == [False, False, True]
    tokens = load_file(tmp_path / "moved" / "validation.safetensors")["tokens"]
    save_file({"tokens": tokens[::-1].copy()}, tmp_path / "moved" / "validation.safetensors")
    judged = call_program("evaluate", two)
    assert f"holds other tokens than {two} was validated on" in judged.stdout and judged.returncode == 0
    assert "other tokens" not in call_program("evaluate", one).stdout


# Links to runs, names


def test_runs_that_are_links_are_found_once(tmp_path, new_run):
    run = new_run()
    folder = tmp_path / "runs"
    (folder / "inner").mkdir(parents=True)
    (folder / "big").symlink_to(run)
    (folder / "inner" / "loop").symlink_to(folder)
    assert find_runs(folder) == [RunDirectory(folder / "big")]


def test_a_misspelt_run_is_suggested(call_program):
    told = complaint(call_program("train", ROOT / "runs" / "quikstart"))
    assert f"did you mean {ROOT / 'runs' / 'quickstart'}?" in told


@pytest.mark.parametrize("name", ["x$^$", "a | b", "_hidden", "50% {x} [y]", "~a*b"])
def test_odd_names_are_shown_as_they_are(call_program, new_run, tmp_path, name):
    run = new_run().rename(tmp_path / name)
    finished = call_program("train", run)
    assert finished.returncode == 0 and "failed" not in finished.stdout
    assert (run / "loss-chart.png").stat().st_size > 5000
    told = call_program("compare_runs", run, "--output", tmp_path / "c.png").stdout
    assert f"| {name.replace('|', chr(92) + '|')} |" in told


# The environment


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_that_is_not_utf8_loses_characters_and_nothing_else(new_run, encoding):
    run = new_run(sample_prompt="naïve → · 猫")
    finished = run_program("train.py", run, encoding=encoding, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert finished.returncode == 0, finished.stderr
    assert "finished" in finished.stdout


def test_closed_streams_do_not_stop_training(new_run):
    run = new_run()
    command = f"exec {os.sys.executable} {ROOT / 'train.py'} {run} >&- 2>&-"
    assert os.system(f"bash -c '{command}'") == 0
    assert find_checkpoints(run / "checkpoints")[-1].global_step == 12


@pytest.mark.parametrize(
    ("variable", "value"), [("JAX_ENABLE_X64", "1"), ("JAX_DISABLE_JIT", "1"), ("JAX_PLATFORMS", "nonesuch")]
)
def test_an_environment_that_changes_what_jax_computes_is_one_line(new_run, variable, value):
    assert variable in complaint(run_program("train.py", new_run(), env=os.environ | {variable: value}))


@pytest.mark.parametrize("key", ["checkpoint_interval", "keep_checkpoints", "loss_rows_per_chunk"])
@pytest.mark.parametrize(("given", "is_taken"), [(1e3, True), (1.5, False)])
def test_a_whole_number_may_be_written_as_1e3(call_program, new_run, key, given, is_taken):
    run = new_run()
    edit(run, **{key: given})
    assert (call_program("train", run, "--check").returncode == 0) == is_taken
