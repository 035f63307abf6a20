"""What happened in a run, and when: its start, its resumes, and what changed at each. Checkpoints carry it on."""

import json
import time
from typing import Any

MAX_EVENTS, MAX_TEXT = 100, 500  # the newest, and characters of each: a checkpoint's meta is a few pages
KINDS = {"global_step": int, "time": int | float, "text": str}
MAX_VALUE = 100  # characters
Event = dict[str, Any]


def started(snapshot: dict[str, Any]) -> list[Event]:
    """Return the events of a new run. `snapshot` is what its checkpoints will say of configs and versions."""
    given = [f"{name}={_literal(value)}" for name, value in snapshot.get("overrides", {}).items()]
    return [_event(0, f"started on {snapshot['versions']['device']}{', with ' if given else ''}{' '.join(given)}")]


def resumed(meta: dict[str, Any], snapshot: dict[str, Any]) -> list[Event]:
    """Return the events of a run that resumes from a checkpoint, by its meta."""
    changes = [
        change
        for part in ("model_config", "train_config", "versions", "data")
        for change in _changes(meta[part], snapshot[part])
    ]
    text = "; ".join(["resumed", *changes])
    return [*_read(meta.get("events")), _event(meta["global_step"], text)][-MAX_EVENTS:]


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what differs; a key that `old` lacks came with a later version."""
    pairs = {name: (_literal(old[name]), _literal(new[name])) for name in new if name in old}
    return [f"{name}: {before} → {now}" for name, (before, now) in pairs.items() if before != now]


def _literal(value: Any) -> str:
    return json.dumps(value, default=dict)[:MAX_VALUE]


def _event(step: int, text: str) -> Event:
    return {"global_step": step, "time": round(time.time()), "text": text[:MAX_TEXT]}


def _read(events: Any) -> list[Event]:
    """Return what a checkpoint's meta says, but for what has another form."""
    whole = [event for event in events if isinstance(event, dict)] if isinstance(events, list) else []
    return [event for event in whole if all(isinstance(event.get(name), kind) for name, kind in KINDS.items())]
