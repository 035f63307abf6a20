"""`--debug-checks`: every microbatch once more, stopping at the first value that is not finite.

chex's value checks work inside a compiled function: https://chex.readthedocs.io/en/latest/api.html#chex.chexify.
"""

import logging
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from data import Batch
from dropout import Dropout
from model import GPTModel
from steps import dropout_of, model_loss
from weights import named_arrays

PLACE = re.compile(r"«(.*)»")


def make_checks(model: GPTModel) -> Callable[[GPTModel, Batch, jax.Array], str | None]:
    """Build the checks for models of this form; they take the model, a batch and the run's seed key.

    They return None, or a line that names the global step, the microbatch and the first place where something is not
    finite: parameters, hidden states after every stage, logits, the loss, gradients, in this order.
    """
    graph = nnx.graphdef(model)
    logging.getLogger("absl").addFilter(_is_not_about_statuses)
    checked = chex.chexify(jax.jit(partial(_check_microbatch, graph)), async_check=False)

    def check(model: GPTModel, batch: Batch, seed_key: jax.Array) -> str | None:
        params = nnx.state(model)
        global_step, first = (int(number) for number in batch.position)
        for number, (inputs_BT, targets_BT) in enumerate(zip(batch.inputs, batch.targets), start=first):
            try:
                checked(params, inputs_BT, targets_BT, seed_key, jnp.uint32(global_step), jnp.uint32(number))
            except AssertionError as error:
                place = PLACE.search(str(error))
                where = f"global step {global_step + 1:,}, microbatch {number}: {place[1] if place else error}"
                return f"{where}: not finite"
        return None

    return check


def _is_not_about_statuses(record: logging.LogRecord) -> bool:
    # At exit chex warns of statuses that nobody may have looked at. Without `async_check` every call looks.
    return "chexify" not in record.getMessage()


def _check_microbatch(
    graph: Any,
    params: nnx.State,
    inputs_BT: jax.Array,
    targets_BT: jax.Array,
    seed_key: jax.Array,
    global_step: jax.Array,
    number: jax.Array,
) -> None:
    def dropout() -> Dropout:
        return dropout_of(seed_key, global_step, number * len(inputs_BT), len(inputs_BT))

    for name, array in named_arrays(params).items():
        _check(array, f"parameter {name}")
    model = nnx.merge(graph, params)
    hidden_BTD = None
    for stage, hidden_BTD in model.stages(model.embed(inputs_BT), dropout()):
        _check(hidden_BTD, f"hidden states after {stage}")
    _check(jax.lax.map(lambda hidden_TD: _extremes(model.unembed(hidden_TD)), hidden_BTD), "logits")
    loss, grads = jax.value_and_grad(
        lambda params: model_loss(nnx.merge(graph, params), inputs_BT, targets_BT, dropout())
    )(params)
    _check(loss, "the loss")
    for name, array in named_arrays(grads).items():
        _check(array, f"gradient of {name}")


def _check(array: jax.Array, place: str) -> None:
    chex.assert_tree_all_finite(array, custom_message=f"«{place}»")


def _extremes(logits_TV: jax.Array) -> jax.Array:
    return jnp.stack([logits_TV.max(), logits_TV.min()])  # finite when all are; a batch of logits need not fit
