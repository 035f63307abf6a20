"""A document from a row, or why there is none."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True)
class ReadOptions:
    """How to find documents in files: see `prepare_data.py --help`."""

    field: str = "text"
    separator: str | None = None
    errors: Literal["strict", "replace"] = "strict"
    skip_bad: bool = False


class Bad(NamedTuple):
    """A document that cannot be read, and why."""

    reason: str


Document = str | Bad


def text_of(row: Any, field: str, where: str) -> Document:
    """Return the text in a field of a row. `meta.text` is the field `text` in `meta`, unless a field is called so."""
    if not isinstance(row, dict):
        return Bad(f"{where}: expected a JSON object, got {type(row).__name__}")
    value = row
    for name in [field] if field in row else field.split("."):
        if not isinstance(value, dict) or name not in value:
            return Bad(f"{where}: no field {field!r}; --field takes one of {listed(_fields(row))}")
        value = value[name]
    return value if isinstance(value, str) else Bad(f"{where}: expected text in {field!r}, got {type(value).__name__}")


def accepted(document: Document, reading: ReadOptions) -> Document:
    """Return a document, bad or not. Raises ValueError for a bad one unless these are skipped."""
    if isinstance(document, Bad) and not reading.skip_bad:
        raise ValueError(f"{document.reason}; or leave out what cannot be read with --skip-bad")
    return document


def _fields(row: dict[Any, Any]) -> Iterator[str]:
    for name, value in row.items():
        yield from (f"{name}.{inner}" for inner in value) if isinstance(value, dict) else [str(name)]


def listed(names: Iterable[str]) -> str:
    return ", ".join(itertools.islice(names, 20)) or "none"
