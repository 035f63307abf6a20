import pytest
from conftest import complaint

import overfitting

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
    assert "got there: loss 0.0" in finished.stdout
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_model_that_cannot_does_not(call_program, make_run, monkeypatch):
    monkeypatch.setattr(overfitting, "MOST_STEPS", 30)
    run = make_run(model={"n_layers": 0}, train=SMALL)
    line = complaint(call_program("train", run, "--overfit-one-batch"), code=1)
    assert "did not get there: loss " in line and "after 29 updates" in line
