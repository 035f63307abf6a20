import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from flax import nnx
from helpers import tiny_model_config, tiny_train_config

from model import GPTModel
from outside_in.config import ModelConfig, TrainConfig
from outside_in.data.run_length import KnownData
from outside_in.diagnostics.preflight import describe, estimate_memory
from outside_in.optimizer import make_optimizer
from outside_in.storage.run_directory import RunDirectory

REFERENCE_MODEL = ModelConfig(
    vocab_size=50257, context_length=1024, emb_dim=768, n_heads=12, n_layers=12, qkv_bias=False
)
SHELL = REFERENCE_MODEL.model_copy(update={"n_layers": 0})  # as wide, but quick to count
SHELL_PARAMETERS = (2 * 50257 + 1024 + 2) * 768
REFERENCE_TRAIN = {
    "dataset": "gpjt/fineweb-gpt2-tokens",
    "microbatch_size": 6,
    "gradient_accumulation_steps": 16,
    "min_train_tokens": 3260190720,
    "learning_rate": 0.0014,
}
GIB = 2**30


def reference_train(**changes):
    return TrainConfig(**REFERENCE_TRAIN | changes)


def line_of(subject, lines):
    [line] = [line for line in lines if line.startswith(subject)]
    return line


def set_free_disk(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2 * free, used=free, free=free))


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path)


def test_the_reference_run_is_described_in_its_published_numbers(run):
    lines = describe(run, REFERENCE_MODEL, reference_train())
    assert "163,009,536 parameters" in line_of("model", lines)
    assert "98,304 tokens" in line_of("step", lines)
    assert re.search(r"\b33,165 steps, 3,260,252,160 tokens .*, 20 tokens per parameter", line_of("run", lines))
    assert "854.4 MFLOP per token: 6 · (parameters of matrix products)" in line_of("flops", lines)
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize(("decay_on", "decaying"), [("all", 163_009_536), ("matrices", 162_915_840)])
def test_it_says_how_many_parameters_decay(run, decay_on, decaying):
    line = line_of("decay", describe(run, REFERENCE_MODEL, reference_train(weight_decay_on=decay_on)))
    assert line == f"decay   0.01 on {decaying:,} of 163,009,536 parameters"


@pytest.mark.parametrize(
    ("changes", "corners"),
    [
        ({}, "0 → 0.0006 in 100 steps, cosine to 6e-05 at step 2,000"),
        ({"schedule": "linear"}, "0 → 0.0006 in 100 steps, linear to 6e-05 at step 2,000"),
        ({"schedule": "constant"}, "0 → 0.0006 in 100 steps, constant to step 2,000"),
        ({"schedule": "wsd"}, "0 → 0.0006 in 100 steps, constant to step 1,600, linear to 6e-05 at step 2,000"),
        (
            {"schedule": "wsd", "warmup_period_percent": 0, "decay_percent": 100, "final_learning_rate_percent": 0},
            "0.0006 from the first step, linear to 0 at step 2,000",
        ),
        ({"warmup_tokens": 1}, "0 → 0.0006 in 1 step, cosine to 6e-05 at step 2,000"),
    ],
)
def test_the_corner_points_of_the_learning_rate_are_told(run, changes, corners):
    config = reference_train(learning_rate=6e-4, min_train_tokens=2_000 * 98_304, **changes)
    assert line_of("rate", describe(run, SHELL, config)) == f"rate    learning rate {corners}"


def test_a_warmup_longer_than_the_run_is_refused(run):
    with pytest.raises(ValueError, match="a run of 10 steps is too short for a warmup of 11"):
        describe(run, SHELL, reference_train(min_train_tokens=10 * 98_304, warmup_tokens=10 * 98_304 + 1))


def test_epochs_multiply_steps_and_tokens(run):
    lines = describe(run, SHELL, reference_train(epochs=2))
    assert "66,330 steps, 6,520,504,320 tokens" in line_of("run", lines)


