"""The table of `train.py --help-keys`: what every key of a run takes, and what it is for."""

import json
import shutil
import textwrap
from typing import Annotated, Any

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from outside_in.config import ModelConfig, TrainConfig
from outside_in.config_files import Config
from outside_in.overrides import MODEL

WIDTHS = {"key": 28, "on resume": 10, "default": 13}
MAX_WIDTH = 100
EXACT = 10**10  # larger limits are powers of ten
NAMES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true | false"}
LIMITS = {  # pydantic's name of each, JSON schema's, and how it is shown
    "ge": ("minimum", ">= {}"),
    "gt": ("exclusiveMinimum", "> {}"),
    "le": ("maximum", "<= {}"),
    "lt": ("exclusiveMaximum", "< {}"),
    "min_length": ("minLength", "(not empty)"),
}
CLASSES = [
    "fatal: cannot change within a run; --new makes another one.",
    "announced: a run that has a checkpoint takes the change with --accept-changes, or as KEY=VALUE on the line.",
    "free: may change at every start.",
]


def key_table() -> list[str]:
    """Return the lines of the table, as wide as the terminal."""
    width = min(shutil.get_terminal_size().columns, MAX_WIDTH)
    lines = ["".join(name.ljust(size) for name, size in WIDTHS.items()) + "type and limits"]
    for title, config_class, prefix in (("model.json", ModelConfig, MODEL), ("train.json", TrainConfig, "")):
        lines += ["", title, *_entries(config_class, prefix, width)]
    return [*lines, "", *(line for text in CLASSES for line in _wrap(text, width))]


def _entries(config_class: type[Config], prefix: str, width: int) -> list[str]:
    lines = []
    for name, field in config_class.leaves().items():
        extra: Any = field.json_schema_extra
        default = "required" if field.is_required() else json.dumps(field.default)
        cells = zip((prefix + name, extra["on_resume"], default), WIDTHS.values(), strict=True)
        start = "".join(f"{cell} ".ljust(size) for cell, size in cells)
        lines += _wrap(values(field), width, start, " " * sum(WIDTHS.values()))
        lines += _wrap(field.description or "", width, "    ", "    ")
    return lines


def _wrap(text: str, width: int, first: str = "", later: str = "  ") -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)


def values(field: FieldInfo) -> str:
    """Return which values a key takes: type and limits, or all of them."""
    kind: Any = field.annotation
    schema = TypeAdapter(Annotated[kind, field]).json_schema()
    given = {name: getattr(item, name) for item in field.metadata for name in LIMITS if hasattr(item, name)}
    return " | ".join(_values(kind, given) for kind in schema.get("anyOf", [schema]))


def _values(schema: dict[str, Any], given: dict[str, float]) -> str:
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    if schema["type"] == "null":
        return "null"
    if schema["type"] == "array":
        return f"list of {_values(schema['items'], {})}"
    found = {shown: schema.get(name, given.get(of_pydantic)) for of_pydantic, (name, shown) in LIMITS.items()}
    limits = ", ".join(shown.format(_number(limit)) for shown, limit in found.items() if limit is not None)
    return f"{NAMES[schema['type']]} {limits}".rstrip()


def _number(value: float) -> str:
    return f"{value:,.10g}" if abs(value) < EXACT else f"{value:.0e}".replace("e+", "e")
