"""What steps are compiled for: the devices that are here, or those of a GPU that is not."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Target(NamedTuple):
    """Devices that only the compiler knows."""

    devices: list[jax.Device]
    memory_bytes: float  # of each, that JAX may use


_elsewhere: list[Target] = []


def elsewhere() -> Target | None:
    """Return the target that is not here; None: steps are compiled for the devices that JAX finds."""
    return _elsewhere[-1] if _elsewhere else None


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Compile for these devices inside the block. They run nothing."""
    _elsewhere.append(target)
    try:
        yield
    finally:
        _elsewhere.pop()


def devices() -> list[jax.Device]:
    target = elsewhere()
    return target.devices if target else jax.devices()


def platform() -> str:
    """Return the kind of device that steps are compiled for: "cpu" or "gpu"."""
    return devices()[0].platform if elsewhere() else jax.default_backend()
