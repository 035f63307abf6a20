"""Strict JSON: no duplicate keys, no NaN, no excessive depth or size."""

import json
import stat
from pathlib import Path
from typing import Any

MAX_BYTES = 1_000_000  # configs, and what checkpoints say of themselves, are a few pages
MAX_LEVELS = 10  # of JSON in JSON
JSON_NAMES = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError with one line that names the file."""
    return parse_object(read_text(path, "a few pages of JSON", max_bytes=max_bytes), str(path))


def read_text(path: Path, expected: str, remedy: str = "", max_bytes: int = MAX_BYTES) -> str:
    """Read a UTF-8 file of at most `max_bytes`. Raises ValueError; `expected` and `remedy` go into its message."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise ValueError(f"{path}: expected a JSON file, got a folder or a device")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ValueError(f"{path}: expected {expected}, got {path.stat().st_size:,} bytes")
        return content.decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: expected a JSON file, found nothing{remedy}") from None
    except OSError as error:
        raise ValueError(f"{path}: expected a JSON file, cannot read it ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got other bytes at position {error.start}") from None


def parse_object(text: str, source: str) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError; `source` names the text in its message."""
    if text.startswith("\ufeff"):
        raise ValueError(f"{source}: starts with a byte order mark (BOM); save it as plain UTF-8")
    try:
        content = json.loads(text, object_pairs_hook=_object_without_duplicates, parse_constant=_refuse_constant)
        if _levels(content) > MAX_LEVELS:
            raise RecursionError
        if isinstance(content, dict):
            return content
        problem = f"expected a JSON object {{…}}, got {JSON_NAMES[type(content)]}"
    except json.JSONDecodeError as error:
        problem = f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:
        problem = str(error)
    raise ValueError(f"{source}: {problem}")


def parse_value(text: str) -> Any:
    """Parse a JSON value of the command line; what is not JSON is text.

    Raises ValueError for JSON that is not strict.
    """
    try:
        return json.loads(text, object_pairs_hook=_object_without_duplicates, parse_constant=_refuse_constant)
    except (json.JSONDecodeError, RecursionError):
        return text


def _levels(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_levels, inner), default=0)


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"duplicate key {shortened(repr(name))}; keep one")
        content[name] = value
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; write a finite number")


def shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"
