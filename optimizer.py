"""The optimiser: its schedule, its gradient transformation, and the only readers of its state.

Reading inwards, one global step passes through

    MultiSteps            joins the calls of a global step (only when `microbatches_per_call` asks for several)
    inject_hyperparams    the learning rate, by the number of global steps, rejected ones included
    guard                 measures the norm of the mean gradient; rejects the update when it is not finite, so that no
                          parameter and no moment changes; otherwise clips by it
    adamw

The learning rate stands outside the guard so that a rejected update moves the schedule on as it moves the data on.

`guard` does the work of optax's `apply_if_finite` and `clip_by_global_norm` with one pass over the gradients where
those take five. Sources: https://optax.readthedocs.io; AdamW, https://arxiv.org/abs/1711.05101.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from config import TrainConfig

START_FACTOR, END_FACTOR = 1e-5, 0.1  # of the peak learning rate


class GuardState(NamedTuple):
    """What is known of the updates so far: scalars, and the state of the transformation inside."""

    gradient_norm: jax.Array  # float32, of the last one, before clipping
    rejected: jax.Array  # bool, whether the last one was
    rejected_updates: jax.Array  # int32, since the start
    consecutive_rejections: jax.Array  # int32, up to now
    inner_state: optax.OptState


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
        return guard(adamw, config.clipping_max_norm)

    transformation = optax.inject_hyperparams(guarded_adamw)(learning_rate_schedule(config, total_steps))
    if config.microbatches_per_call is not None:  # also one call: the state is of one form on any number of devices
        transformation = join_calls(transformation, config.calls_per_step)
    return nnx.Optimizer(model, transformation, wrt=nnx.Param)


def guard(inner: optax.GradientTransformation, max_norm: float) -> optax.GradientTransformation:
    """Clip gradients by their global norm, and reject them when it is not finite: then `inner` does not see them.

    The norm is not finite when any gradient is not, nor when it is beyond float32 itself.
    """

    def init(params: optax.Params) -> GuardState:
        norm, rejected = jnp.zeros(()), jnp.zeros((), bool)
        return GuardState(norm, rejected, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        norm = optax.tree.norm(updates).astype(jnp.float32)
        factor = max_norm / jnp.maximum(norm, max_norm)  # 1 where nothing is clipped

        def accept(grads: Any, inner_state: Any, params: Any) -> Any:
            return inner.update(jax.tree.map(lambda x: factor.astype(x.dtype) * x, grads), inner_state, params)

        def reject(grads: Any, inner_state: Any, params: Any) -> Any:
            return jax.tree.map(jnp.zeros_like, grads), inner_state

        rejected = ~jnp.isfinite(norm)
        # In this order: with `reject` first XLA copies every moment.
        updates, inner_state = jax.lax.cond(~rejected, accept, reject, updates, state.inner_state, params)
        in_a_row = jnp.where(rejected, state.consecutive_rejections + 1, 0)
        return updates, GuardState(norm, rejected, state.rejected_updates + rejected, in_a_row, inner_state)

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
    norm, rejected = (optax.tree.get(state, name) for name in ("gradient_norm", "rejected"))
    return {
        "learning_rate": optax.tree.get(state, "hyperparams")["learning_rate"],
        "gradient_norm": norm,
        "clipped": ~rejected & (norm > config.clipping_max_norm),
        "rejected": rejected,
        "rejected_updates": optax.tree.get(state, "rejected_updates"),
        "consecutive_rejections": optax.tree.get(state, "consecutive_rejections"),
    }