@pytest.mark.parametrize(("available", "steps"), [(None, None), (10 * 98_304, 9), (10 * 98_304 + 1, 10)])
def test_a_run_over_all_tokens_takes_its_length_from_the_data_once_they_are_here(run, available, steps):
    line = line_of("run", describe(run, SHELL, reference_train(min_train_tokens=-1), KnownData(tokens=available)))
    assert ("not here yet" in line) == (steps is None)
    assert ("steps" in line) == (steps is not None)
    assert steps is None or f" {steps} steps" in line


@pytest.mark.parametrize("microbatches_per_call", [None, 1])
def test_a_checkpoint_is_as_large_as_parameters_and_optimizer_state(run, monkeypatch, microbatches_per_call):
    set_free_disk(monkeypatch, 100 * GIB)
    config = reference_train(microbatches_per_call=microbatches_per_call)

    def saved_state():
        model = GPTModel(SHELL, nnx.Rngs(0))
        return nnx.state(model, nnx.Param), nnx.state(make_optimizer(model, config, 10))

    leaves = jax.tree.leaves(nnx.eval_shape(saved_state))
    gib = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / GIB
    line = line_of("disk", describe(run, SHELL, config))
    assert f" {gib:.2f} GiB a checkpoint, at most {5 * gib:.2f} GiB; 100.0 GiB free" in line


@pytest.mark.parametrize(("keep", "free_gib", "warns"), [(3, 4, True), (3, 5, False), (8, 5, True), (None, 1, False)])
def test_a_disk_that_is_too_small_for_the_checkpoints_is_a_warning(run, monkeypatch, keep, free_gib, warns):
    set_free_disk(monkeypatch, free_gib * GIB)
    line = line_of("disk", describe(run, SHELL, reference_train(keep_checkpoints=keep)))
    assert ("WARNING" in line) == warns
    assert f"{free_gib}.0 GiB free" in line


def test_memory_holds_at_least_parameters_moments_and_gradient():
    def gib(config):
        two_layers = SHELL.model_copy(update={"n_layers": 2})
        return float(re.search(r"memory  about ([\d.]+) GiB", estimate_memory(two_layers, config))[1])

    assert gib(reference_train(precision="float32")) > gib(reference_train(precision="bfloat16"))
    assert gib(reference_train(remat="blocks")) < gib(reference_train())
    assert gib(reference_train(loss_rows_per_chunk=1)) < gib(reference_train())
    assert gib(reference_train()) > 4 * 4 * SHELL_PARAMETERS / GIB
    assert gib(reference_train()) < gib(reference_train(microbatch_size=12))
    assert gib(reference_train()) < gib(reference_train(microbatches_per_call=2))  # an accumulator of MultiSteps


def test_validation_that_is_trained_on_is_told_where_it_is_known(run):
    lines = describe(run, SHELL, reference_train(), KnownData(leaked_share=0.1234))
    assert line_of("data", lines) == "data    12.3% of validation occurs in the training tokens, according to data.json"
    assert not [line for line in describe(run, SHELL, reference_train()) if line.startswith("data")]


def test_warnings_about_the_model_come_last(run):
    lines = describe(run, tiny_model_config(emb_dim=36), tiny_train_config())
    assert lines[-1].startswith("WARNING ") and "head width 9" in lines[-1]
    assert not [line for line in describe(run, tiny_model_config(), tiny_train_config()) if "WARNING h" in line]


def test_nothing_is_fetched_written_or_put_on_a_device(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a preflight stays at home")

    jax.local_devices()  # JAX reads files when it starts
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(jax, "device_put", refuse)
    before = {id(array) for array in jax.live_arrays()}
    describe(run, SHELL, reference_train(min_train_tokens=-1))
    added = [array for array in jax.live_arrays() if id(array) not in before]
    assert sum(array.size for array in added) < 100
    assert list(run.path.iterdir()) == []
