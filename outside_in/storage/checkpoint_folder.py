"""A run's `checkpoints/`: which checkpoints are in it, which of them are its history, and which is the best."""

import calendar
import contextlib
import re
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from outside_in.storage.strict_json import read_json

NAME = re.compile(r"([0-9]{8}T[0-9]{6}Z)-iteration-([0-9]+)")
TIME_FORMAT = "%Y%m%dT%H%M%SZ"
META_FILE = "meta.json"


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A committed checkpoint; they sort in the order of their commits."""

    path: Path

    @property
    def global_step(self) -> int:
        match = NAME.fullmatch(self.path.name)
        assert match
        return int(match[2])

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Return what was saved beside the arrays. Raises ValueError when it is unreadable, or of another step."""
        meta = read_json(self.path / META_FILE)
        if meta.get("global_step", self.global_step) != self.global_step:
            raise ValueError(
                f"{self.path / META_FILE}: expected global_step {self.global_step}, as in the folder's name"
            )
        return meta

    @property
    def is_validated(self) -> bool:
        """Return whether it was validated and sampled when it was saved."""
        return self.meta.get("is_milestone", True)

    @property
    def is_best(self) -> bool:
        """Return whether it was the best when saved. False if meta.json is damaged."""
        try:
            return self.meta["is_best"] is True
        except (ValueError, KeyError, TypeError):
            return False

    @property
    def loss(self) -> float | None:
        """Return what it is judged by: its validation loss, else the training loss of its period.

        None if it was saved between milestones, which are judged, or its meta.json is damaged.
        """
        with contextlib.suppress(ValueError):
            if not self.is_validated:
                return None
            losses = (self.meta.get(name) for name in ("val_loss", "avg_train_loss"))
            return next((loss for loss in losses if isinstance(loss, float)), None)
        return None


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """List the committed checkpoints in a run's `checkpoints/`, oldest first."""
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"{folder}: a broken link; is its disk mounted?")
    if not folder.is_dir():
        return []
    return sorted(
        Checkpoint(path) for path in folder.iterdir() if _is_name(path.name) and path.is_dir() and not path.is_symlink()
    )


def history(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Return those that the newest one descends from, and itself.

    Whoever resumes from an older checkpoint commits it again, and so leaves what was saved after it.
    """
    kept: list[Checkpoint] = []
    for checkpoint in reversed(checkpoints):
        if not kept or checkpoint.global_step < kept[-1].global_step:
            kept.append(checkpoint)
    return kept[::-1]


def find_best(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """Return the best of the history that a run is on; None when none has been judged."""
    return next((c for c in reversed(history(checkpoints)) if c.is_best), None)


def find_named(checkpoints: list[Checkpoint], which: str) -> Checkpoint | None:
    """Return the checkpoint "best", "latest" or of a name; None without it."""
    if which == "best":
        return find_best(checkpoints)
    return next((c for c in reversed(checkpoints) if which in ("latest", c.path.name)), None)


def beats(meta: dict[str, Any], measure: str, others: list[Checkpoint]) -> bool:
    """Return whether a checkpoint's loss is lower than that of the best before it in its history.

    One that was judged on other tokens does not count.
    """
    best = find_best([other for other in history(others) if other.global_step < meta["global_step"]])
    tokens = "validation" if measure == "val_loss" else "train"
    judged_on = best.meta.get("data") if best else None
    is_judged_alike = isinstance(judged_on, dict) and judged_on.get(tokens) == meta["data"][tokens]
    to_beat = best.meta.get(measure) if best and is_judged_alike else None
    loss = meta.get(measure)
    return loss is not None and not (isinstance(to_beat, float) and to_beat <= loss)


def _is_name(name: str) -> bool:
    try:
        return bool((match := NAME.fullmatch(name)) and time.strptime(match[1], TIME_FORMAT))
    except ValueError:  # no such date
        return False


def next_name(checkpoints: list[Checkpoint], global_step: int) -> str:
    """Return the name of the next checkpoint."""
    # Names must sort in the order of commits, also when the clock was set back or a second has two checkpoints.
    seconds = time.time()
    if checkpoints:
        newest = time.strptime(checkpoints[-1].path.name[:16], TIME_FORMAT)
        seconds = max(seconds, calendar.timegm(newest) + 1)
    return f"{time.strftime(TIME_FORMAT, time.gmtime(seconds))}-iteration-{global_step}"
