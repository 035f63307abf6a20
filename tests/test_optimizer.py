import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_train_config
from flax import nnx

from optimizer import guard, join_calls, learning_rate_schedule, make_optimizer, update_report

K = 4
TOTAL_STEPS = 20


class Line(nnx.Module):
    """Two parameters are enough to see what an optimiser does."""

    def __init__(self):
        self.slope = nnx.Param(jnp.array([1.0, -2.0]))
        self.offset = nnx.Param(jnp.array([[0.5]]))


@nnx.jit
def update(model, optimizer, values):
    gradients = nnx.State({"slope": nnx.Param(values[:2]), "offset": nnx.Param(values[2:][None])})
    optimizer.update(model, gradients)


def test_the_schedule_passes_through_the_published_points():
    config = tiny_train_config(learning_rate=0.0014, warmup_period_percent=5)
    schedule = learning_rate_schedule(config, 33_165)
    assert schedule(0) == pytest.approx(1.4e-8, rel=0.02)  # a difference of float32 numbers 1e5 times as large
    assert schedule(1_658) == pytest.approx(0.0014)
    assert schedule(1_657) < schedule(1_658) > schedule(1_700)
    assert schedule(33_165) == pytest.approx(1.4e-4)
    assert schedule((1_658 + 33_165) / 2) == pytest.approx((0.0014 + 1.4e-4) / 2, rel=1e-3)


@pytest.mark.parametrize(("total", "percent"), [(1, 0), (1, 5), (2, 99), (10, 0)])
def test_the_schedule_of_a_very_short_run_is_finite(total, percent):
    schedule = learning_rate_schedule(tiny_train_config(warmup_period_percent=percent), total)
    assert all(0 < schedule(step) <= 0.01 for step in range(total))


@pytest.mark.parametrize("beta2", [0.999, 0.9])
def test_updates_are_those_of_clipped_adamw_written_in_numpy(beta2):
    config = tiny_train_config(clipping_max_norm=1.0, weight_decay=0.1, beta2=beta2, gradient_accumulation_steps=1)
    model = Line()
    optimizer = make_optimizer(model, config, TOTAL_STEPS)
    schedule = learning_rate_schedule(config, TOTAL_STEPS)
    parameters = np.array([1.0, -2.0, 0.5])
    first, second = np.zeros(3), np.zeros(3)
    rng = np.random.default_rng(0)
    for step in range(1, 8):
        gradient = rng.normal(size=3) * step
        update(model, optimizer, gradient.astype(np.float32))
        norm = np.sqrt((gradient**2).sum())
        report = update_report(optimizer, config)
        assert report["gradient_norm"] == pytest.approx(norm, rel=1e-6)
        assert report["clipped"] == (norm > 1)
        assert report["learning_rate"] == pytest.approx(float(schedule(step - 1)))
        gradient = gradient / max(1, norm)
        first, second = 0.9 * first + 0.1 * gradient, beta2 * second + (1 - beta2) * gradient**2
        direction = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - beta2**step)) + 1e-8)
        parameters = parameters - float(schedule(step - 1)) * (direction + 0.1 * parameters)
        np.testing.assert_allclose(np.append(model.slope[...], model.offset[...]), parameters, rtol=1e-5)


