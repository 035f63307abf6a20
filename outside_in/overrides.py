"""Keys on the command line: `KEY=VALUE` for one start of a run, or for a new run.

docs/architecture.md says why no library parses them.
"""

import contextlib
import difflib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from outside_in.config import ModelConfig, TrainConfig
from outside_in.config_files import load_config, parse_config
from outside_in.storage.run_directory import RunDirectory
from outside_in.storage.strict_json import parse_value, shortened

Keys = dict[str, Any]
MODEL = "model."  # before the keys of model.json
KNOWN = (
    *{**TrainConfig.model_fields, **TrainConfig.leaves()},
    *(MODEL + key for key in ModelConfig.leaves()),
)


def parse(changes: Iterable[str]) -> Keys:
    """Parse `KEY=VALUE` arguments; return values by key.

    KEY is one of train.json, such as learning_rate or mesh.fsdp, or model.KEY. VALUE is JSON, or else text.
    Raises ValueError for another form, an unknown key, and one that comes twice.
    """
    values: Keys = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key:
            raise ValueError(f"{change}: expected KEY=VALUE, such as learning_rate=0.001 or model.n_layers=6")
        if key not in KNOWN:
            raise ValueError(f"unknown key {key!r}; {_hint(key)}")
        if key in values:
            raise ValueError(f"{key}: expected once, got it twice; keep one")
        try:
            values[key] = parse_value(text)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return values


def _hint(key: str) -> str:
    spellings = {known.removeprefix(MODEL): known for known in KNOWN} | {known: known for known in KNOWN}
    close = difflib.get_close_matches(key.replace("-", "_"), spellings, n=1)
    return f"did you mean {spellings[close[0]]!r}?" if close else "`uv run train.py --help-keys` lists them"


def as_key(option: str) -> str | None:
    """Return the key that an option like `--learning-rate` stands for; None if there is none."""
    name = option.lstrip("-").replace("-", "_")
    return next((key for key in (name, MODEL + name) if key in KNOWN), None)


def apply(model: Keys, train: Keys, values: Mapping[str, Any]) -> None:
    """Change the keys of the two files."""
    for key, value in values.items():
        keys, name = (model, key.removeprefix(MODEL)) if key.startswith(MODEL) else (train, key)
        outer, dot, inner = name.partition(".")
        old = keys.get(outer)
        keys[outer] = {**(old if isinstance(old, dict) else {}), inner: value} if dot else value


def top_key(key: str) -> str:
    """Return the key of the file that holds a key: `mesh` for `mesh.fsdp`."""
    return key if key.startswith(MODEL) else key.partition(".")[0]


def load_run(run: RunDirectory, changes: Sequence[str]) -> tuple[ModelConfig, TrainConfig, list[str]]:
    """Read a run's two files, with overrides for one start; also return lines that say them.

    Raises ValueError for a key that cannot change within a run, with the line that makes a new one.
    """
    model_config, written = load_config(run.model_config, ModelConfig), load_config(run.train_config, TrainConfig)
    files = {MODEL + key: value for key, value in model_config.model_dump().items()}
    files |= written.model_dump() | in_effect(TrainConfig.leaves(), written)
    values = {key: value for key, value in parse(changes).items() if not _is_same(value, files[key])}
    fatal = [key for key in values if key.startswith(MODEL) or TrainConfig.on_resume(top_key(key)) == "fatal"]
    if fatal:
        raise ValueError(f"{', '.join(fatal)}: cannot change within a run; make a new one: {new_line(run, changes)}")
    keys = written.model_dump()
    apply({}, keys, values)
    config = parse_config(json.dumps(keys), TrainConfig, f"{run.train_config} with {shlex.join(changes)}")
    old, new = in_effect(values, written), in_effect(values, config)
    pairs = zip(as_arguments(new), old.values(), strict=True)
    return model_config, config, [f"for this start: {pair} ({run.train_config}: {json.dumps(v)})" for pair, v in pairs]


def _is_same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)  # 15 is 15.0, but 1 is not true


def in_effect(keys: Iterable[str], config: TrainConfig) -> Keys:
    """Return the values that some keys have in a config."""
    values: Keys = {}
    for key in keys:
        value = config.model_dump()
        for part in key.split("."):
            value = value[part]
        values[key] = value
    return values


def as_trained(run: RunDirectory, config: TrainConfig, meta: Mapping[str, Any]) -> TrainConfig:
    """Return a run's config with the overrides that a checkpoint's meta records."""
    recorded, keys = meta.get("overrides", {}), config.model_dump()
    source = f"{run.train_config} with the overrides of its newest checkpoint"
    if not isinstance(recorded, dict):
        raise ValueError(f"{source}: expected an object, got {shortened(json.dumps(recorded))}")  # noqa: TRY004
    apply({}, keys, recorded)
    return parse_config(json.dumps(keys), TrainConfig, source)


def as_arguments(values: Mapping[str, Any]) -> list[str]:
    """Return values by key as `KEY=VALUE` arguments, not quoted for a shell."""
    return [f"{key}={_written(value)}" for key, value in values.items()]


def _written(value: Any) -> str:
    with contextlib.suppress(ValueError):
        if isinstance(value, str) and parse_value(value) == value:
            return value
    return json.dumps(value)


def train_line(path: Path, changes: Sequence[str]) -> str:
    """Return what to type to train a run under overrides, quoted for a shell."""
    return shlex.join(["uv", "run", "train.py", str(path), *changes])


def new_line(run: RunDirectory, changes: Sequence[str]) -> str:
    """Return what to type to make a run like another one with these changes, quoted for a shell."""
    path = run.path if run.path.name.strip(".") else run.path.resolve()
    number = 2
    while (new := path.with_name(f"{path.name}-{number}")).exists() or new.is_symlink():
        number += 1
    return shlex.join(["uv", "run", "train.py", "--new", str(new), "--like", str(run.path), *changes])
