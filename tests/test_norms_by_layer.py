"""Norms of each layer: values against NumPy, on any mesh and in any number of calls, and nothing where they are off."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    CONTEXT_LENGTH,
    assert_same,
    final_state,
    on_step,
    random_tokens,
    send,
    tiny_model,
    tiny_train_config,
)

from outside_in import train_step as train_step_module
from outside_in.config import MeshConfig
from outside_in.data.loader import TokenStream, place_batch
from outside_in.norms_by_layer import NORMS, layer_of, norms_record, update_and_measure
from outside_in.optimizer import make_optimizer
from outside_in.runtime.mesh import make_mesh, place
from outside_in.storage.metrics import read
from outside_in.train_step import train_step
from outside_in.weights import host_arrays

KEY = jax.random.key(7)
LAYERS = ["blocks.0", "blocks.1", "head", "output_norm", "position_embedding", "token_embedding"]
SHAPE = {"n_layers": 2, "emb_dim": 64}  # some of its arrays are spread over fsdp


def build(mesh=None, **changes):
    config, model = tiny_train_config(**{"layer_norms_interval": 3} | changes), tiny_model(**SHAPE)
    optimizer = make_optimizer(model, config, total_steps=20)
    if mesh:
        place(model, mesh), place(optimizer, mesh)
    return config, model, optimizer


def stream(devices=1):
    shape = (4 // devices, 2 * devices, CONTEXT_LENGTH)
    return TokenStream(jax.device_put(random_tokens(2000)), shape, "next-token", 0, shuffle=True)


@nnx.jit
def gradient(model, inputs_BT, targets_BT):
    return nnx.grad(lambda model: model.loss(inputs_BT, targets_BT))(model)


def norms_of(arrays):
    squares = dict.fromkeys(LAYERS, 0.0)
    for name, array in arrays.items():
        [layer] = [layer for layer in LAYERS if name.startswith(f"{layer}.")]
        squares[layer] += float((np.asarray(array, np.float64) ** 2).sum())
    return {layer: np.sqrt(square) for layer, square in squares.items()}


@pytest.mark.parametrize(("per_call", "max_norm"), [(None, 0.01), (1, 0.01), (2, 3.5)])
def test_norms_are_those_of_numpy(per_call, max_norm):
    config, model, optimizer = build(microbatches_per_call=per_call, clipping_max_norm=max_norm)
    for step in range(3):
        [whole] = stream().calls(step)
        inputs, targets = (jnp.asarray(x).reshape(-1, CONTEXT_LENGTH) for x in (whole.inputs, whole.targets))
        grads = host_arrays(nnx.state(gradient(model, inputs, targets)))
        before = host_arrays(nnx.state(model, nnx.Param))
        for call in stream().calls(step, config.calls_per_step):
            report = train_step(model, optimizer, jax.device_put(call), KEY, config)
        after = host_arrays(nnx.state(model, nnx.Param))
        updates = {name: after[name].astype(np.float64) - before[name] for name in before}
        record = norms_record(model, jax.device_get(report.layer_norms))
        assert list(record) == [f"{what}/{layer}" for what in NORMS for layer in LAYERS]
        for what, arrays in zip(NORMS, (grads, updates, before)):
            for layer, norm in norms_of(arrays).items():
                assert record[f"{what}/{layer}"] == pytest.approx(norm, rel=1e-4), (what, layer)
        assert np.linalg.norm(report.layer_norms[0]) == pytest.approx(float(report.update.gradient_norm), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp", "per_call"), [(1, 2, None), (1, 2, 1), (2, 2, 1)])
def test_norms_do_not_depend_on_the_mesh(data, fsdp, per_call):
    found = []
    for mesh in (make_mesh(MeshConfig(data=1)), make_mesh(MeshConfig(data=data, fsdp=fsdp))):
        tokens = stream(mesh.devices.size)
        count = tokens.batch_shape[0]
        config, model, optimizer = build(mesh, gradient_accumulation_steps=count, microbatches_per_call=per_call)
        for step in range(2):
            for call in tokens.calls(step, config.calls_per_step):
                report = train_step(model, optimizer, place_batch(call, mesh), KEY, config, mesh)
        assert report.layer_norms.sharding.is_fully_replicated
        found.append(np.asarray(report.layer_norms))
    np.testing.assert_allclose(*found, rtol=2e-3)


def test_a_rejected_update_has_norm_zero_and_its_gradient_null():
    config, model, optimizer = build()
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    grads["blocks"][1]["feed_forward"]["expand"]["kernel"][...] *= jnp.nan
    grads["head"]["embedding"][...] *= 1e30  # finite, but the norm overflows
    step = nnx.jit(lambda model, optimizer, grads: update_and_measure(model, optimizer, grads, config))
    record = norms_record(model, np.asarray(step(model, optimizer, grads)))
    assert {record[f"update_norm/{layer}"] for layer in LAYERS} == {0.0}
    assert [layer for layer in LAYERS if record[f"gradient_norm/{layer}"] is None] == ["blocks.1", "head"]
    assert json.loads(json.dumps(record, allow_nan=False)) == record


@pytest.mark.parametrize("per_call", [None, 2])
def test_off_the_step_is_the_program_without_them(monkeypatch, per_call):
    def text(interval):
        config, model, optimizer = build(layer_norms_interval=interval, microbatches_per_call=per_call)
        call = jax.device_put(stream().calls(0, config.calls_per_step)[0])
        return train_step.lower(model, optimizer, call, KEY, config).as_text()

    off, on = text(None), text(3)
    assert on == text(7) != off
    monkeypatch.setattr(
        train_step_module,
        "update_and_measure",
        lambda model, optimizer, grads, config: optimizer.update(model, grads) and None,
    )
    jax.clear_caches()
    assert text(None) == off


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("blocks.0.attention.query_key_value.kernel", "blocks.0"),
        ("blocks.11.feed_forward.expand.bias", "blocks.11"),
        ("head.kernel", "head"),
        ("encoder.layers.3.experts.7.kernel", "encoder.layers.3"),
        ("gain", "gain"),
    ],
)
def test_the_layer_of_a_parameter(parameter, layer):
    assert layer_of(parameter) == layer


def norms_in(run):
    return {r["global_step"]: {name for name in r if "/" in name} for r in read(run / "metrics.jsonl")}


@pytest.mark.slow
@pytest.mark.parametrize("per_call", [None, 2])
def test_a_run_records_them_every_n_steps_and_resumes_bit_for_bit(call_program, make_run, per_call):
    train = {"layer_norms_interval": 3, "microbatches_per_call": per_call}
    whole, run = (make_run(name, {"n_layers": 2}, train) for name in ("whole", "run"))
    assert call_program("train", whole).returncode == 0
    with pytest.MonkeyPatch.context() as patched:
        on_step(patched, "training step", 5, lambda: send(signal.SIGINT))
        assert call_program("train", run).returncode == 130
    assert call_program("train", run).returncode == 0
    assert_same(final_state(run), final_state(whole))
    names = {f"{what}/{layer}" for what in NORMS for layer in LAYERS}
    assert norms_in(run) == {step: names if step % 3 == 0 else set() for step in range(1, 13)}


@pytest.mark.slow
def test_they_may_be_switched_on_when_a_run_resumes(call_program, make_run):
    run = make_run(train={"microbatches_per_call": 1})
    with pytest.MonkeyPatch.context() as patched:
        on_step(patched, "training step", 5 * 4, lambda: send(signal.SIGINT))
        assert call_program("train", run).returncode == 130
    config = json.loads((run / "train.json").read_text())
    (run / "train.json").write_text(json.dumps(config | {"layer_norms_interval": 2}))
    finished = call_program("train", run)
    assert finished.returncode == 0 and "since the checkpoint: layer_norms_interval: null → 2" in finished.stdout
    assert [step for step, names in norms_in(run).items() if names] == [6, 8, 10, 12]
