"""What may differ between a checkpoint and the run that resumes it."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import jax

from checkpointing import META_FILE, find_checkpoints
from outside_in.config import Config, ModelConfig, OnResume, TrainConfig
from outside_in.data.hub import HUB
from outside_in.data.tokenizer import Tokenizer
from outside_in.runtime.log import log
from outside_in.storage.run_directory import RunDirectory

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
    return {"python": platform.python_version(), "device": jax.devices()[0].device_kind, **libraries}


def check_form(meta: dict[str, Any], source: Path) -> None:
    """Raise ValueError when a checkpoint's meta lacks what resuming needs. `source` names its file."""
    expected = dict.fromkeys(("model_config", "train_config", "data", "versions"), dict) | {"seconds_trained": float}
    expected |= {"seconds_paused": float} if "seconds_paused" in meta else {}
    unusable = [name for name, kind in expected.items() if not isinstance(meta.get(name), kind)]
    if unusable:
        raise ValueError(f"{source}: lacks a usable {unusable[0]!r}; resume from another checkpoint with --from")


def check_configs(saved: dict[str, Any], model: ModelConfig, train: TrainConfig, *, accept: bool) -> None:
    """Compare configs and versions with a snapshot; log every allowed difference.

    Raises ValueError on a fatal change, and on an announced one unless `accept`.
    """
    changes: dict[OnResume, list[str]] = {"fatal": [], "announced": [], "free": []}
    for old, new in ((saved["model_config"], model), (saved["train_config"], train)):
        for name, change in _changes(old, new).items():
            changes[new.on_resume(name)].append(change)
    if changes["fatal"]:
        raise ValueError(f"{'; '.join(changes['fatal'])}: this cannot change within a run; undo it or start a new run")
    if changes["announced"] and not accept:
        raise ValueError(f"{'; '.join(changes['announced'])}: undo it, or resume with --accept-changes")
    for change in changes["announced"] + changes["free"]:
        log.info(f"since the checkpoint: {change}")
    for name, version in versions().items():
        if (old_version := saved["versions"].get(name)) != version:
            log.info(f"since the checkpoint: {name} {old_version} → {version}; expect tiny differences")


def check_newest(run: RunDirectory, model: ModelConfig, train: TrainConfig) -> None:
    """Raise ValueError when a run cannot be resumed from its newest checkpoint, by its configs."""
    for checkpoint in find_checkpoints(run.checkpoints)[-1:]:
        check_form(checkpoint.meta, checkpoint.path / META_FILE)
        check_configs(checkpoint.meta, model, train, accept=False)


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
    # A key that the snapshot lacks came with a later version: there is nothing to compare it with.
    return {
        name: f"{name}: {json.dumps(old[name])} → {json.dumps(value)}"
        for name, value in new.model_dump().items()
        if name in old and _meaning(name, old[name]) != _meaning(name, value)
    }


def _meaning(name: str, value: Any) -> Any:
    return value.removeprefix(HUB) if name == "dataset" and isinstance(value, str) else value
