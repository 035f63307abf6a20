"""The optimizer: schedule, gradient transformation, and the only readers of its state.

Reading inwards, one global step passes through

    MultiSteps             averages the calls of a global step (only if `microbatches_per_call` is set)
    inject_hyperparams     the learning rate, by the number of global steps, rejected ones included
    measure_norm           keeps the norm of the mean gradient; makes a gradient whose norm overflows not finite
    apply_if_finite        rejects the update when a gradient is not finite: no parameter and no moment changes
    clip_by_global_norm
    adamw                  or another of `update_rules.py`

The learning rate stands outside `apply_if_finite` so that a rejected update moves the schedule on as it moves the data
on. All but `measure_norm` is optax's: https://optax.readthedocs.io.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from outside_in.config import TrainConfig
from outside_in.storage.text import counted
from outside_in.update_rules import RULES

START_FACTOR = 1e-5  # of the peak learning rate
SCHEDULE_KEYS = (  # of train.json, beside those that set the run's length
    "learning_rate",
    "schedule",
    "warmup_period_percent",
    "warmup_tokens",
    "decay_percent",
    "final_learning_rate_percent",
)
MAX_FLOAT32 = float(jnp.finfo(jnp.float32).max)
NEVER = jnp.iinfo(jnp.int32).max  # rejections in a row after which optax would accept: it counts no further


class NormState(NamedTuple):
    gradient_norm: jax.Array  # float32, of the last update, before clipping


def schedule_steps(config: TrainConfig, total_steps: int, tokens_per_step: int | None = None) -> tuple[int, int]:
    """Return how many steps warmup and decay take.

    Only `warmup_tokens` needs `tokens_per_step`. Raises ValueError when the run is too short for both.
    """
    if config.warmup_tokens is None:
        warmup = int(total_steps * config.warmup_period_percent / 100)
    else:
        assert tokens_per_step, "warmup_tokens needs the tokens of a global step"
        warmup = -(-config.warmup_tokens // tokens_per_step)
    rest = total_steps - warmup
    decay = {"constant": 0, "wsd": int(total_steps * config.decay_percent / 100)}.get(config.schedule, rest)
    if rest < max(decay, 1):
        raise ValueError(
            f"train.json: a run of {counted(total_steps, 'step')} is too short for a warmup of {warmup:,}"
            + (f" and a decay of {decay:,}" if config.schedule == "wsd" else "")
            + "; use fewer warmup_tokens, or a longer run"
        )
    return warmup, decay


def learning_rate_schedule(config: TrainConfig, total_steps: int, tokens_per_step: int | None = None) -> optax.Schedule:
    """Return the learning rate by the number of global steps before.

    All schedules begin with a linear warmup. "cosine" and "linear" decay over the rest of the run, "constant" does not,
    and "wsd" (warmup, stable, decay: https://arxiv.org/abs/2404.06395) decays linearly at the end.
    """
    warmup, decay = schedule_steps(config, total_steps, tokens_per_step)
    peak = config.learning_rate
    start, final = START_FACTOR * peak, final_learning_rate(config)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(start, peak, warmup, total_steps, final)
    parts = [
        optax.linear_schedule(start, peak, warmup),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, final, decay),
    ]
    return optax.join_schedules(parts, [warmup, total_steps - decay])


def final_learning_rate(config: TrainConfig) -> float:
    """Return what the learning rate decays to."""
    return config.final_learning_rate_percent / 100 * config.learning_rate


def make_optimizer(
    model: nnx.Module, config: TrainConfig, total_steps: int, tokens_per_step: int | None = None
) -> nnx.Optimizer:
    """Build the optimizer of a run, over all parameters of the model."""
    schedule = learning_rate_schedule(config, total_steps, tokens_per_step)

    def guarded_rule(learning_rate: Any) -> optax.GradientTransformation:
        clip = optax.clip_by_global_norm(_max_norm(config))
        rule = RULES[config.optimizer](config, learning_rate)
        return optax.chain(measure_norm(), optax.apply_if_finite(optax.chain(clip, rule), NEVER))

    transformation = optax.inject_hyperparams(guarded_rule)(schedule)
    if config.microbatches_per_call is not None:  # also one call: the state is of one form on any number of devices
        transformation = accumulate_calls(transformation, config.calls_per_step)
    return nnx.Optimizer(model, transformation, wrt=nnx.Param)


def _max_norm(config: TrainConfig) -> float:
    """Return the norm that gradients are clipped to, as a float32.

    Without clipping it is the largest one, which no gradient exceeds.
    """
    return min(config.clipping_max_norm or MAX_FLOAT32, MAX_FLOAT32)


def measure_norm() -> optax.GradientTransformation:
    """Keep the gradient's global norm; reject a gradient whose norm overflows.

    It becomes NaN, so that `apply_if_finite` rejects the update. `clip_by_global_norm` alone would divide by infinity:
    an update of zeros, which nobody would notice.
    """

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        norm = optax.tree.norm(updates).astype(jnp.float32)
        leaves, structure = jax.tree.flatten(updates)
        smallest = min((i for i, leaf in enumerate(leaves) if leaf.size), key=lambda i: leaves[i].size)  # one is enough
        leaves[smallest] = jnp.where(jnp.isfinite(norm), leaves[smallest], jnp.nan)
        return jax.tree.unflatten(structure, leaves), NormState(norm)

    return optax.GradientTransformation(lambda params: NormState(jnp.zeros(())), update)


def accumulate_calls(inner: optax.GradientTransformation, calls: int) -> optax.GradientTransformation:
    """Average the gradients of `calls` calls, then update once.

    This is `optax.MultiSteps`, made safe against NaN. MultiSteps clears its accumulator by multiplying it with 0, and 0
    · NaN is NaN: after one NaN no update would ever be finite again. So every first call of a global step starts from
    zeros.
    """
    multi_steps = optax.MultiSteps(inner, every_k_schedule=calls)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        is_first_call = state.mini_step == 0
        fresh = jax.tree.map(lambda total: jnp.where(is_first_call, 0, total), state.acc_grads)
        return multi_steps.update(updates, state._replace(acc_grads=fresh), params)

    return optax.GradientTransformation(multi_steps.init, update)


def gradient_of_step(optimizer: nnx.Optimizer, grads: nnx.State) -> nnx.State:
    """Return the mean gradient of a global step's calls so far.

    `grads` is that of the newest call, whose update comes next.
    """
    state = nnx.as_pure(optimizer.opt_state)
    accumulated = optax.tree.get(state, "acc_grads")
    if accumulated is None:
        return grads
    calls = optax.tree.get(state, "mini_step")

    def mean(grad: jax.Array, total: jax.Array) -> jax.Array:
        before = jnp.where(calls == 0, 0, total)
        return before + (grad - before) / (calls + 1)

    return jax.tree.map(mean, nnx.as_pure(grads), accumulated)


class UpdateReport(NamedTuple):
    """What the newest global step did: scalars, on the device."""

    learning_rate: Any  # the schedule's value for this global step
    gradient_norm: Any  # before clipping
    clipped: Any
    rejected: Any
    rejected_updates: Any  # since the start of the run
    consecutive_rejections: Any  # up to now


def update_report(optimizer: nnx.Optimizer, config: TrainConfig) -> UpdateReport:
    """Return what the newest global step did, from the optimizer's state."""
    state = nnx.as_pure(optimizer.opt_state)
    norm, is_accepted = (optax.tree.get(state, name) for name in ("gradient_norm", "last_finite"))
    return UpdateReport(
        learning_rate=optax.tree.get(state, "hyperparams")["learning_rate"],
        gradient_norm=norm,
        clipped=is_accepted & (norm > _max_norm(config)),
        rejected=~is_accepted,
        rejected_updates=optax.tree.get(state, "total_notfinite"),
        consecutive_rejections=optax.tree.get(state, "notfinite_count"),
    )
