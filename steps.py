"""Everything that is jitted for training: one call of the training step, and one of the evaluation step."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from config import TrainConfig
from data import Batch
from loss import fused_cross_entropy
from model import GPTModel
from optimizer import update_report


@partial(nnx.jit, static_argnames="config", donate_argnames=("model", "optimizer"))
def train_step(
    model: GPTModel, optimizer: nnx.Optimizer, batch: Batch, seed_key: jax.Array, config: TrainConfig
) -> dict[str, jax.Array]:
    """Train on the microbatches of one call; the last call of a global step updates the parameters.

    Returns the mean `loss` of the call, and what `optimizer.update_report` says after it; all on the device.
    """
    loss, grads = mean_gradient(model, batch, seed_key)
    optimizer.update(model, grads)
    return {"loss": loss, **update_report(optimizer, config)}


@nnx.jit
def eval_step(model: GPTModel, inputs_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Return the mean loss of one batch, dropout off."""
    return model_loss(model, inputs_BT, targets_BT)


def model_loss(
    model: GPTModel, inputs_BT: jax.Array, targets_BT: jax.Array, dropout_rngs: nnx.Rngs | None = None
) -> jax.Array:
    return fused_cross_entropy(model.hidden_states(inputs_BT, dropout_rngs), model.head_table, targets_BT, model.dtype)


def mean_gradient(model: GPTModel, batch: Batch, seed_key: jax.Array) -> tuple[jax.Array, nnx.State]:
    """Average loss and gradient over the microbatches of a call, one forward and backward pass at a time.

    Dropout masks are a function of the seed, the global step and the microbatch alone.
    """
    graph, params = nnx.split(model)
    global_step, first = batch.position
    step_key = jax.random.fold_in(seed_key, global_step)

    def microbatch_loss(
        params: nnx.State, inputs_BT: jax.Array, targets_BT: jax.Array, microbatch: jax.Array
    ) -> jax.Array:
        rngs = nnx.Rngs(dropout=jax.random.fold_in(step_key, microbatch))
        return model_loss(nnx.merge(graph, params), inputs_BT, targets_BT, rngs)

    def add(total: Any, microbatch: Any) -> tuple[Any, None]:
        value_and_grads = jax.value_and_grad(microbatch_loss)(params, *microbatch)
        return jax.tree.map(jnp.add, total, value_and_grads), None

    count = batch.inputs.shape[0]
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zeros, (batch.inputs, batch.targets, first + jnp.arange(count, dtype=jnp.uint32)))
    loss, grads = jax.tree.map(lambda x: x / count, total)
    return loss, grads
