"""Arrays of `nnx` modules by name, on the host, and the safetensors files that hold them."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file


def load_model(path: Path, model: nnx.Module) -> None:
    """Put the weights of one `model.safetensors` into a model; raises ValueError when they do not fit."""
    nnx.update(model, match(nnx.state(model, nnx.Param), load_weights(path), path))


def read_model_json(path: Path) -> str:
    """Read the `model.json` that rides in a weights file. Raises ValueError when the file does not have one."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a model.safetensors, found nothing; checkpoints/latest/ of a run has one")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    if "model.json" not in metadata:
        raise ValueError(f"{path}: expected a model.json in the file's metadata, found none; use one that we saved")
    return metadata["model.json"]


def load_weights(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def _names(state: nnx.State) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def host_arrays(state: nnx.State) -> dict[str, np.ndarray]:
    """Copy the arrays of a state to the host, by dot-joined paths; what is donated later does not change them."""
    arrays = jax.device_get({name: variable.get_value() for name, variable in _names(state).items()})
    return {name: np.array(array, order="C", copy=True) for name, array in arrays.items()}  # on a CPU, else a view


def match(state: nnx.State, saved: dict[str, np.ndarray], source: Path) -> nnx.State:
    """Return `state` with the saved arrays in it; raise ValueError on the first difference in form."""
    current = {name: variable.get_value() for name, variable in _names(state).items()}
    if missing := sorted(current.keys() - saved.keys()):
        raise ValueError(f"{source}: lacks {len(missing)} arrays that the model has, such as {missing[0]}")
    if unknown := sorted(saved.keys() - current.keys()):
        raise ValueError(f"{source}: has {len(unknown)} arrays that the model lacks, such as {unknown[0]}")
    for name, array in current.items():
        form, saved_form = (f"{a.dtype}{list(a.shape)}" for a in (array, saved[name]))
        if form != saved_form:
            raise ValueError(f"{source}: {name}: expected {form}, got {saved_form}")
    paths = [path for path, _ in nnx.to_flat_state(state)]
    placed = jax.device_put([saved[name] for name in current], [array.sharding for array in current.values()])
    return nnx.from_flat_state(zip(paths, placed, strict=True))
