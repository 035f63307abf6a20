import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import CONTEXT_LENGTH, VOCAB_SIZE, logits, random_tokens, tiny_model, tiny_model_config, tiny_train_config

from model import create_model
from outside_in.data.loader import TokenStream
from outside_in.loss import cross_entropy
from outside_in.optimizer import make_optimizer
from outside_in.runtime.mesh import one_device, place
from outside_in.train_step import (
    NORM_SCALE,
    backward_order,
    compile_train_step,
    eval_step,
    gradient_diagnostics,
    mean_gradient,
    train_step,
)
from outside_in.weights import named_arrays

K, B = 4, 2
SEED_KEY = jax.random.key(7)


def stream(microbatches=K, sequences=B, objective="next-token"):
    return TokenStream(
        jax.device_put(random_tokens(2000)), (microbatches, sequences, CONTEXT_LENGTH), objective, 0, shuffle=False
    )


def trained(per_call, num_steps=5, drop_rate=0.0, model=None):
    """Train a tiny model; returns its parameters by name and the losses of its global steps."""
    config = tiny_train_config(microbatches_per_call=per_call, gradient_accumulation_steps=K)
    model = model or tiny_model(drop_rate=drop_rate)
    optimizer = make_optimizer(model, config, total_steps=20)
    losses = []
    for step in range(num_steps):
        calls = stream().calls(step, config.calls_per_step)
        losses.append(np.mean([train_step(model, optimizer, call, SEED_KEY, config).loss for call in calls]))
    return parameters(model), losses


def parameters(model):
    return {path: np.array(value[...]) for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def test_accumulating_k_microbatches_is_one_batch_k_times_as_large():
    model = tiny_model()
    [small], [large] = stream(K, B).calls(3), stream(1, K * B).calls(3)
    gradient = nnx.jit(mean_gradient)
    chex.assert_trees_all_close(
        gradient(model, small, SEED_KEY)[:2], gradient(model, large, SEED_KEY)[:2], rtol=1e-4, atol=1e-7
    )


@pytest.mark.slow
@pytest.mark.parametrize("drop_rate", [0.0, 0.2])
def test_every_division_into_calls_gives_the_same_parameters(drop_rate):
    whole, losses = trained(K, drop_rate=drop_rate)
    for per_call in (1, 2):
        parts, other_losses = trained(per_call, drop_rate=drop_rate)
        np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
        for path, value in whole.items():
            # Where a gradient is nearly 0, AdamW divides rounding by rounding: half a percent of the distance moved.
            np.testing.assert_allclose(parts[path], value, atol=2e-4, err_msg=str(path))


def test_the_gradient_is_that_of_the_mean_loss():
    model = tiny_model()
    inputs_KBT, targets_KBT = stream().batch(0)

    def mean_loss(model):
        return jnp.mean(jnp.array([cross_entropy(model(x), y) for x, y in zip(inputs_KBT, targets_KBT, strict=True)]))

    expected_loss, expected = nnx.jit(nnx.value_and_grad(mean_loss))(model)
    loss, grads, losses_A = nnx.jit(mean_gradient)(model, *stream().calls(0), SEED_KEY)
    assert loss == pytest.approx(float(expected_loss), rel=1e-6)
    one_by_one = [cross_entropy(logits(model, x), y) for x, y in zip(inputs_KBT, targets_KBT, strict=True)]
    np.testing.assert_allclose(losses_A, one_by_one, rtol=1e-6)
    chex.assert_trees_all_close(nnx.to_pure_dict(grads), nnx.to_pure_dict(expected), rtol=1e-4, atol=1e-7)


def test_a_step_is_traced_once():
    config = tiny_train_config(microbatches_per_call=1)
    counted = nnx.jit(chex.assert_max_traces(n=1)(train_step.__wrapped__), static_argnames="config")
    model = tiny_model()
    place(model, one_device())
    optimizer = make_optimizer(model, config, total_steps=20)
    place(optimizer, one_device())
    for step in range(2):
        for call in stream().calls(step, K):
            counted(model, optimizer, call, SEED_KEY, config)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda batch: batch._replace(inputs=batch.inputs[:, :1]),
            r"'batch.inputs' .*uint16\[4,2,16\].*uint16\[4,1,16\]",
        ),
        (
            lambda batch: batch._replace(targets=batch.targets.astype("int32")),
            r"'batch.targets' .*uint16.*int32\[4,2,16\]",
        ),
    ],
)
def test_arguments_of_another_form_are_named_and_change_nothing(change, named):
    config, model = tiny_train_config(), tiny_model()
    optimizer = make_optimizer(model, config, total_steps=20)
    [first], [second] = stream().calls(0), stream().calls(1)
    compiled = compile_train_step(model, optimizer, first, SEED_KEY, config)
    compiled(model, optimizer, first, SEED_KEY)
    before = parameters(model)
    with pytest.raises(RuntimeError, match=f"training step would have to be compiled a second time: .*{named}"):
        compiled(model, optimizer, change(second), SEED_KEY)
    chex.assert_trees_all_equal(parameters(model), before)
    assert np.isfinite(compiled(model, optimizer, second, SEED_KEY).loss)


