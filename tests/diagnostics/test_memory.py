"""Does it fit? A faked small device."""

import math
import re

import pytest
from helpers import complaint, tiny_model_config, tiny_train_config

from outside_in.diagnostics import memory
from outside_in.training import setup

pytestmark = pytest.mark.slow

SHAPE = {"microbatch_size": 8, "gradient_accumulation_steps": 2, "min_train_tokens": 256 * 3, "val_tokens": 0}


@pytest.fixture(scope="module")
def needs():
    """What each microbatch size of 16 sequences a step needs."""
    config = tiny_train_config(**SHAPE)
    return {
        size: memory.bytes_needed(tiny_model_config(), memory.with_microbatch(config, size))
        for size in (1, 2, 4, 8, 16)
    }


@pytest.fixture
def device_of(monkeypatch):
    return lambda size: monkeypatch.setattr(memory, "bytes_available", lambda: size)


def test_a_larger_microbatch_needs_more(needs):
    assert list(needs.values()) == sorted(set(needs.values()))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_the_largest_that_fits_is_found_at_the_same_tokens_per_step(needs, device_of, size):
    device_of(needs[size])
    found, tried = memory.largest_microbatch(tiny_model_config(), tiny_train_config(**SHAPE))
    assert (found.microbatch_size, found.gradient_accumulation_steps) == (size, 16 // size)
    assert tried.items() <= needs.items()


def test_calls_still_divide_the_microbatches():
    config = tiny_train_config(microbatch_size=4, gradient_accumulation_steps=6, microbatches_per_call=3)
    assert memory.with_microbatch(config, 6).microbatches_per_call == 1
    assert memory.with_microbatch(config, 2).microbatches_per_call == 3
    assert memory.with_microbatch(tiny_train_config(), 1).microbatches_per_call is None


def test_a_run_that_does_not_fit_says_what_would(call_program, make_run, device_of, needs):
    device_of(needs[2] + 1)
    run = make_run(train=SHAPE)
    line = complaint(call_program("train", run))
    assert re.search(
        r"out of memory: a step needs \S+ GiB, the device has \S+ GiB; the largest that fits, at the same tokens per "
        r'step, is "microbatch_size": 2, "gradient_accumulation_steps": 8$',
        line,
    )
    assert not (run / "checkpoints").exists() and not (run / "metrics.jsonl").exists()


def test_a_run_for_which_there_is_no_room_at_all(call_program, make_run, device_of):
    device_of(1000)
    assert "not even microbatch_size 1 fits" in complaint(call_program("train", make_run(train=SHAPE)))
    assert "not even microbatch_size 1 fits" in complaint(
        call_program("train", make_run("other", train=SHAPE), "--find-microbatch")
    )


def test_memory_that_runs_out_while_training_is_the_same_line(call_program, make_run, monkeypatch, needs, device_of):
    def create(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.")

    monkeypatch.setattr(setup, "model_of", create)
    device_of(needs[4])
    assert 'is "microbatch_size": 4, "grad' in complaint(call_program("train", make_run(train=SHAPE)))
    device_of(needs[8])
    line = complaint(call_program("train", make_run("other", train=SHAPE)))
    assert "which fits; is another program using it? XLA's message: " in line and "allocating 12345 bytes" in line


def test_compiling_that_runs_out_of_memory_means_too_large(monkeypatch, needs, device_of):
    compile_step = memory.compile_train_step

    def out_of_memory(model, optimizer, batch, *rest):
        if batch.inputs.shape[1] > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: autotuning")
        return compile_step(model, optimizer, batch, *rest)

    device_of(10**9)
    monkeypatch.setattr(memory, "compile_train_step", out_of_memory)
    found, tried = memory.largest_microbatch(tiny_model_config(), tiny_train_config(**SHAPE))
    assert found.microbatch_size == 2
    assert tried == {16: math.inf, 8: math.inf, 4: math.inf, 2: needs[2]}
    assert memory.gib(math.inf) == "an unknown amount"


def test_what_to_write_holds_the_calls_where_they_were_chosen():
    config = tiny_train_config(microbatch_size=4, gradient_accumulation_steps=6, microbatches_per_call=3)
    expected = '"microbatch_size": 6, "gradient_accumulation_steps": 4, "microbatches_per_call": 1'
    assert memory.as_json(memory.with_microbatch(config, 6)) == expected


def test_find_microbatch_prints_what_to_write_and_leaves_the_run_alone(call_program, make_run, device_of, needs):
    device_of(needs[4])
    run = make_run(train=SHAPE)
    before = {path.name for path in run.iterdir()}
    finished = call_program("train", run, "--find-microbatch")
    assert finished.returncode == 0
    expected = '256 tokens a step: "microbatch_size": 4, "gradient_accumulation_steps": 4'
    assert finished.stdout.splitlines()[-1] == expected
    assert re.search(r"^microbatch_size 16: \d+\.\d\d GiB of ", finished.stdout, re.M)
    assert {path.name for path in run.iterdir()} <= before | {".lock"}


def test_larger_steps_are_tried_where_a_whole_step_fits(device_of, needs):
    shape = SHAPE | {"microbatch_size": 64, "gradient_accumulation_steps": 1}
    device_of(memory.bytes_needed(tiny_model_config(), tiny_train_config(**shape)))
    lines = memory.report(tiny_model_config(), tiny_train_config(**SHAPE))
    assert [line.partition(":")[0] for line in lines] == [
        "microbatch_size 16",
        "microbatch_size 32",
        "microbatch_size 64",
        "microbatch_size 128",
        "256 tokens a step",
        "1,024 tokens a step",
    ]
    assert lines[-1].endswith('"microbatch_size": 64, "gradient_accumulation_steps": 1')


def test_a_run_that_fits_says_what_it_needs(call_program, make_run):
    assert re.search(
        r"memory  the compiled step needs 0\.00 GiB of the device's [\d.]+", call_program("train", make_run()).stdout
    )
