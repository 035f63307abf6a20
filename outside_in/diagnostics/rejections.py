"""The record of a rejected update: where its gradient stopped being finite."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import GPTModel
from outside_in.runtime import processes
from outside_in.runtime.log import log
from outside_in.storage import atomic
from outside_in.storage.metrics import finite
from outside_in.train_step import NORM_SCALE, GradientDiagnostics, backward_order
from outside_in.weights import named_arrays


def record_rejection(
    path: Path, global_step: int, calls: Sequence[GradientDiagnostics], model: GPTModel, positions_KB: np.ndarray
) -> None:
    """Write the record of a rejected update, and log a warning.

    The parameters are those after the next step, which may have begun: what is not finite stays so.
    """
    parameters = named_arrays(nnx.state(model, nnx.Param))
    bad_parameters = [name for name, is_finite in jax.device_get(_all_finite(parameters)).items() if not is_finite]
    record = describe_rejection(
        global_step, calls, list(parameters), backward_order(model), bad_parameters, positions_KB
    )
    if not processes.is_main_process():
        return
    try:
        atomic.write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    except OSError as error:  # a full disk must not end the training
        log.warning(f"step {global_step:,}: the update was rejected, and its record cannot be written ({error})")
    else:
        log.warning(f"step {global_step:,}: the update was rejected: {record['reason']}; see {path}")


@jax.jit
def _all_finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(array).all() for name, array in arrays.items()}


def describe_rejection(
    global_step: int,
    calls: Sequence[GradientDiagnostics],
    names: Sequence[str],
    backward_order: Sequence[str],
    bad_parameters: Sequence[str],
    positions_KB: np.ndarray,
) -> dict[str, Any]:
    """Return the record of a rejected update, as JSON.

    It says which microbatch, which gradient and which tokens. `names` are the parameters in the order of the norms,
    `backward_order` the same in that of the backward pass, `bad_parameters` those that are not finite themselves,
    `positions_KB` where in the token file sequences begin.
    """
    losses = [finite(loss) for call in calls for loss in call.losses.tolist()]
    norms_AP = np.stack([call.gradient_norms for call in calls]).astype(np.float64)
    scaled_AP = np.stack([call.scaled_norms for call in calls]).astype(np.float64)
    norms_AP = np.where(np.isfinite(norms_AP), norms_AP, scaled_AP / NORM_SCALE)
    bad = {name for name, norms in zip(names, norms_AP.T) if not np.isfinite(norms).all()}
    largest = None if bad else names[int(norms_AP.max(axis=0).argmax())]
    return {
        "global_step": global_step,
        "reason": "a gradient is not finite" if bad else "the norm of the gradient overflows float32",
        "first_loss_not_finite": next((i for i, loss in enumerate(losses) if loss is None), None),
        "first_gradient_not_finite": next((name for name in backward_order if name in bad), None),
        "largest_gradient": largest,
        "parameters_not_finite": list(bad_parameters),
        "microbatches": [
            {"loss": loss, "first_tokens": positions.tolist()} for loss, positions in zip(losses, positions_KB)
        ],
        "gradient_norms_of_each_call": {
            name: [finite(norm) for norm in of_calls] for name, of_calls in zip(names, norms_AP.T.tolist())
        },
    }
