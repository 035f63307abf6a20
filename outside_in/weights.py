"""The arrays of `nnx` modules by name, and their safetensors files."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file

from outside_in.runtime.processes import device_put_global, gather_to_host, is_main_process
from outside_in.storage.safetensors_file import open_tensors
from outside_in.storage.strict_json import MAX_BYTES

M = TypeVar("M", bound=nnx.Module)

TOKENIZER_KEY = "tokenizer"  # of a weights file's metadata: which tokenizer the model was trained with, as JSON

DTYPES = {"BF16": "bfloat16", "BOOL": "bool"} | {
    f"{letter}{bits}": f"{kind}{bits}"
    for letter, kind in (("F", "float"), ("I", "int"), ("U", "uint"))
    for bits in (8, 16, 32, 64)
}


def load_model(path: Path, model: nnx.Module) -> None:
    """Put the weights of one `model.safetensors` into a model; raises ValueError when they do not fit."""
    nnx.update(model, fill_like(nnx.state(model), load_weights(path), path))


def save_weights(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    model_json: str,
    tokenizer: Mapping[str, str] | None = None,
    **metadata: str,
) -> None:
    """Write a weights file, readable by all; the model's shape and its tokenizer's identity ride in its metadata."""
    named = {TOKENIZER_KEY: json.dumps(tokenizer)} if tokenizer else {}
    in_order = {
        name: np.asarray(array, order="C") for name, array in arrays.items()
    }  # the library writes memory as it is
    save_file(in_order, path, metadata={"model.json": model_json, **named, **metadata})
    path.chmod(0o644)


def read_model_json(path: Path) -> str:
    """Read the `model.json` that rides in a weights file. Raises ValueError when the file does not have one."""
    metadata = read_metadata(path)
    if "model.json" not in metadata:
        raise ValueError(f"{path}: expected a model.json in the file's metadata, found none; use one that we saved")
    if len(metadata["model.json"]) > MAX_BYTES:
        raise ValueError(f"{path}: expected a model.json of a few lines in the file's metadata; use one that we saved")
    return metadata["model.json"]


def read_metadata(path: Path) -> dict[str, str]:
    """Read the texts that ride in a weights file. Raises ValueError when it is another kind of file."""
    with _open(path) as file:
        return file.metadata() or {}


@dataclass(frozen=True)
class StoredArray:
    """An array in a weights file: its form stands in the file's header, its content is read by `np.asarray`."""

    source: str
    content: Any  # a slice of safetensors

    @property
    def dtype(self) -> str:
        dtype = self.content.get_dtype()
        return DTYPES.get(dtype, dtype)

    @property
    def shape(self) -> list[int]:
        return self.content.get_shape()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.content[...]
        if not np.isfinite(array).all():
            raise ValueError(f"{self.source}: expected finite numbers, got NaN or infinity; use other weights")
        return array


def load_weights(path: Path) -> dict[str, StoredArray]:
    """Open a weights file; of its arrays nothing is read yet. Raises ValueError when it is another kind of file."""
    with _open(path) as file:
        names = file.keys()
        return {name: StoredArray(f"{path}: {name}", file.get_slice(name)) for name in names}


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: expected a model.safetensors, found nothing; checkpoints/latest/ of a run has one")
    return open_tensors(path)


def check_variables(model: nnx.Module) -> None:
    """Raise ValueError when a model keeps state that would not be saved."""
    modules = nnx.iter_modules(model)
    arrays = [
        (*path, name) for path, x in modules for name in vars(x) if isinstance(vars(x)[name], jax.Array | np.ndarray)
    ]
    random = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.RngState))]
    for path in (*arrays, *random):
        raise ValueError(
            f"model.py: {'.'.join(map(str, path))}: expected an nnx.Param, or an nnx.Variable for what does not train; "
            "random numbers come from `dropout(x, rate)`"
        )


def named_arrays(state: nnx.State) -> dict[str, Any]:
    """Return the arrays of a state by dot-joined paths."""
    return {".".join(map(str, path)): array for path, array in _flat(state).items()}


def _flat(state: nnx.State) -> dict[tuple[Any, ...], Any]:
    """Return the arrays of a state by path; without the places where optax keeps nothing."""
    flat = ((path, x.get_value() if isinstance(x, nnx.Variable) else x) for path, x in nnx.to_flat_state(state))
    return {path: x for path, x in flat if not isinstance(x, optax.MaskedNode)}


def host_arrays(state: nnx.State) -> dict[str, np.ndarray]:
    """Copy the arrays of a state to the host, by dot-joined paths; what is donated later does not change them."""
    arrays = gather_to_host(named_arrays(state))
    return {name: np.array(array, order="C", copy=True) for name, array in arrays.items()}  # on a CPU, else a view


def fill_like(state: nnx.State, saved: Mapping[str, Any], source: Path) -> nnx.State:
    """Return `state` with the saved arrays in it.

    They are read only when all of them fit. Raises ValueError on the first difference in
    form, and when weights are not finite.
    """
    check_structure(state, saved, source)
    current = named_arrays(state)
    arrays = [np.asarray(saved[name]) for name in current]
    # Uncommitted arrays stay uncommitted: another sharding would recompile the training step.
    shardings = [array.sharding if getattr(array, "committed", False) else None for array in current.values()]
    placed = [device_put_global(array, sharding) for array, sharding in zip(arrays, shardings)]
    return nnx.from_flat_state(zip(_flat(state), placed, strict=True))


def check_structure(state: nnx.State, saved: Mapping[str, Any], source: Path) -> None:
    """Raise ValueError on the first difference in name, dtype or shape."""
    current = named_arrays(state)
    if missing := sorted(current.keys() - saved.keys()):
        raise ValueError(f"{source}: lacks {len(missing)} arrays that the model has, such as {missing[0]}")
    if unknown := sorted(saved.keys() - current.keys()):
        raise ValueError(f"{source}: has {len(unknown)} arrays that the model lacks, such as {unknown[0][:100]!r}")
    for name, array in current.items():
        form, saved_form = (f"{a.dtype}{list(a.shape)}" for a in (array, saved[name]))
        if form != saved_form:
            raise ValueError(f"{source}: {name}: expected {form[:100]}, got {saved_form[:100]}")


def on_one_device(model: M) -> M | None:
    """Return a model's copy on one device; all processes call it.

    The device is the main process's first.
    """
    graph, state = nnx.split(model)
    arrays = host_arrays(state)
    if not is_main_process():
        return None
    paths = [path for path, _ in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(zip(paths, jax.device_put(list(arrays.values())), strict=True)))
