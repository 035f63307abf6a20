"""`--debug-checks`: finds the first value that is not finite."""

from collections import OrderedDict
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from model import GPTModel
from outside_in.data.loader import Batch
from outside_in.train_step import backward_order, dropout_of, loss_and_gradient
from outside_in.weights import named_arrays

Findings = OrderedDict[str, jax.Array]  # places in the order in which they are computed, and whether they are finite


def make_checks(model: GPTModel) -> Callable[[GPTModel, Batch, jax.Array], str | None]:
    """Return a function that looks for values that are not finite.

    It takes a model of this form, a batch and the run's seed key. It returns None, or a line that names the global
    step, the microbatch and the first place where something is not finite: parameters, hidden states after every stage,
    logits, the loss, gradients in the order of the backward pass. Last comes the norm of the mean gradient, which may
    overflow though every gradient is finite.
    """
    names, graph = backward_order(model), nnx.graphdef(model)

    @jax.jit
    def check_microbatch(
        state: nnx.State, total: nnx.State, batch: Batch, seed_key: jax.Array, i: jax.Array
    ) -> tuple[Findings, nnx.State]:
        model = nnx.merge(graph, state)
        (global_step, first), count = batch.position, len(batch.inputs)
        inputs_BT, targets_BT = batch.inputs[i], batch.targets[i]
        sequences = len(inputs_BT)
        dropout_args = seed_key, global_step, (first + i) * sequences, sequences
        found = Findings()
        for name, array in named_arrays(nnx.state(model)).items():
            found[f"parameter {name}"] = _all_finite(array)
        hidden_BTD = None
        for stage, hidden_BTD in model.stages(inputs_BT, dropout_of(*dropout_args)):
            found[f"hidden states after {stage}"] = _all_finite(hidden_BTD)
        # one sequence at a time: a batch of logits need not fit
        found["logits"] = jax.lax.map(lambda hidden_TD: _all_finite(model.unembed(hidden_TD[None])), hidden_BTD).all()
        loss, grads = loss_and_gradient(model, inputs_BT, targets_BT, dropout_of(*dropout_args), 1 / count)
        found["the loss"] = _all_finite(loss)
        gradients = named_arrays(grads)
        for name in names:
            found[f"gradient of {name}"] = _all_finite(gradients[name])
        return found, jax.tree.map(jnp.add, total, grads)

    @jax.jit
    def check_norms(grads: nnx.State) -> Findings:
        arrays = named_arrays(grads)
        found = Findings((f"gradient of {name}", _all_finite(optax.tree.norm(arrays[name]))) for name in names)
        found["gradient"] = _all_finite(optax.tree.norm(grads))
        return found

    def check(model: GPTModel, batch: Batch, seed_key: jax.Array) -> str | None:
        global_step, first = (int(value) for value in batch.position)
        total = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
        for i in range(len(batch.inputs)):
            found, total = check_microbatch(nnx.state(model), total, batch, seed_key, jnp.uint32(i))
            if place := _first_bad(found):
                return f"global step {global_step + 1:,}, microbatch {first + i}: {place}: not finite"
        if place := _first_bad(check_norms(total)):
            return f"global step {global_step + 1:,}: {place}: its norm overflows float32"
        return None

    return check


def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def _first_bad(found: Findings) -> str | None:
    return next((place for place, is_finite in jax.device_get(found).items() if not is_finite), None)
