import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import complaint, tiny_model_config

from outside_in.config import TrainConfig
from outside_in.data.loader import open_streams
from outside_in.diagnostics import overfit

SMALL = {
    "microbatch_size": 2,
    "gradient_accumulation_steps": 2,
    "min_train_tokens": 64,
    "drop_rate": 0.5,
    "val_tokens": 0,
}


@pytest.mark.parametrize("per_call", [None, 1])
def test_a_model_that_can_learn_gets_there_and_the_run_is_left_alone(call_program, make_run, per_call):
    run = make_run(train=SMALL | {"microbatches_per_call": per_call})
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    finished = call_program("train", run, "--overfit-one-batch")
    assert finished.returncode == 0, finished.stderr
    assert "passed: loss 0.0" in finished.stdout
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_model_that_cannot_does_not(call_program, make_run, monkeypatch):
    monkeypatch.setattr(overfit, "MAX_STEPS", 30)
    run = make_run(model={"n_layers": 0}, train=SMALL)
    line = complaint(call_program("train", run, "--overfit-one-batch"), code=1)
    assert "failed: loss " in line and "after 29 updates" in line


def test_it_is_the_first_microbatch_of_the_run(make_run, monkeypatch):
    config = TrainConfig(**json.loads((make_run() / "train.json").read_text()))
    stream, _ = open_streams(Path(config.dataset), tiny_model_config(), config, 12)
    taken = []
    monkeypatch.setattr(overfit, "MAX_STEPS", 1)
    monkeypatch.setattr(
        overfit,
        "compile_train_step",
        lambda _1, _2, batch, *_: taken.append(batch) or (lambda *_: SimpleNamespace(loss=9.0)),
    )
    assert list(overfit.overfit(tiny_model_config(), config, 12)) == [9.0]
    for part, whole in zip(taken[0][:2], stream.batch(0)):
        np.testing.assert_array_equal(part, whole[:1])


@pytest.mark.parametrize(("losses", "steps"), [([3.0, 0.04, 1.0], 2), ([3.0, float("nan"), 1.0], 2), ([3.0] * 9, 9)])
def test_it_ends_when_it_got_there_or_never_will(make_run, monkeypatch, losses, steps):
    config = TrainConfig(**json.loads((make_run() / "train.json").read_text()))
    rest = iter(losses)
    monkeypatch.setattr(overfit, "MAX_STEPS", 9)
    monkeypatch.setattr(overfit, "compile_train_step", lambda *_: lambda *_: SimpleNamespace(loss=next(rest)))
    assert len(list(overfit.overfit(tiny_model_config(), config, 12))) == steps
