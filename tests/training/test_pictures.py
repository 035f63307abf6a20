"""A run's page over its life: what its head says, and which events it has."""

import json

import pytest
from helpers import on_step, send
from pages import HOSTILE

from checkpointing import find_checkpoints
from outside_in.storage import metrics
from outside_in.training import events, pictures

SIGINT = 2


def page_of(run):
    text = (run / "report.html").read_text()
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


def events_of(run):
    return [(step, text) for _, step, text in page_of(run)["tables"][0]["rows"]]


@pytest.fixture
def stopped(call_program, make_run, monkeypatch):
    """A run that a Ctrl-C stops before its 8th step."""
    run = make_run("run")
    with monkeypatch.context() as patch:
        on_step(patch, "training step", 8, lambda: send(SIGINT))
        assert call_program("train", run).returncode == 130
    return run


def test_a_page_says_that_its_run_is_finished_and_has_its_last_record(call_program, make_run):
    run = make_run("run")
    assert call_program("train", run).returncode == 0
    page = page_of(run)
    assert page["status"] == "finished: step 12 of 12" and page["reload_seconds"] is None
    last = metrics.read(run / "metrics.jsonl")[-1]
    tiles = {name: value for name, value, _ in page["tiles"]}
    assert (tiles["training loss"], tiles["validation loss"]) == (last["loss"], last["val_loss"])
    assert [row[0] for row in page["tables"][1]["rows"]] == [5, 10, 12]
    assert all(row[-2].endswith(" GB") for row in page["tables"][1]["rows"])


def test_a_page_says_where_its_run_was_stopped_and_how_it_went_on(call_program, stopped):
    page = page_of(stopped)
    step = page["status"].split()[2]
    assert page["status"] == f"stopped: step {step} of 12" and int(step) in (7, 8, 9) and page["reload_seconds"] is None
    config = json.loads((stopped / "train.json").read_text()) | {"learning_rate": 0.02, "sample_prompt": HOSTILE}
    (stopped / "train.json").write_text(json.dumps(config))
    assert call_program("train", stopped, "--accept-changes").returncode == 0
    (_, first), (resumed_at, text) = events_of(stopped)
    assert first.startswith("started on ") and resumed_at == int(step)
    assert text.startswith("resumed; learning_rate: 0.01 → 0.02; sample_prompt: ")
    assert [mark["step"] for mark in page_of(stopped)["marks"]] == [int(step)]
    metas = [checkpoint.meta for checkpoint in find_checkpoints(stopped / "checkpoints")]
    assert [len(meta["events"]) for meta in metas][-2:] == [2, 2]


def test_while_a_run_is_on_its_page_says_so(call_program, make_run, monkeypatch):
    run = make_run("run")
    seen = []
    on_step(monkeypatch, "training step", 3, lambda: seen.append(page_of(run)))
    call_program("train", run)
    assert seen[0]["status"].startswith("running: ") and seen[0]["reload_seconds"] > 0


def test_a_page_says_why_its_run_has_failed(call_program, make_run, monkeypatch):
    run = make_run("run")

    def fail():
        raise RuntimeError("first line\nsecond line")

    on_step(monkeypatch, "training step", 7, fail)
    assert call_program("train", run).returncode == 1
    assert page_of(run)["status"].startswith("failed (first line second line): step ")


def test_a_page_that_cannot_be_written_never_ends_training(call_program, make_run, monkeypatch):
    run = make_run("run")

    def fail(*_):
        raise ZeroDivisionError("no page")

    monkeypatch.setattr(pictures.page, "write", fail)
    finished = call_program("train", run)
    assert finished.returncode == 0 and "report.html cannot be written (no page)" in finished.stdout + finished.stderr
    assert not (run / "report.html").exists() and len(find_checkpoints(run / "checkpoints")) == 3


@pytest.mark.parametrize("kept", [None, {}, [1, {}, {"global_step": "1", "time": 1, "text": "x"}]])
def test_events_of_another_form_are_left_out(kept):
    snapshot = {part: {} for part in ("model_config", "train_config", "versions", "data")}
    [event] = events.resumed(snapshot | {"global_step": 3, "events": kept}, snapshot)
    assert (event["global_step"], event["text"]) == (3, "resumed")


def test_events_stay_few_and_short():
    snapshot = {part: {} for part in ("model_config", "train_config", "versions", "data")}
    meta = snapshot | {"global_step": 1, "train_config": {f"key {i}": "é" * 1000 for i in range(50)}}
    for step in range(2 * events.MAX_EVENTS):
        meta |= {"global_step": step}
        new = snapshot | {"train_config": {f"key {i}": "è" * 1000 for i in range(50)}}
        meta["events"] = events.resumed(meta, new)
    assert len(json.dumps(meta["events"])) < 400_000 and meta["events"][-1]["global_step"] == step
