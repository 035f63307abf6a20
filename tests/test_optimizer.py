import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import tiny_train_config

from outside_in.optimizer import learning_rate_schedule, make_optimizer, update_report

K = 4
TOTAL_STEPS = 20


class Line(nnx.Module):
    """Two parameters are enough to see what an optimizer does."""

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


def numpy_schedule(config, total, warmup):
    """The learning rate of each step of a run, in float64, from the points that it passes through."""
    peak, final = config.learning_rate, config.learning_rate * config.final_learning_rate_percent / 100
    steps = np.arange(total)
    if config.schedule == "cosine":
        after = final + (peak - final) * (1 + np.cos(np.pi * (steps - warmup) / (total - warmup))) / 2
    else:
        decay = {"linear": total - warmup, "constant": 0, "wsd": total * config.decay_percent // 100}[config.schedule]
        after = np.interp(steps, [total - decay, total], [peak, final]) if decay else np.full(total, peak)
    return np.where(steps < warmup, peak * (1e-5 + (1 - 1e-5) * steps / max(warmup, 1)), after)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize(
    ("total", "warmup", "changes"),
    [
        (200, 10, {}),
        (200, 0, {"warmup_period_percent": 0}),
        (200, 90, {"warmup_period_percent": 45, "final_learning_rate_percent": 0}),
        (200, 3, {"warmup_tokens": 2 * 128 + 1}),  # rounded up
        (200, 199, {"warmup_tokens": 199 * 128, "decay_percent": 0.5}),
        (200, 0, {"warmup_tokens": 0, "decay_percent": 100}),
        (200, 20, {"warmup_period_percent": 10, "decay_percent": 90, "final_learning_rate_percent": 100}),
        (1, 0, {}),
        (2, 1, {"warmup_period_percent": 50, "decay_percent": 50}),
    ],
)
def test_every_schedule_is_that_of_numpy(schedule, total, warmup, changes):
    unused = {"wsd": set(), "constant": {"decay_percent", "final_learning_rate_percent"}}.get(
        schedule, {"decay_percent"}
    )
    config = tiny_train_config(schedule=schedule, **{k: v for k, v in changes.items() if k not in unused})
    rates = np.array([float(learning_rate_schedule(config, total, 128)(step)) for step in range(total)])
    np.testing.assert_allclose(rates, numpy_schedule(config, total, warmup), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("total", "changes", "said"),
    [
        (12, {"warmup_tokens": 12 * 128}, "a run of 12 steps is too short for a warmup of 12; use fewer warmup_tokens"),
        (1, {"warmup_tokens": 1, "schedule": "constant"}, "a run of 1 step is too short for a warmup of 1;"),
        (10, {"warmup_tokens": 7 * 128, "schedule": "wsd", "decay_percent": 40}, "a warmup of 7 and a decay of 4; use"),
    ],
)
def test_a_warmup_that_does_not_fit_into_the_run_is_refused(total, changes, said):
    with pytest.raises(ValueError, match=said):
        learning_rate_schedule(tiny_train_config(**changes), total, 128)


def test_the_state_of_the_optimizer_has_one_form_whatever_the_schedule():
    """So that the schedule and its like may change on resume."""
    changes = [{}, *({"schedule": name} for name in ("linear", "constant", "wsd")), {"beta1": 0.5, "epsilon": 1e-6}]
    forms = [
        [(path, leaf.shape, leaf.dtype) for path, leaf in jax.tree.leaves_with_path(nnx.state(optimizer))]
        for optimizer in (make_optimizer(Line(), tiny_train_config(**change), TOTAL_STEPS) for change in changes)
    ]
    assert all(form == forms[0] for form in forms)


def numpy_adamw(gradients, config, max_norm):
    """Train the parameters of `Line` in float64; yield what each global step should leave behind.

    Takes gradients (steps, K, 3); of a step that has one that is not finite only the schedule goes on.
    """
    schedule = learning_rate_schedule(config, TOTAL_STEPS)
    decaying = np.array([1, 1, 1] if config.weight_decay_on == "all" else [0, 0, 1])  # the slope is a vector
    parameters, first, second, accepted = np.array([1.0, -2.0, 0.5]), np.zeros(3), np.zeros(3), 0
    for step, gradient in enumerate(gradients.astype(np.float64).mean(axis=1)):
        norm = np.sqrt((gradient**2).sum())
        is_rejected = not np.isfinite(gradient).all() or norm > np.finfo(np.float32).max ** 0.5
        if not is_rejected:
            accepted += 1
            gradient = gradient * min(1, max_norm / norm)
            first = config.beta1 * first + (1 - config.beta1) * gradient
            second = config.beta2 * second + (1 - config.beta2) * gradient**2
            root = np.sqrt(second / (1 - config.beta2**accepted))
            direction = first / (1 - config.beta1**accepted) / (root + config.epsilon)
            decay = config.weight_decay * decaying * parameters
            parameters = parameters - float(schedule(step)) * (direction + decay)
        yield parameters, float(schedule(step)), norm, is_rejected


def check_against_numpy(gradients, config, max_norm, model=None, optimizer=None):
    model = model or Line()
    optimizer = optimizer or make_optimizer(model, config, TOTAL_STEPS)
    rejected = in_a_row = 0
    expected = numpy_adamw(gradients, config, max_norm)
    for microbatches, (parameters, learning_rate, norm, is_rejected) in zip(gradients, expected, strict=True):
        before = moments(optimizer)
        for call in np.split(microbatches, config.calls_per_step):
            update(model, optimizer, call.mean(axis=0))
        report = jax.device_get(update_report(optimizer, config))
        rejected, in_a_row = rejected + is_rejected, in_a_row + 1 if is_rejected else 0
        assert report.rejected == is_rejected
        assert (report.rejected_updates, report.consecutive_rejections) == (rejected, in_a_row)
        assert report.learning_rate == pytest.approx(learning_rate, rel=1e-6)
        assert report.clipped == (norm > max_norm and not is_rejected)
        assert is_rejected or report.gradient_norm == pytest.approx(norm, rel=1e-5)
        np.testing.assert_allclose(np.append(model.slope[...], model.offset[...]), parameters, rtol=1e-5)
        if is_rejected:
            jax.tree.map(np.testing.assert_array_equal, before, moments(optimizer))


def random_gradients(steps=6):
    """Gradients that grow from step to step, (steps, K, 3)."""
    growing = np.arange(1, steps + 1)[:, None, None]
    return (np.random.default_rng(0).normal(size=(steps, K, 3)) * growing).astype(np.float32)


@pytest.mark.parametrize("max_norm", [1.0, None, 1e9, 1e38, 1e40])
@pytest.mark.parametrize("per_call", [None, 1, 2, 4])
def test_updates_are_those_of_clipped_adamw_written_in_numpy(per_call, max_norm):
    both = {"clipping_max_norm": max_norm, "microbatches_per_call": per_call, "gradient_accumulation_steps": K}
    for changes in (
        both | {"beta2": 0.9},
        both | {"beta1": 0.6, "epsilon": 0.1},
        both | {"weight_decay": 0.5, "weight_decay_on": "matrices"},
    ):
        check_against_numpy(random_gradients(), tiny_train_config(**changes), max_norm or np.inf)


def test_a_huge_clip_gives_the_bits_of_none():
    found = []
    for max_norm in (None, 1e9, 1e38, 1e40):
        model, config = Line(), tiny_train_config(clipping_max_norm=max_norm, gradient_accumulation_steps=1)
        optimizer = make_optimizer(model, config, TOTAL_STEPS)
        for gradient in random_gradients()[:, 0]:
            update(model, optimizer, gradient)
        found.append((np.array(model.slope[...]), jax.tree.structure(nnx.state(optimizer))))
    for slope, structure in found[1:]:
        np.testing.assert_array_equal(slope, found[0][0])
        assert structure == found[0][1]  # so that the key may change on resume


@pytest.mark.parametrize("max_norm", [3.5, None, 1e40])
@pytest.mark.parametrize("per_call", [None, 1, 2, 4])
def test_a_global_step_with_one_bad_microbatch_is_rejected_whole(per_call, max_norm):
    config = tiny_train_config(
        gradient_accumulation_steps=K, microbatches_per_call=per_call, clipping_max_norm=max_norm
    )
    fresh_model = Line()
    fresh_optimizer = make_optimizer(fresh_model, config, TOTAL_STEPS)
    for microbatch, value in itertools.product(range(K), [np.nan, np.inf, -np.inf]):
        gradients = random_gradients()
        gradients[2, microbatch, 1] = value
        modules = nnx.clone(fresh_model), nnx.clone(fresh_optimizer)
        check_against_numpy(gradients, config, max_norm or np.inf, *modules)


@pytest.mark.parametrize("max_norm", [3.5, None, 1e40])
@pytest.mark.parametrize("per_call", [None, 1, 4])
def test_a_norm_that_overflows_is_rejected_though_every_gradient_is_finite(per_call, max_norm):
    gradients = random_gradients()
    gradients[3] = [1e30, 1, 0]
    config = tiny_train_config(
        gradient_accumulation_steps=K, microbatches_per_call=per_call, clipping_max_norm=max_norm
    )
    check_against_numpy(gradients, config, max_norm or np.inf)


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
        assert update_report(optimizer, config).consecutive_rejections == count
        np.testing.assert_array_equal(model.slope[...], [1.0, -2.0])
    for _ in range(K // per_call):
        update(model, optimizer, np.float32([1, 0, 0]))
    report = update_report(optimizer, config)
    assert (report.consecutive_rejections, report.rejected_updates) == (0, 14)
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


def test_an_update_needs_no_copy_of_the_moments():
    model = nnx.Linear(256, 256, rngs=nnx.Rngs(0))
    optimizer = make_optimizer(model, tiny_train_config(gradient_accumulation_steps=1), TOTAL_STEPS)
    update = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads), donate_argnums=(0, 1))
    stats = update.lower(model, optimizer, nnx.state(model, nnx.Param)).compile().memory_analysis()
    assert stats.temp_size_in_bytes < model.kernel[...].nbytes


def test_optax_never_gives_up_rejecting():
    """Past its own limit `apply_if_finite` would accept NaN: the count must not get there, whatever a run allows."""
    model, config = Line(), tiny_train_config(gradient_accumulation_steps=1)
    optimizer = make_optimizer(model, config, TOTAL_STEPS)
    flat = nnx.to_flat_state(nnx.state(optimizer))
    for path, variable in flat:
        if "notfinite_count" in path:
            variable[...] = jnp.int32(2**31 - 1)
    nnx.update(optimizer, nnx.from_flat_state(flat))
    for _ in range(3):
        update(model, optimizer, np.float32([np.nan, 0, 0]))
    assert update_report(optimizer, config).consecutive_rejections == 2**31 - 1
    np.testing.assert_array_equal(model.slope[...], [1.0, -2.0])
