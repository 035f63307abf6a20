"""Checkpoints: save, verify, load, prune. Sees `nnx.Module`s, not GPTs.

The protocol: everything is written into a staging folder and fsynced, `manifest.json` (size and SHA-256 of every other
file) comes last, one rename makes the checkpoint visible, then the links move, then old ones go. So a folder with a
checkpoint's name is complete unless the disk has damaged it, and the manifest shows that.
"""

import contextlib
import errno
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax import nnx

from outside_in.runtime import processes
from outside_in.runtime.log import log
from outside_in.storage import manifest
from outside_in.storage.atomic import fsync, fsync_tree, os_errors
from outside_in.storage.checkpoint_folder import (
    META_FILE,
    Checkpoint,
    find_best,
    find_checkpoints,
    find_named,
    history,
    next_name,
)
from outside_in.weights import check_structure, fill_like, host_arrays, load_weights, named_arrays, save_weights

STAGING, DAMAGED = ".staging-", "damaged-"
NO_DAMAGE = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT}
MODEL_FILE, OPTIMIZER_FOLDER = "model.safetensors", "optimizer"


def select_checkpoint(folder: Path, which: str | None) -> Checkpoint | None:
    """Return the newest good checkpoint, or `which`; None without any.

    `which` is "best", "latest" or a name. Newer, damaged ones are renamed, with a warning: only for the lock's holder.
    Raises ValueError when the one asked for is missing or damaged, or all are damaged, or one cannot be read just now.
    """
    checkpoints = find_checkpoints(folder)
    if which is not None:
        return _named(folder, checkpoints, which)
    damaged: list[tuple[Checkpoint, ValueError]] = []
    for checkpoint in reversed(checkpoints):
        try:
            verify(checkpoint)
        except ValueError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in NO_DAMAGE:
                raise  # it may well be whole; when this process may read it again, it shall still be the newest
            damaged.append((checkpoint, error))
        else:
            for bad, error in damaged:
                _set_aside(bad, error)
            return checkpoint
    if damaged:  # they keep their names: a start from the beginning is for the user to decide
        raise ValueError(f"{damaged[0][1]}; no good checkpoint is left: move {folder} away to start again")
    return None


def _named(folder: Path, checkpoints: list[Checkpoint], which: str) -> Checkpoint:
    wanted = find_named(checkpoints, which)
    if wanted is None:
        names = ", ".join(c.path.name for c in checkpoints) or "none"
        raise ValueError(f"{folder}: no checkpoint {which!r}; available: {names}")
    verify(wanted)
    return wanted


def _set_aside(checkpoint: Checkpoint, error: ValueError) -> None:
    aside = checkpoint.path.with_name(f"{DAMAGED}{checkpoint.path.name}")
    while aside.exists():
        aside = aside.with_name(f"{aside.name}-again")
    checkpoint.path.rename(aside)
    repair_links_and_prune(aside.parent)
    log.warning(f"skipping a damaged checkpoint: {error}; kept as {aside.name}")


@dataclass(frozen=True)
class HostCopy:
    """Copies of the parameters and the optimizer's state, by dot-joined paths."""

    weights: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]  # empty where `staging` has it already
    staging: Path | None = None  # the folder that `save` finishes, where several processes have begun it


def copy_to_host(model: nnx.Module, optimizer: nnx.Optimizer) -> HostCopy:
    """Copy what a checkpoint holds to the host."""
    return HostCopy(host_arrays(nnx.state(model)), host_arrays(nnx.state(optimizer)))


def snapshot(folder: Path, model: nnx.Module, optimizer: nnx.Optimizer, global_step: int) -> HostCopy:
    """Copy what a checkpoint holds, while training waits.

    Several processes write the optimizer's state here: all of them call this, and only the main one calls `save`.
    """
    if not processes.is_distributed():
        return copy_to_host(model, optimizer)
    weights, staging = host_arrays(nnx.state(model)), folder / f"{STAGING}iteration-{global_step}"
    processes.on_main_process(_make_staging, folder, staging)
    with processes.propagate_errors(), os_errors(staging):
        _write_optimizer(staging, named_arrays(nnx.state(optimizer)))
    return HostCopy(weights, {}, staging)


def _make_staging(folder: Path, staging: Path) -> None:
    if not folder.exists():
        folder.mkdir()
        fsync(folder.parent)
    remove_staging(folder)
    staging.mkdir()


def save(
    folder: Path,
    state: HostCopy,
    meta: dict[str, Any],
    model_json: str,
    files: dict[str, bytes] = {},  # noqa: B006
) -> Checkpoint:
    """Commit a checkpoint of `meta["global_step"]`, with other `files` by name, and move the links.

    Raises OSError when the disk refuses; then nothing of it is left, and everything older is as it was.
    """
    name = next_name(find_checkpoints(folder), meta["global_step"])
    staging = state.staging or folder / f"{STAGING}{name}"
    if state.staging is None:
        _make_staging(folder, staging)
    try:
        with os_errors(staging):
            for file, content in files.items():
                (staging / file).write_bytes(content)
            _write(staging, state, meta, model_json)
            staging.rename(folder / name)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    with contextlib.suppress(OSError):  # it is committed; who settles the folder hears of a failure
        fsync(folder)
        _point_links(folder)
    return Checkpoint(folder / name)


