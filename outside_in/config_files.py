"""Configs that are strict JSON: how a key is declared, a file read, and a mistake named in one line."""

import difflib
import json
import re
import struct
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from outside_in.storage.strict_json import parse_object, read_text, shortened

OnResume = Literal["fatal", "announced", "free"]

MAX_COUNT = 10**15  # more than any machine holds: what is computed from counts stays within float64
MIN_FLOAT32 = 2.0**-126  # devices take smaller ones for 0


def key(on_resume: OnResume, meaning: str, default: Any = ..., *, before: Any = ..., **limits: Any) -> Any:
    """Declare a config key. Takes its class on resume, meaning, default (none: required) and pydantic limits.

    Whoever changes a default says in `before` what it was, for the checkpoints that lack the key.
    """
    extra = {"on_resume": on_resume} | ({} if before is ... else {"before": before})
    return Field(default, description=meaning, json_schema_extra=extra, **limits)


def _as_float32(value: float) -> float:
    """Refuse numbers that become 0, 1 or infinity as float32."""
    try:
        [single] = struct.unpack("<f", struct.pack("<f", value))
    except OverflowError:
        raise ValueError(f"expected a number that float32 can hold, got {value!r}") from None
    if value not in (0, 1) and single in (0, 1):
        raise ValueError(f"expected a number that float32 can hold, got {value!r}, which becomes {single:g}")
    return value


def _max_norm(value: float) -> float:
    """Refuse numbers that become 0 as float32. Large ones will do, since no gradient's norm reaches them."""
    return value if value > 1 else _as_float32(value)


Count = Annotated[int, Field(le=MAX_COUNT)]
Float32 = Annotated[float, AfterValidator(_as_float32)]
MaxNorm = Annotated[float, AfterValidator(_max_norm)]


class Config(BaseModel):
    """The base of all configs: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def whole_numbers(cls, content: Any) -> Any:
        """Take 1e9 for an integer where one is expected."""
        if not isinstance(content, dict):
            return content
        whole = {
            name: int(value)
            for name, value in content.items()
            if isinstance(value, float) and value.is_integer() and name in cls.model_fields
            if cls.model_fields[name].annotation in (int, Count | None)
        }
        return content | whole

    @classmethod
    def before(cls, name: str) -> Any:
        """Return what key `name` was, in effect, in checkpoints that lack it; its default unless declared."""
        field = cls.model_fields[name]
        return field.json_schema_extra.get("before", field.default)  # type: ignore[union-attr]

    @classmethod
    def on_resume(cls, name: str) -> OnResume:
        """Return whether changing key `name` is fatal, announced or free on resume."""
        return cls.model_fields[name].json_schema_extra["on_resume"]  # type: ignore[index]

    @classmethod
    def leaves(cls) -> dict[str, FieldInfo]:
        """Return the fields by key, those of a config inside as `mesh.data` and `mesh.fsdp`."""
        fields: dict[str, FieldInfo] = {}
        for name, field in cls.model_fields.items():
            kind = field.annotation
            is_config = isinstance(kind, type) and issubclass(kind, Config)
            fields |= {f"{name}.{key}": inner for key, inner in kind.leaves().items()} if is_config else {name: field}
        return fields


PYTHON = {"None": "null", "True": "true", "False": "false"}  # and what they are in JSON
IN_JSON = {
    "a valid tuple": 'a list such as ["tensorboard"]',
    "a valid boolean": "true or false",
    "a valid number": "a number such as 0.001",
    "a valid dictionary or instance of MeshConfig": 'an object such as {"fsdp": 2}',
    **PYTHON,
}

C = TypeVar("C", bound=Config)


def load_config(path: Path, config_class: type[C]) -> C:
    """Read and validate a config.

    Raises ValueError with one line that names the file, the key, what was expected and what was found.
    """
    text = read_text(path, "a config of a few lines", "; write one, or copy that of runs/quickstart")
    return parse_config(text, config_class, str(path))


def parse_config(text: str, config_class: type[C], source: str) -> C:
    """Validate the text of a config, which must be strict JSON.

    Raises ValueError; `source` names the text in its message.
    """
    content = parse_object(text, source)
    try:
        return config_class(**content)
    except pydantic.ValidationError as error:
        raise ValueError(f"{source}: {_first_problem(error, config_class)}") from None


def _first_problem(error: pydantic.ValidationError, config_class: type[Config]) -> str:
    # A typo in a required key is two errors, of which the unknown key says more.
    first = min(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    name = shortened(".".join(str(part) for part in first["loc"]))
    if first["type"] == "missing":
        return f"missing key {name!r}"
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, {**config_class.model_fields, **config_class.leaves()}, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(config_class.model_fields)}"
        return f"unknown key {name!r}; {hint}"
    if first["type"] == "value_error":  # from the validators above, whose messages are complete
        return (f"{name}: " if name else "") + first["msg"].removeprefix("Value error, ")[:300]
    got = shortened(json.dumps(first["input"], default=str))
    expected = first["msg"].replace("Input should be", "expected").replace("String should have", "expected")
    for python, as_json in IN_JSON.items():
        expected = expected.replace(python, as_json)
    choices = re.findall(r"'([^']+)'", expected) if first["type"] == "literal_error" else []
    text = first["input"] if isinstance(first["input"], str) else ""
    close = difflib.get_close_matches(text, choices, n=1) or PYTHON.get(text, "").split()
    return f"{name}: {expected}, got {got}" + (f"; did you mean {close[0]!r}?" if close else "")
