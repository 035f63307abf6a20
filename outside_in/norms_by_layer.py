"""Norms of each layer's gradient, update and parameters, for runs with `layer_norms_interval`.

A layer is a block, such as `blocks.0`, or a part of the model beside the blocks, such as `head`. The step is the same
program as without them where the key is not set.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from outside_in.config import TrainConfig
from outside_in.optimizer import gradient_of_step
from outside_in.weights import named_arrays

NORMS = ("gradient_norm", "update_norm", "parameter_norm")  # before clipping; new minus old parameters; the old ones


def update_and_measure(model: nnx.Module, optimizer: nnx.Optimizer, grads: nnx.State, config: TrainConfig) -> Any:
    """Update the parameters. Returns the norms of all layers, (3, L), if they are wanted; else None.

    The gradient is the mean of the global step's calls up to this one.
    """
    if config.layer_norms_interval is None:
        optimizer.update(model, grads)
        return None
    mean = named_arrays(gradient_of_step(optimizer, grads))
    before = named_arrays(nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    after = named_arrays(nnx.state(model, nnx.Param))
    updates = {name: _float32(after[name]) - _float32(before[name]) for name in before}
    return jnp.stack([_norms(arrays) for arrays in (mean, updates, before)])


def _norms(arrays: dict[str, jax.Array]) -> jax.Array:
    layers: dict[str, list[jax.Array]] = {}
    for name, array in arrays.items():
        layers.setdefault(layer_of(name), []).append(_float32(array))
    return jnp.stack([optax.tree.norm(arrays) for arrays in layers.values()])


def _float32(array: jax.Array) -> jax.Array:
    return array.astype(jnp.float32)


def layer_of(parameter: str) -> str:
    """Return a parameter's layer: its name up to the first number.

    Without a number, it is the first part of the name.
    """
    parts = parameter.split(".")
    return ".".join(parts[: next((i for i, part in enumerate(parts) if part.isdigit()), 0) + 1])


def norms_record(model: nnx.Module, norms_3L: np.ndarray | jax.Array) -> dict[str, float | None]:
    """Return the norms by name, such as `update_norm/blocks.0`.

    None where they are not finite.
    """
    layers = dict.fromkeys(layer_of(name) for name in named_arrays(nnx.state(model, nnx.Param)))
    return {
        f"{what}/{layer}": norm if math.isfinite(norm) else None
        for what, norms in zip(NORMS, norms_3L.tolist(), strict=True)
        for layer, norm in zip(layers, norms, strict=True)
    }