def _write(staging: Path, state: HostCopy, meta: dict[str, Any], model_json: str) -> None:
    save_weights(staging / MODEL_FILE, state.weights, model_json, meta.get("tokenizer"))
    if state.staging is None:
        _write_optimizer(staging, state.optimizer)
    (staging / META_FILE).write_text(json.dumps(meta, indent=2, allow_nan=False) + "\n")
    manifest.write(staging)
    fsync_tree(staging)


def _write_optimizer(staging: Path, arrays: Any) -> None:
    ocp.save(str((staging / OPTIMIZER_FOLDER).absolute()), arrays)


def verify(checkpoint: Checkpoint) -> None:
    """Compare every file of the manifest with it. Raises ValueError that names the first bad file."""
    manifest.check(checkpoint.path, required=(META_FILE,))
    _ = checkpoint.meta  # raises when the whole folder is a copy of another checkpoint's


def load(checkpoint: Checkpoint, model: nnx.Module, optimizer: nnx.Optimizer) -> None:
    """Load a verified checkpoint into a model and its optimizer.

    Raises ValueError when names, shapes or dtypes differ; then both are as they were.
    """
    path = checkpoint.path
    new_weights = fill_like(nnx.state(model), load_weights(path / MODEL_FILE), path / MODEL_FILE)
    stored: Any = ocp.metadata(str((path / OPTIMIZER_FOLDER).absolute())).metadata
    try:
        check_structure(nnx.state(optimizer), stored, path / OPTIMIZER_FOLDER)
    except ValueError as error:
        raise ValueError(
            f"{error}: the optimizer has changed since, so this run cannot be resumed; to keep its weights, "
            f'start a new run with "initial_weights": "{path / MODEL_FILE}" in its train.json'
        ) from None
    new_state = fill_like(nnx.state(optimizer), _load_optimizer(checkpoint), path / OPTIMIZER_FOLDER)
    nnx.update(model, new_weights)
    nnx.update(optimizer, new_state)


def read(checkpoint: Checkpoint) -> HostCopy:
    """Return the arrays of a verified checkpoint, without a model."""
    stored = load_weights(checkpoint.path / MODEL_FILE), _load_optimizer(checkpoint)
    weights, optimizer = ({name: np.asarray(array) for name, array in arrays.items()} for arrays in stored)
    return HostCopy(weights, optimizer)


def _load_optimizer(checkpoint: Checkpoint) -> dict[str, Any]:
    """Load the optimizer's state on the host, from any devices."""
    path = str((checkpoint.path / OPTIMIZER_FOLDER).absolute())
    stored: Any = ocp.metadata(path).metadata
    on_host: Any = {name: np.empty(array.shape, array.dtype) for name, array in stored.items()}
    saved: Any = ocp.load(path, on_host)
    return saved


def prune(folder: Path, keep: int | None) -> None:
    """Remove all but the `keep` newest checkpoints and the best one. With `keep` None, all stay."""
    checkpoints = find_checkpoints(folder)
    if keep is None or len(checkpoints) <= keep:
        return
    best, kept = find_best(checkpoints), history(checkpoints)
    for checkpoint in checkpoints[:-keep]:
        if checkpoint != best:
            if best and best.loss and checkpoint.loss and checkpoint.loss < best.loss and checkpoint not in kept:
                log.warning(
                    f"removing {checkpoint.path.name}, which this run has left: its loss, {checkpoint.loss:.4f}, is "
                    f"lower than {best.loss:.4f} of {best.path.name}, now the best"
                )
            doomed = checkpoint.path.with_name(f"{STAGING}{checkpoint.path.name}")  # never half a checkpoint
            checkpoint.path.rename(doomed)
            shutil.rmtree(doomed)


def repair_links_and_prune(folder: Path, keep: int | None = None) -> None:
    """Remove what is half-written, repair the links, and prune; only for the lock's holder."""
    remove_staging(folder)
    _point_links(folder)
    prune(folder, keep)


def remove_staging(folder: Path) -> None:
    """Remove what a killed process left half-written; only for the lock's holder."""
    for leftover in folder.glob(f"{STAGING}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _point_links(folder: Path) -> None:
    checkpoints = find_checkpoints(folder)
    for link, target in (("latest", checkpoints[-1] if checkpoints else None), ("best", find_best(checkpoints))):
        with contextlib.suppress(OSError):  # a hint, which some disks cannot hold
            _point(folder / link, target.path.name if target else None, checkpoints)


def _point(link: Path, target: str | None, checkpoints: list[Checkpoint]) -> None:
    """Make a link point to a target, or to nothing. What a copying program has made of it is removed first."""
    if link.is_dir() and not link.is_symlink() and _is_copy(link, checkpoints):
        shutil.rmtree(link)
    if target is None:
        link.unlink(missing_ok=True)
    elif not link.is_symlink() or link.readlink() != Path(target):
        temporary = link.with_name(f".{link.name}.tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(link)


def _is_copy(folder: Path, checkpoints: list[Checkpoint]) -> bool:
    """Return whether a folder is a copy of a checkpoint, by its manifest."""
    described = folder / manifest.MANIFEST_FILE
    content = described.read_bytes() if described.is_file() else b""
    return any(content == (c.path / manifest.MANIFEST_FILE).read_bytes() for c in checkpoints)