def test_the_bytes_needed_hold_at_least_the_arguments():
    config, model = tiny_train_config(), tiny_model()
    optimizer = make_optimizer(model, config, total_steps=20)
    compiled = compile_train_step(model, optimizer, *stream().calls(0), SEED_KEY, config)
    state = sum(array.nbytes for array in jax.tree.leaves(nnx.state((model, optimizer))) if hasattr(array, "nbytes"))
    assert 3 * sum(array.nbytes for array in parameters(model).values()) < compiled.bytes_needed
    assert state < compiled.bytes_needed < 100 * state


def test_a_gradient_that_is_not_finite_is_told_by_its_place():
    grads = nnx.state(tiny_model(), nnx.Param)
    names = list(named_arrays(grads))
    grads["output_norm"]["bias"][...] = jnp.full(32, jnp.nan)
    told = gradient_diagnostics(jnp.zeros(K), grads)
    assert [name for name, norm in zip(names, told.gradient_norms) if not jnp.isfinite(norm)] == ["output_norm.bias"]


@pytest.mark.parametrize("per_call", [K, 1])
def test_the_evidence_tells_losses_and_gradients_apart(per_call):
    config, model = tiny_train_config(microbatches_per_call=per_call), tiny_model()
    optimizer = make_optimizer(model, config, total_steps=20)
    names = list(parameters(model))
    calls = stream().calls(0, config.calls_per_step)
    reports = [train_step(model, optimizer, call, SEED_KEY, config) for call in calls]
    told = [report.diagnostics for report in reports]
    losses = np.concatenate([part.losses for part in told])
    assert losses.shape == (K,) and np.mean(losses) == pytest.approx(np.mean([r.loss for r in reports]))
    assert all(part.gradient_norms.shape == (len(names),) for part in told)
    if per_call == K:
        _, grads, _ = nnx.jit(mean_gradient)(tiny_model(), *calls, SEED_KEY)
        expected = [np.linalg.norm(array) for array in named_arrays(grads).values()]
        np.testing.assert_allclose(told[0].gradient_norms, expected, rtol=1e-5)
        norm = np.linalg.norm(told[0].gradient_norms)
        assert norm == pytest.approx(float(reports[0].update.gradient_norm), rel=1e-6)


def test_dropout_differs_between_steps_and_microbatches_and_repeats_with_them():
    model = tiny_model(drop_rate=0.5)
    gradient = nnx.jit(mean_gradient)
    [batch] = stream().calls(0)
    alike = batch._replace(inputs=batch.inputs[:1], targets=batch.targets[:1])

    def loss_at(step, microbatch):
        return float(gradient(model, alike._replace(position=np.array([step, microbatch], np.uint32)), SEED_KEY)[0])

    assert loss_at(0, 0) == loss_at(0, 0)
    assert len({loss_at(0, 0), loss_at(0, 1), loss_at(1, 0), loss_at(1, 1)}) == 4


def test_the_models_and_the_optimizers_old_buffers_are_given_to_the_new_ones():
    model, config = tiny_model(), tiny_train_config()
    optimizer = make_optimizer(model, config, total_steps=20)
    old = [leaf for leaf in jax.tree.leaves((nnx.state(model), nnx.state(optimizer))) if leaf.size > 1]
    for step in range(3):
        [call] = stream().calls(step)
        train_step(model, optimizer, jax.device_put(call), SEED_KEY, config)
    assert all(leaf.is_deleted() for leaf in old)


