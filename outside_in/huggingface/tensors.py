"""What the name tables share: tensors of Hugging Face's files, checked all at once before one of them is read."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from outside_in.config import ModelConfig

FLOATS = ("float32", "float16", "bfloat16", "float64")
MAX_SHOWN = 12  # mismatches in one line


def check(
    found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], source: str, problems: Sequence[str] = ()
) -> None:
    """Raise ValueError that names all that is missing, unknown, or of another shape or type.

    Tensors need only `shape` and `dtype`. `problems` are those that are known before.
    """
    problems = [*problems, *(f"{name} is missing" for name in sorted(expected.keys() - found.keys()))]
    problems += [f"{name[:100]!r} is unknown" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        shape, found_shape = expected[name], tuple(found[name].shape)
        if found_shape != shape:
            problems.append(f"{name} is {list(found_shape)}, expected {list(shape)}")
        elif str(found[name].dtype) not in FLOATS:
            problems.append(f"{name} is {found[name].dtype}, expected one of {', '.join(FLOATS)}")
    if problems:
        more = f"; and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
        raise ValueError(f"{source}: {len(problems)} tensors do not fit: {'; '.join(problems[:MAX_SHOWN])}{more}")


def single(array: Any, source: str) -> np.ndarray:
    """Read an array as float32. Raises ValueError when a number is too large for it."""
    with np.errstate(over="ignore"):
        read = np.asarray(array).astype(np.float32)
    if not np.isfinite(read).all():
        raise ValueError(f"{source}: expected finite float32 numbers, got others")
    return read


def check_tied(head: Any, table: np.ndarray, name: str, source: str) -> None:
    """Raise ValueError when a head that config.json ties to the table `name` is there, and another."""
    if head is not None and not np.array_equal(np.asarray(head, np.float32), table):
        raise ValueError(f"{source}: lm_head.weight differs from {name}, but config.json ties them")


def differing(config: ModelConfig, needed: Mapping[str, Any], held: Iterable[str]) -> str:
    """Return the keys of a config that are not as needed, as `KEY=VALUE, …`.

    `held` are those that a format holds. All others must be as they are by default, also those that a fork adds.
    """
    fields, known = type(config).model_fields, {*needed, *held}
    others = {name: x.default for name, x in fields.items() if name not in known and not x.is_required()}
    needed = {**needed, **others}
    found = {name: getattr(config, name) for name, value in needed.items() if getattr(config, name) != value}
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in found.items())


def with_names(message: str, hf_names: Mapping[str, str]) -> str:
    """Replace the names of our keys in an error message by Hugging Face's."""
    for name, hf_name in hf_names.items():
        message = message.replace(name, hf_name)
    return message
