"""Hashes that show which parameters changed, and tables of parameters."""

import fnmatch
import hashlib
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from flax import nnx

from outside_in.reports import markdown
from outside_in.runtime.processes import gather_to_host
from outside_in.weights import named_arrays


def parameter_hashes(model: nnx.Module, pattern: str = "*") -> dict[str, str]:
    """Hash every parameter that a shell pattern matches.

    Returns 16 hex digits of BLAKE2 by dot-joined name, the same on every machine. Raises ValueError when the pattern
    matches nothing.
    """
    arrays = gather_to_host(matching(named_arrays(nnx.state(model, nnx.Param)), pattern))
    return {name: hashlib.blake2b(array.tobytes(), digest_size=8).hexdigest() for name, array in arrays.items()}


def matching(by_name: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    """Return the items whose names a shell pattern matches. Raises ValueError when there are none."""
    names = fnmatch.filter(by_name, pattern)
    if not names:
        raise ValueError(f"no parameter matches {pattern!r}; available: {', '.join(by_name)[:500]}")
    return {name: by_name[name] for name in names}


def hash_line(global_step: int, before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Return a line of hashes after a global step, unchanged ones marked."""
    marked = (
        f"{name} {digest}{' (unchanged)' if before.get(name) == digest else ''}" for name, digest in after.items()
    )
    return f"step {global_step:,}: {', '.join(marked)}"


def check_parameters_changed(before: Mapping[str, str], after: Mapping[str, str], matrices: Collection[str]) -> None:
    """Raise RuntimeError when no parameter changed, or none of the matrices.

    Biases do not count if there are matrices: they start at 0, which any update changes, however small.
    """
    changed = {name for name in before if before[name] != after[name]}
    if not changed or (matrices and changed.isdisjoint(matrices)):
        what = "no matrix, only " + ", ".join(sorted(changed)[:3]) if changed else "no parameter"
        raise RuntimeError(
            f"the first update changed {what}; usual causes: a mutating step under jax.jit instead of nnx.jit, "
            "learning_rate 0 or too small for float32, gradients that are all zero"
        )


def array_table(arrays: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray] | None = None) -> list[str]:
    """Return the lines of a Markdown table of arrays.

    It has shape, norm, mean, std, share of zeros, NaN or Inf. With `others`, also how far each of those is from its
    namesake, relative to the latter's norm.
    """
    headings = ["parameter", "shape", "norm", "mean", "std", "zeros", "NaN/Inf"]
    if others is not None:
        headings.append("relative change")
    rows = []
    for name in sorted(arrays.keys() | (others or {}).keys(), key=_by_numbers):
        row = [name, *_statistics(arrays[name])] if name in arrays else [name, "missing", *["–"] * 5]
        if others is not None:
            row.append(_change(arrays.get(name), others.get(name)))
        rows.append(row)
    return markdown.table(headings, rows, left=2)


def _by_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]  # block 9 before block 10


def _statistics(array: np.ndarray) -> list[str]:
    values = np.asarray(array, np.float64)
    good = values[np.isfinite(values)]
    summary = (np.linalg.norm(good), good.mean(), good.std()) if good.size else (math.nan,) * 3
    shape = " × ".join(map(str, array.shape)) or "scalar"
    return [
        shape,
        *(f"{value:.4g}" for value in summary),
        f"{np.mean(values == 0):.2%}",
        f"{values.size - good.size:,}",
    ]


def _change(array: np.ndarray | None, other: np.ndarray | None) -> str:
    if array is None or other is None:
        return "only in one"
    if array.shape != other.shape:
        return "other shape"
    with np.errstate(all="ignore"):
        old, new = np.asarray(array, np.float64), np.asarray(other, np.float64)
        return f"{np.linalg.norm(new - old) / np.linalg.norm(old):.4g}" if (old != new).any() else "0"
