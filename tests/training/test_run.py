"""A run from its start to its end and back: the one training run among the quick tests."""

from functools import partial

import pytest
from helpers import assert_same, complaint, final_state

from checkpointing import find_checkpoints


@pytest.fixture
def train(call_program):
    return partial(call_program, "train")


def test_from_goes_back_to_a_checkpoint_and_stays_there(train, make_run):
    run = make_run()
    assert train(run).returncode == 0
    expected = final_state(run)
    first = find_checkpoints(run / "checkpoints")[0].path.name
    finished = train(run, "--from", first)
    assert finished.returncode == 0 and "resuming from step 5 of 12" in finished.stdout
    assert_same(expected, final_state(run))
    assert "no checkpoint 'nonsense'" in complaint(train(run, "--from", "nonsense"))
