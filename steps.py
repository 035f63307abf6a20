"""Everything that is jitted for training: one call of the training step, and one of the evaluation step.

Both are compiled ahead of their first call, once in a run: so it is known what they need before they need it, and
arguments of another form are refused.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from config import TrainConfig
from data import Batch
from dropout import Dropout
from loss import add_head_gradient, fused_cross_entropy, prepare_head
from mesh import give_back_freed_memory
from model import GPTModel, compute_copy
from optimizer import update_report
from weights import named_arrays


@partial(nnx.jit, static_argnames="config", donate_argnames=("model", "optimizer"))
def train_step(
    model: GPTModel, optimizer: nnx.Optimizer, batch: Batch, seed_key: jax.Array, config: TrainConfig
) -> dict[str, Any]:
    """Train on the microbatches of one call; the last call of a global step updates the parameters.

    Returns the mean `loss` of the call, what `optimizer.update_report` says after it, and `evidence` for the case that
    the update was rejected; all on the device.
    """
    loss, grads, losses_A = mean_gradient(model, batch, seed_key, config.loss_rows_per_chunk)
    optimizer.update(model, grads)
    return {"loss": loss, **update_report(optimizer, config), "evidence": evidence(losses_A, grads)}


@nnx.jit
def eval_step(model: GPTModel, inputs_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Return the mean loss of one batch, dropout off."""
    return model_loss(model, inputs_BT, targets_BT)


class Compiled:
    """A compiled step. Called with arguments of another form, it raises RuntimeError and changes nothing."""

    def __init__(self, name: str, function: Any, *arguments: Any) -> None:
        """Compile a jitted function for arguments like these, which may be abstract; see `nnx.jit`."""
        self._name = name
        self._compiled = function.lower(*arguments).compile()
        give_back_freed_memory()

    def __call__(self, *arguments: Any) -> Any:
        """Take the arguments without the static ones."""
        try:
            return self._compiled(*arguments)
        except (TypeError, ValueError) as error:
            differences = "; ".join(line for line in str(error).splitlines() if line.startswith("Argument '"))
            told = differences or " ".join(str(error).split())
            raise RuntimeError(f"the {self._name} would have to be compiled a second time: {told}") from error

    @property
    def bytes_needed(self) -> int:
        """What the device must hold while it runs, its arguments included, by XLA's own account."""
        stats = self._compiled.memory_analysis()
        kept = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        return kept + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes


def compile_train_step(
    model: GPTModel, optimizer: nnx.Optimizer, batch: Batch, seed_key: jax.Array, config: TrainConfig
) -> Compiled:
    return Compiled("training step", train_step, model, optimizer, batch, seed_key, config)


def compile_eval_step(model: GPTModel, inputs_BT: jax.Array, targets_BT: jax.Array) -> Compiled:
    return Compiled("evaluation step", eval_step, model, inputs_BT, targets_BT)


def steps_ahead() -> int:
    """Say how many global steps may be under way before the reports of the first are fetched.

    One, so that a GPU never waits for Python. None on the CPU: it would hold all of a step's memory twice, and be no
    faster.
    """
    return 0 if jax.default_backend() == "cpu" else 1


def model_loss(
    model: GPTModel, inputs_BT: jax.Array, targets_BT: jax.Array, dropout: Dropout | None = None
) -> jax.Array:
    """Return the mean loss of a microbatch, a scalar."""
    head_VD = model.unembedding.embedding[...]
    hidden_BTD = model.hidden_states(inputs_BT, dropout)
    return fused_cross_entropy(hidden_BTD, head_VD, targets_BT, prepare_head(head_VD, model.dtype))


def dropout_of(seed_key: jax.Array, global_step: jax.Array, first_sequence: jax.Array, sequences: int) -> Dropout:
    """Dropout masks are a function of the seed, the global step (from 0) and the number of the sequence in it alone."""
    step_key = jax.random.fold_in(seed_key, global_step)
    numbers_B = first_sequence + jnp.arange(sequences, dtype=jnp.uint32)
    return Dropout(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key, numbers_B))


def mean_gradient(
    model: GPTModel, batch: Batch, seed_key: jax.Array, rows_per_chunk: int | None = None
) -> tuple[jax.Array, nnx.State, jax.Array]:
    """Average loss and gradient over the microbatches of a call, one forward and backward pass at a time.

    The gradients of the two large tables, head and embedding, are added up where they arise: an array of their size for
    each microbatch would cost as much as several layers. Also returns the loss of each microbatch, (A,).
    """
    graph, params = nnx.split(model)
    global_step, first = batch.position
    count, sequences, _ = batch.inputs.shape
    prepared_PD = prepare_head(model.unembedding.embedding[...], model.dtype)
    cast = compute_copy(params, model.dtype)

    def add(total: nnx.State, microbatch: Any) -> tuple[nnx.State, jax.Array]:
        inputs_BT, targets_BT, number = microbatch

        def hidden_states(params: nnx.State, x_BTD: jax.Array) -> jax.Array:
            dropout = dropout_of(seed_key, global_step, number * sequences, sequences)
            return nnx.merge(graph, params).transform(x_BTD, dropout)

        hidden_BTD, pull_back = jax.vjp(hidden_states, cast, model.embed(inputs_BT))
        totals = nnx.merge(graph, total)
        head, embedding = totals.unembedding.embedding, totals.token_embedding.embedding
        loss, slopes_BTD, head[...] = add_head_gradient(
            head[...], prepared_PD, hidden_BTD, targets_BT, 1 / count, rows_per_chunk
        )
        grads, slopes_BTD = pull_back(slopes_BTD)
        embedding[...] = embedding[...].at[inputs_BT].add(slopes_BTD)
        return jax.tree.map(jnp.add, nnx.state(totals), grads), loss  # in float32

    microbatches = (batch.inputs, batch.targets, first + jnp.arange(count, dtype=jnp.uint32))
    grads, losses_A = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), microbatches)
    return losses_A.mean(), grads, losses_A


def evidence(losses_A: jax.Array, grads: nnx.State) -> dict[str, jax.Array]:
    """Return what tells where a gradient stopped being finite: the loss of each microbatch and gradient norms.

    The losses are (A,), the norms (P,), in the order of `weights.named_arrays`. Where one call is a global step,
    clipping and rejecting need the same sums, and XLA takes them once.
    """
    arrays = named_arrays(grads).values()
    return {
        "losses": losses_A,
        "gradient_norms": jnp.stack([optax.tree.norm(array).astype(jnp.float32) for array in arrays]),
    }