@pytest.mark.parametrize("per_call", [1, 2, 4])
def test_a_global_step_with_one_bad_microbatch_is_rejected_whole(per_call):
    """Train 6 global steps with the third one poisoned, beside plain AdamW that never sees the third one."""
    config = tiny_train_config(gradient_accumulation_steps=K, microbatches_per_call=per_call)
    fresh_model = Line()
    fresh_optimizer = make_optimizer(fresh_model, config, TOTAL_STEPS)
    clean = np.random.default_rng(0).normal(size=(6, K, 3)).astype(np.float32)
    expected = adamw_without_step(2, clean.mean(axis=1), config)
    for bad_microbatch, bad_value in itertools.product(range(K), [np.nan, np.inf, -np.inf]):
        model, optimizer = nnx.clone(fresh_model), nnx.clone(fresh_optimizer)
        poisoned = clean.copy()
        poisoned[2, bad_microbatch, 1] = bad_value
        for step, microbatches in enumerate(poisoned):
            before = moments(optimizer)
            for call in microbatches.reshape(K // per_call, per_call, 3):
                update(model, optimizer, call.mean(axis=0))
            report = jax.device_get(update_report(optimizer, config))
            assert report["rejected"] == (step == 2)
            assert report["rejected_updates"] == (step >= 2)
            assert report["consecutive_rejections"] == (step == 2)
            assert report["learning_rate"] == pytest.approx(float(expected[step]["learning_rate"]), rel=1e-6)
            found = np.append(model.slope[...], model.offset[...])
            np.testing.assert_allclose(found, expected[step]["parameters"], rtol=2e-6, err_msg=f"global step {step}")
            if step == 2:
                jax.tree.map(np.testing.assert_array_equal, before, moments(optimizer))


def adamw_without_step(skipped, mean_gradients, config):
    """Return what each global step should leave behind, from optax's AdamW alone."""
    adamw = optax.inject_hyperparams(optax.adamw)(0.0, weight_decay=config.weight_decay)
    schedule = learning_rate_schedule(config, TOTAL_STEPS)
    parameters, states = jnp.array([1.0, -2.0, 0.5]), []
    state = adamw.init(parameters)
    for step, mean in enumerate(mean_gradients):
        state.hyperparams["learning_rate"] = learning_rate = jnp.float32(schedule(step))
        if step != skipped:
            clipped = mean * min(1, config.clipping_max_norm / np.sqrt((mean**2).sum()))
            change, state = adamw.update(jnp.array(clipped), state, parameters)
            parameters = parameters + change
        states.append({"parameters": parameters, "learning_rate": learning_rate})
    return states


def moments(optimizer):
    state = nnx.as_pure(optimizer.opt_state)
    found = jax.device_get([optax.tree.get(state, name) for name in ("mu", "nu")])
    assert len(jax.tree.leaves(found)) == 4
    return found


@pytest.mark.parametrize("per_call", [1, 4])
def test_rejections_in_a_row_are_counted_and_never_accepted(per_call):
    config = tiny_train_config(microbatches_per_call=per_call)
    model = Line()
    optimizer = make_optimizer(model, config, TOTAL_STEPS)
    for count in range(1, 15):
        for _ in range(K // per_call):
            update(model, optimizer, np.float32([np.nan, 0, 0]))
        assert update_report(optimizer, config)["consecutive_rejections"] == count
        np.testing.assert_array_equal(model.slope[...], [1.0, -2.0])
    for _ in range(K // per_call):
        update(model, optimizer, np.float32([1, 0, 0]))
    report = update_report(optimizer, config)
    assert (report["consecutive_rejections"], report["rejected_updates"]) == (0, 14)
    assert np.all(np.isfinite(model.slope[...])) and np.any(model.slope[...] != jnp.array([1.0, -2.0]))


def test_only_the_last_call_of_a_global_step_changes_parameters():
    model = Line()
    config = tiny_train_config(microbatches_per_call=1)
    optimizer = make_optimizer(model, config, TOTAL_STEPS)
    changed = []
    for _ in range(2 * K):
        before = np.array(model.slope[...])
        update(model, optimizer, np.float32([1, -1, 0.5]))
        changed.append(bool(np.any(before != model.slope[...])))
    assert changed == [False, False, False, True] * 2


def test_the_joined_norm_is_that_of_the_mean_gradient():
    joined = join_calls(guard(optax.identity(), 1.0), 2)
    state = joined.init({"w": jnp.zeros(2)})
    for gradient in ([3.0, 0.0], [3.0, 8.0]):
        _, state = joined.update({"w": jnp.array(gradient)}, state, {"w": jnp.zeros(2)})
    assert state.inner_opt_state.gradient_norm == pytest.approx(5.0)


def test_a_norm_beyond_float32_is_rejected():
    model = Line()
    config = tiny_train_config(gradient_accumulation_steps=1)
    optimizer = make_optimizer(model, config, TOTAL_STEPS)
    update(model, optimizer, np.float32([1e30, 1, 0]))  # finite, but not its square
    assert update_report(optimizer, config)["rejected"]
    np.testing.assert_array_equal(model.slope[...], [1.0, -2.0])


@pytest.mark.parametrize("norm", [0.0, 1e-30, 0.5, 2.0, 1e15])
def test_clipping_leaves_small_gradients_alone_and_keeps_the_direction(norm):
    gradient = norm * jnp.array([0.6, -0.8])
    transformation = guard(optax.identity(), 1.0)
    clipped, _ = transformation.update(gradient, transformation.init(gradient))
    if norm <= 1:
        np.testing.assert_array_equal(clipped, gradient)
    np.testing.assert_allclose(clipped, min(1.0, norm) * np.array([0.6, -0.8]), rtol=1e-6)


def test_an_update_needs_no_copy_of_the_moments():
    model = nnx.Linear(256, 256, rngs=nnx.Rngs(0))
    optimizer = make_optimizer(model, tiny_train_config(gradient_accumulation_steps=1), TOTAL_STEPS)
    update = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads), donate_argnums=(0, 1))
    stats = update.lower(model, optimizer, nnx.state(model, nnx.Param)).compile().memory_analysis()
    assert stats.temp_size_in_bytes < model.kernel[...].nbytes
