"""The mesh: how a run is sharded over devices.

A run has one mesh of devices with two axes. Sequences are sharded over both; parameters, moments and gradients over
`fsdp` (https://arxiv.org/abs/1910.02054), by one rule. One device is a mesh of one.
"""

import functools
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from outside_in.config import MeshConfig
from outside_in.runtime import target
from outside_in.runtime.processes import device_put_global
from outside_in.storage.text import counted

DATA, FSDP = AXES = ("data", "fsdp")
MIN_SHARDED = 2048  # numbers: gathering less costs more than it saves


def make_mesh(config: MeshConfig) -> Mesh:
    """Return the mesh that `mesh` in train.json describes.

    -1 takes as many devices as there are. Raises ValueError when there are too few, or some would be left over.
    """
    devices = sorted(target.devices(), key=lambda device: (device.process_index, device.id))
    count, fsdp = len(devices), config.fsdp
    data = count // fsdp if config.data == -1 else config.data
    min_devices = count if jax.process_count() > 1 else 1  # one process may leave some of its own unused
    if (config.data == -1 and count % fsdp) or not min_devices <= data * fsdp <= count:
        divisors = ", ".join(str(d) for d in range(1, count + 1) if count % d == 0)
        raise ValueError(
            f"mesh: data={config.data} and fsdp={fsdp} do not fit the {counted(count, 'device')} here "
            f"(divisors: {divisors}); data=-1 takes what fsdp leaves"
        )
    return _mesh(tuple(devices[: data * fsdp]), data, fsdp)


@functools.cache
def one_device() -> Mesh:
    """Return the mesh of the first device alone."""
    return _mesh((jax.local_devices()[0],), 1, 1)


def _mesh(devices: tuple[jax.Device, ...], data: int, fsdp: int) -> Mesh:
    return Mesh(np.array(devices).reshape(data, fsdp), AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def local_sequence_slice(mesh: Mesh, per_device: int) -> tuple[int, int] | None:
    """Return which sequences of a microbatch are this process's; None: all."""
    if jax.process_count() == 1:
        return None
    local = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
    assert local == list(range(local[0], local[-1] + 1)), "a process's devices follow one another"
    return local[0] * per_device, (local[-1] + 1) * per_device


def array_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Return how a parameter or a moment is sharded.

    Its largest axis that `fsdp` divides is sharded over it. Small arrays, and those without such an axis, are whole on
    every device.
    """
    parts = mesh.shape[FSDP]
    divisible = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or math.prod(shape) < MIN_SHARDED or not divisible:
        return PartitionSpec()
    largest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * largest, FSDP)


def array_shardings(state: Any, mesh: Mesh) -> Any:
    """Return the sharding of every array of a state."""
    return jax.tree.map(lambda x: NamedSharding(mesh, array_spec(x.shape, mesh)), state)


def place(module: Any, mesh: Mesh) -> None:
    """Move the arrays of a model or an optimizer to their shardings."""
    state = nnx.state(module)
    nnx.update(module, jax.tree.map(device_put_global, state, array_shardings(state, mesh)))


def describe_mesh(shapes: dict[str, tuple[int, ...]], mesh: Mesh) -> list[str]:
    """Return lines that say how arrays, by name and shape, are sharded."""
    count = mesh.devices.size
    if count == len(target.devices()) == 1:
        return []
    left = len(target.devices()) - count
    unused = f"; {left} more are not used" if left else ""
    lines = [f"mesh    {counted(count, 'device')}: data {mesh.shape[DATA]} × fsdp {mesh.shape[FSDP]}{unused}"]
    if mesh.shape[FSDP] == 1:
        return lines
    for name, shape in shapes.items():
        axis = next((axis for axis, part in enumerate(array_spec(shape, mesh)) if part), None)
        layout = "whole on every device" if axis is None else f"axis {axis} over fsdp"
        lines.append(f"        {name} {list(shape)}: {layout}")
    return lines
