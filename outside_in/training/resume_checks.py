"""What may differ between a checkpoint and the run that resumes it."""

import importlib.metadata
import json
import platform
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpointing import META_FILE, find_checkpoints
from outside_in.config import ModelConfig, TrainConfig, devices_at_start, tokens_per_global_step
from outside_in.config_files import Config, OnResume
from outside_in.data.hub import HUB
from outside_in.data.run_length import total_steps
from outside_in.data.tokenizer import Tokenizer
from outside_in.optimizer import SCHEDULE_KEYS, learning_rate_schedule
from outside_in.overrides import as_arguments, top_key
from outside_in.runtime.log import log
from outside_in.storage.checkpoint_folder import Checkpoint
from outside_in.storage.run_directory import RunDirectory

DEFAULTS = {"random numbers": "threefry2x32"}  # of checkpoints that do not say it
OF_VALIDATION = frozenset({"start_val_token", "val_tokens"})  # which choose the validation tokens
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "jaxlib", "numpy")


def snapshot(
    model: ModelConfig, train: TrainConfig, data: dict[str, str | None], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Return configs, versions, tokenizer and fingerprints of the data, for a checkpoint's meta."""
    return {
        "model_config": model.model_dump(),
        "train_config": train.model_dump(),
        "data": data,
        "tokenizer": tokenizer and tokenizer.identity,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions and the device that bit-for-bit repetition depends on."""
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    options: Any = jax.config
    random_numbers = {"random numbers": str(options.jax_default_prng_impl)}  # JAX_DEFAULT_PRNG_IMPL
    return {"python": platform.python_version(), "device": jax.devices()[0].device_kind, **libraries, **random_numbers}


def check_form(meta: dict[str, Any], source: Path) -> None:
    """Raise ValueError when a checkpoint's meta lacks what resuming needs. `source` names its file."""
    expected = dict.fromkeys(("model_config", "train_config", "data", "versions"), dict) | {"seconds_trained": float}
    later = {"seconds_paused": float, "overrides": dict}
    expected |= {name: kind for name, kind in later.items() if name in meta}
    unusable = [name for name, kind in expected.items() if not isinstance(meta.get(name), kind)]
    if unusable:
        raise ValueError(f"{source}: lacks a usable {unusable[0]!r}; resume from another checkpoint with --from")


def check_configs(
    saved: dict[str, Any], model: ModelConfig, train: TrainConfig, *, accept: bool, overrides: Mapping[str, Any]
) -> set[str]:
    """Compare configs and versions with a snapshot; log every allowed difference.

    `overrides` are those of the command line: a change by one of them is accepted. Returns the keys that they change.
    Raises ValueError on a fatal change, and on an announced one unless it is accepted.
    """
    changes: dict[OnResume, dict[str, str]] = {"fatal": {}, "announced": {}, "free": {}}
    for old, new in ((saved["model_config"], model), (saved["train_config"], train)):
        for name, change in _changes(old, new).items():
            changes[new.on_resume(name)][name] = change + _origin(name, overrides, saved.get("overrides", {}))
    if changes["fatal"]:
        raise ValueError(
            f"{'; '.join(changes['fatal'].values())}: this cannot change within a run; undo it or start a new run"
        )
    wanted = {top_key(key) for key in overrides}
    if refused := {name: change for name, change in changes["announced"].items() if name not in wanted and not accept}:
        again = {key: value for key, value in saved.get("overrides", {}).items() if top_key(key) in refused}
        covers_all = refused.keys() == {top_key(key) for key in again}
        remedy = f"repeat {shlex.join(as_arguments(again))}" if covers_all else "undo it"
        raise ValueError(f"{'; '.join(refused.values())}: {remedy}, or resume with --accept-changes")
    allowed = changes["announced"] | changes["free"]
    for change in allowed.values():
        log.info(f"since the checkpoint: {change}")
    for name, version in versions().items():
        if (old_version := saved["versions"].get(name, DEFAULTS.get(name))) != version:
            log.info(f"since the checkpoint: {name} {old_version} → {version}; expect tiny differences")
    return wanted & allowed.keys()


def _origin(name: str, overrides: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    if any(top_key(key) == name for key in overrides):
        return " (on the command line)"
    last = {key: value for key, value in before.items() if top_key(key) == name}
    return f" (the last start had {shlex.join(as_arguments(last))} on its command line)" if last else ""


def check_newest(run: RunDirectory, model: ModelConfig, train: TrainConfig, overrides: Mapping[str, Any]) -> None:
    """Raise ValueError when a run cannot be resumed from its newest checkpoint, by its configs."""
    for checkpoint in find_checkpoints(run.checkpoints)[-1:]:
        check_form(checkpoint.meta, checkpoint.path / META_FILE)
        check_configs(checkpoint.meta, model, train, accept=False, overrides=overrides)
        devices = devices_at_start(train, checkpoint.meta)
        if total := total_steps(model, train, devices):
            check_length(checkpoint, total, tokens_per_global_step(model, train, devices), train)


def num_train_tokens(meta: dict[str, Any]) -> int | None:
    """Return how many training tokens an epoch has, from a checkpoint's meta."""
    match = re.match(r"(\d+) tokens,", str(meta["data"].get("train")))
    return int(match[1]) if match else None


def num_spare(meta: dict[str, Any], num_sequences: int, length: int) -> int:
    """Return a checkpoint's sequences beside the `num_sequences` of an epoch; earlier versions had none."""
    return ((num_train_tokens(meta) or 1) - 1) // length - num_sequences


def check_length(
    checkpoint: Checkpoint | None, total: int, tokens_per_step: int, config: TrainConfig
) -> tuple[int, ...]:
    """Return the steps at which the first epoch was made longer.

    Logs what a new length or schedule does to the learning rate. Raises ValueError when a run cannot have the new
    length.
    """
    count = num_train_tokens(checkpoint.meta) if checkpoint else None
    if checkpoint is None or count is None:
        return ()
    step, old_epochs = checkpoint.global_step, checkpoint.meta["train_config"].get("epochs", 1)
    old_steps, steps = (count - 1) // tokens_per_step, total // config.epochs
    old_total, grown = old_steps * old_epochs, tuple(checkpoint.meta.get("grown", ()))
    if total < step:
        raise ValueError(
            f"train.json: the run would end at step {total:,}, but it is at step {step:,}; undo that, or go back "
            "with --from"
        )
    if steps != old_steps:
        if steps < old_steps or old_epochs > 1:
            raise ValueError(
                f"train.json: an epoch of {steps:,} steps, but this run has epochs of {old_steps:,}, and only a run of "
                "one can get longer ones; change epochs instead, or start a new run"
            )
        grown = (*grown, old_steps)
    saved = checkpoint.meta["train_config"]
    old_config = config.model_copy(update={name: saved.get(name, config.before(name)) for name in SCHEDULE_KEYS})
    if total != old_total or config != old_config:
        schedules = (
            learning_rate_schedule(old_config, old_total, tokens_per_step),
            learning_rate_schedule(config, total, tokens_per_step),
        )
        old, new = (f"{np.asarray(schedule(step)).item():.3g}" for schedule in schedules)
        length = f"the run has {total:,} steps now, not {old_total:,}; " if total != old_total else ""
        change = "as before" if new == old else f"not {old}"
        log.info(f"{length}by its schedule, the learning rate after step {step:,} is {new} now, {change}")
    return grown


def check_data(saved: dict[str, Any], data: dict[str, str | None], *, accept: bool) -> None:
    """Raise ValueError when the tokens differ from a snapshot's. Validation tokens may differ with `accept`."""
    for split, remedy in (("train", "start a new run"), ("validation", "resume with --accept-changes")):
        old, new = saved["data"].get(split), data[split]
        if old != new and not (split == "validation" and accept):
            revisions = f"{saved['data'].get('revision')} → {data.get('revision')}"
            origin = f" (revisions of the Hub dataset: {revisions})" if "None" not in revisions else ""
            raise ValueError(
                f"the {split} tokens differ from the checkpoint's: {old} → {new}{origin}; restore them or {remedy}"
            )


def check_tokenizer(saved: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise ValueError when the data's tokenizer is not that of a snapshot. An unknown one may be the same."""
    old, present = saved.get("tokenizer"), new["tokenizer"]
    if old and present and old != present:
        raise ValueError(
            f"the tokenizer of the data differs from the checkpoint's: {json.dumps(old)} → {json.dumps(present)}; "
            "restore it, or start a new run"
        )


def _changes(old: dict[str, Any], new: Config) -> dict[str, str]:
    # A key that the snapshot lacks came with a later version: then it was what runs without it did.
    whole = {name: new.before(name) for name in type(new).model_fields if name not in old} | old
    return {
        name: f"{name}: {json.dumps(whole[name], default=dict)} → {json.dumps(value)}"
        for name, value in new.model_dump().items()
        if _meaning(name, whole[name]) != _meaning(name, value)
    }


def _meaning(name: str, value: Any) -> Any:
    if isinstance(value, Config):
        return dict(value)
    if isinstance(value, tuple):
        return list(value)
    return value.removeprefix(HUB) if name == "dataset" and isinstance(value, str) else value