def test_the_compiled_step_holds_no_array_of_all_logits():
    sequences = 3
    [call] = stream(K, sequences).calls(0)
    config, model = tiny_train_config(microbatch_size=sequences), tiny_model()
    lowered = train_step.lower(model, make_optimizer(model, config, 20), call, SEED_KEY, config)
    shapes = {
        tuple(map(int, shape.split(","))) for shape in re.findall(r"\w+\[([\d,]+)\]", lowered.compile().as_text())
    }
    rows = sequences * CONTEXT_LENGTH
    assert (rows // 2, VOCAB_SIZE) in shapes  # half of a microbatch at a time
    assert not {shape for shape in shapes if VOCAB_SIZE in shape and math.prod(shape) >= rows * VOCAB_SIZE}


def test_the_rows_of_a_chunk_can_be_set_and_change_nothing_but_rounding():
    [call] = stream().calls(0)
    models = {rows: create_model(tiny_model_config(), 0, loss_rows_per_chunk=rows) for rows in (1, 8)}
    traced = {
        rows: str(jax.make_jaxpr(lambda call, model=model: mean_gradient(model, call, SEED_KEY)[0])(call))
        for rows, model in models.items()
    }
    assert f"f32[8,{VOCAB_SIZE}]" in traced[8] and f"f32[8,{VOCAB_SIZE}]" not in traced[1]
    one, eight = (nnx.jit(mean_gradient)(model, call, SEED_KEY) for model in models.values())
    for ours, other in zip(jax.tree.leaves(one), jax.tree.leaves(eight)):
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("drop_rate", [0.0, 0.5])
def test_remat_computes_blocks_again_and_changes_nothing_but_rounding(drop_rate):
    [call] = stream().calls(0)
    models = [create_model(tiny_model_config(n_layers=2), 0, drop_rate, remat=remat) for remat in ("none", "blocks")]
    products = [
        str(jax.make_jaxpr(lambda call, model=model: mean_gradient(model, call, SEED_KEY))(call)).count("dot_general")
        for model in models
    ]
    assert products[1] - products[0] >= 2 * 4  # those of a block's four layers, in two blocks
    plain, remat = (nnx.jit(mean_gradient)(model, call, SEED_KEY) for model in models)
    for found, expected in zip(jax.tree.leaves(remat), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_gradients_are_added_in_float32():
    [call] = stream().calls(0)
    _, grads, _ = nnx.jit(mean_gradient)(tiny_model(dtype="bfloat16"), call, SEED_KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


@pytest.mark.slow
def test_half_precision_learns_as_float32_does():
    curves = []
    for dtype in ("float32", "bfloat16"):
        model, config = tiny_model(dtype=dtype), tiny_train_config()
        optimizer = make_optimizer(model, config, total_steps=40)
        [call] = stream().calls(0)  # again and again: random tokens can only be learnt by heart
        curves.append([float(train_step(model, optimizer, call, SEED_KEY, config).loss) for _ in range(40)])
    single, half = curves
    assert single[-1] < single[0] - 1
    np.testing.assert_allclose(half, single, rtol=0.02)


def test_the_step_moves_nothing_between_host_and_device_unasked():
    model, config = tiny_model(), tiny_train_config()
    optimizer = make_optimizer(model, config, total_steps=20)
    placed = [jax.device_put(stream().calls(step)[0]) for step in range(2)]
    train_step(model, optimizer, placed[0], SEED_KEY, config)
    with jax.transfer_guard("disallow"):
        train_step(model, optimizer, placed[1], SEED_KEY, config)


def test_a_poisoned_parameter_rejects_the_update_and_changes_nothing():
    model = tiny_model()
    embedding = model.token_embedding.embedding
    embedding[...] = embedding[...].at[5].set(jnp.nan)
    before = parameters(model)
    after, losses = trained(K, num_steps=2, model=model)
    assert np.isnan(losses).all()
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_the_a_to_a_shell_learns_to_repeat_its_input():
    model = tiny_model(n_layers=0, position_embedding=False, output_norm=False)
    config = tiny_train_config(learning_rate=0.1)
    optimizer = make_optimizer(model, config, total_steps=60)
    data = stream(objective="a-to-a")
    for step in range(60):
        train_step(model, optimizer, *data.calls(step), SEED_KEY, config)
    everything = np.arange(96, dtype=np.uint16).reshape(6, 16)
    np.testing.assert_array_equal(logits(model, everything).argmax(-1), everything)


def test_evaluation_is_the_loss_without_dropout():
    inputs_KBT, targets_KBT = stream().batch(0)
    found = eval_step(tiny_model(drop_rate=0.5), inputs_KBT[0], targets_KBT[0])
    assert found.shape == (1,)  # devices
    assert found[0] == pytest.approx(
        float(cross_entropy(logits(tiny_model(), inputs_KBT[0]), targets_KBT[0])), rel=1e-6
    )


BACKWARD_ORDER = """
head.embedding output_norm
blocks.1.feed_forward.project blocks.1.feed_forward.expand blocks.1.feed_forward_norm
blocks.1.attention.output blocks.1.attention.query_key_value blocks.1.attention_norm
blocks.0.feed_forward.project blocks.0.feed_forward.expand blocks.0.feed_forward_norm
blocks.0.attention.output blocks.0.attention.query_key_value blocks.0.attention_norm
position_embedding.embedding token_embedding.embedding
"""


def test_parameters_are_named_in_the_order_of_the_backward_pass():
    order = backward_order(tiny_model(n_layers=2, qkv_bias=True))
    assert len(set(order)) == len(order) == 4 + 1 + 2 * 12
    modules = list(
        dict.fromkeys(name.removesuffix(".kernel").removesuffix(".bias").removesuffix(".scale") for name in order)
    )
    tables = {"position_embedding.embedding", "token_embedding.embedding"}
    assert modules[:-2] == BACKWARD_ORDER.split()[:-2] and set(modules[-2:]) == tables


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_the_evidence_tells_an_overflow_of_the_norm_from_a_gradient_that_is_not_finite(bad):
    grads = nnx.state(tiny_model(), nnx.Param)
    kernel = grads["blocks"][0]["attention"]["output"]["kernel"]
    kernel[...] = kernel[...].at[3, 4].set(bad)
    told = jax.device_get(nnx.jit(gradient_diagnostics)(jnp.zeros(K), grads))
    place = list(named_arrays(grads)).index("blocks.0.attention.output.kernel")
    assert [i for i, norm in enumerate(told.gradient_norms) if not np.isfinite(norm)] == [place]
    assert np.isfinite(told.scaled_norms[place]) == np.isfinite(bad)
    if np.isfinite(bad):
        assert float(told.scaled_norms[place]) / NORM_SCALE == pytest.approx(bad, rel=1e-5)
