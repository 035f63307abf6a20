"""The optimiser: its schedule, its gradient transformation, and the only readers of its state.

Reading inwards, one global step passes through

    MultiSteps            joins the calls of a global step (only when there are several)
    inject_hyperparams    the learning rate, by the number of global steps, rejected ones included
    measure_norm          the norm of the mean gradient, before clipping
    apply_if_finite       rejects the update when any gradient is not finite: no parameter, no moment changes
    clip_by_global_norm
    adamw

The learning rate stands outside `apply_if_finite` so that a rejected update moves the schedule on as it moves the
data on. Sources: https://optax.readthedocs.io; AdamW, https://arxiv.org/abs/1711.05101.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from config import TrainConfig

START_FACTOR, END_FACTOR = 1e-5, 0.1  # of the peak learning rate
NEVER_ACCEPT = 2**31 - 1  # past its limit apply_if_finite would apply the NaN; the training loop stops long before


class NormState(NamedTuple):
    gradient_norm: jax.Array  # (), float32


def learning_rate_schedule(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """Rise linearly to the peak over `warmup_period_percent` of the run, then fall by a cosine to a tenth of it."""
    return optax.warmup_cosine_decay_schedule(
        init_value=START_FACTOR * config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=int(total_steps * config.warmup_period_percent / 100),
        decay_steps=total_steps,
        end_value=END_FACTOR * config.learning_rate,
    )


def make_optimizer(model: nnx.Module, config: TrainConfig, total_steps: int) -> nnx.Optimizer:
    """Build the optimiser of a run over all of the model's parameters."""

    def guarded_adamw(learning_rate: Any) -> optax.GradientTransformation:
        adamw = optax.adamw(learning_rate, b2=config.beta2, weight_decay=config.weight_decay)
        clipped = optax.chain(optax.clip_by_global_norm(config.clipping_max_norm), adamw)
        return optax.chain(measure_norm(), optax.apply_if_finite(clipped, NEVER_ACCEPT))

    transformation = optax.inject_hyperparams(guarded_adamw)(learning_rate_schedule(config, total_steps))
    if config.calls_per_step > 1:
        transformation = join_calls(transformation, config.calls_per_step)
    return nnx.Optimizer(model, transformation, wrt=nnx.Param)


def measure_norm() -> optax.GradientTransformation:
    """Pass the gradients on and keep their global norm in the state, finite or not."""

    def init(params: optax.Params) -> NormState:
        return NormState(jnp.zeros((), jnp.float32))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, NormState(optax.tree.norm(updates).astype(jnp.float32))

    return optax.GradientTransformation(init, update)


def join_calls(inner: optax.GradientTransformation, calls: int) -> optax.GradientTransformation:
    """Average the gradients of `calls` calls, then update once: `optax.MultiSteps`, safe against NaN.

    MultiSteps clears its accumulator by multiplying it with 0, and 0 · NaN is NaN: after one NaN no update would ever
    be finite again. So every first call of a global step starts from zeros.
    """
    multi_steps = optax.MultiSteps(inner, every_k_schedule=calls)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        is_first = state.mini_step == 0
        fresh = jax.tree.map(lambda total: jnp.where(is_first, 0, total), state.acc_grads)
        return multi_steps.update(updates, state._replace(acc_grads=fresh), params)

    return optax.GradientTransformation(multi_steps.init, update)


def update_report(optimizer: nnx.Optimizer, config: TrainConfig) -> dict[str, jax.Array]:
    """Say what the newest global step did to the parameters: scalars, still on the device.

    `gradient_norm` is taken before clipping; `learning_rate` is the schedule's value for this global step;
    `rejected_updates` counts since the start of the run, `consecutive_rejections` up to now.
    """
    state = nnx.as_pure(optimizer.opt_state)
    norm = optax.tree.get(state, "gradient_norm")
    rejected = ~optax.tree.get(state, "last_finite")
    return {
        "learning_rate": optax.tree.get(state, "hyperparams")["learning_rate"],
        "gradient_norm": norm,
        "clipped": ~rejected & (norm > config.clipping_max_norm),
        "rejected": rejected,
        "rejected_updates": optax.tree.get(state, "total_notfinite"),
        "consecutive_rejections": optax.tree.get(state, "notfinite_count"),
    }
