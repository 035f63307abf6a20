"""The page of one run. Never touches JAX."""

import calendar
import contextlib
import json
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from outside_in.config import ModelConfig, TrainConfig
from outside_in.config_files import Config
from outside_in.data.tokenizer import bits_per_byte
from outside_in.reports import page_charts
from outside_in.reports.charts import over_steps
from outside_in.reports.page import Page, Tile, moment, table
from outside_in.storage import samples
from outside_in.storage.checkpoint_folder import TIME_FORMAT, Checkpoint, find_best, find_checkpoints
from outside_in.storage.records import Records
from outside_in.storage.run_directory import RunDirectory
from outside_in.storage.strict_json import read_json

MAX_SAMPLES = 100  # checkpoints whose samples are shown
MAX_REJECTIONS = 50  # the newest, in the table of events
RELOAD_SECONDS = 30.0  # while the run is on


@dataclass(frozen=True)
class RunInProgress:
    """What a run's page shows that its files do not say."""

    run: RunDirectory
    model_config: ModelConfig
    config: TrainConfig
    records: Records  # there may be none yet
    total_steps: int
    versions: dict[str, str] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)  # time, global_step and text of each
    reference_losses: dict[str, float] = field(default_factory=dict)
    bytes_per_token: float | None = None
    mfu_of_one: float | None = None  # the MFU of one token per second


def run_page(this: RunInProgress, ending: str | None = None) -> Page:
    """Return the page of a run that is on, or has ended in some way."""
    records, checkpoints = this.records, find_checkpoints(this.run.checkpoints)
    page = Page(
        title=this.run.path.name,
        status=_status(this, ending),
        x="steps",
        runs=[this.run.path.name],
        clocks=[page_charts.clock(records)] if records else [],
        reload_seconds=None if ending else RELOAD_SECONDS,
    )
    if records:
        page.tiles, page.charts = _tiles(this, checkpoints), _charts(this)
        page.heat_maps = page_charts.heat_maps(records)
    events = [(e["global_step"], e["time"], e["text"]) for e in this.events] + _rejections(this)
    page.marks = [{"step": step, "text": text} for step, _, text in events[: len(this.events)] if step]
    rows = [[moment(seconds), step, text] for step, seconds, text in sorted(events, key=lambda event: event[0])]
    page.tables = [
        table("Events", ["when", "step", "what"], rows),
        table("Checkpoints", *_checkpoints(checkpoints)),
        table("Configuration", ["key", "value", "default"], _configs(this), folded=True),
    ]
    if records:
        rows = [[name, _literal(value)] for name, value in records.last.items()]
        page.tables.append(table("Last line of metrics.jsonl", ["field", "value"], rows, folded=True))
    page.samples = _samples(this.run)
    return page


def _status(this: RunInProgress, ending: str | None) -> str:
    records, total = this.records, this.total_steps
    step = records.last["global_step"] if records else 0
    text = f"{ending or 'running'}: step {step:,} of {total:,}"
    if records and not ending and step < total:
        recent = float(np.median(records.column("seconds", 100)))
        left = round((total - step) * recent)
        text += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} of steps left"
    return text


def _tiles(this: RunInProgress, checkpoints: list[Checkpoint]) -> list[Tile]:
    records, last = this.records, this.records.last
    validation = over_steps(records, "val_loss")
    tiles: list[Tile] = [("training loss", last["loss"], "of the last step")]
    if len(validation.x):
        step, loss, best = int(validation.x[-1]), float(validation.y[-1]), int(np.argmin(validation.y))
        tiles += [
            ("validation loss", loss, f"at step {step:,}"),
            ("best validation loss", float(validation.y[best]), f"at step {int(validation.x[best]):,}"),
        ]
        if this.bytes_per_token:
            bits = bits_per_byte(loss, this.bytes_per_token)
            tiles.append(("bits per byte", bits, f"of validation, {this.bytes_per_token:.2f} bytes a token"))
    speeds, _ = page_charts.speed(records)
    tiles += [
        ("learning rate", last["learning_rate"], "of the last step"),
        ("gradient norm", last["gradient_norm"], "of the last step, before clipping"),
        ("tokens/s", round(float(speeds.y[-1])), "lately"),
    ]
    if this.mfu_of_one:
        tiles.append(("MFU", f"{speeds.y[-1] * this.mfu_of_one:.1%}", "lately"))
    tiles += [("tokens", last["tokens_seen"], "trained on"), ("rejected updates", last["rejected_updates"], "")]
    if checkpoints and (peak := _peak_memory(checkpoints[-1])):
        tiles.append(
            ("peak memory", peak, "of the process" if this.versions.get("device") == "cpu" else "of the device")
        )
    return tiles


def _charts(this: RunInProgress) -> list[dict[str, Any]]:
    records = this.records
    speeds, period = page_charts.speed(records)
    learning_rates = page_charts.line("learning rate", over_steps(records, "learning_rate"))
    return [
        page_charts.loss_chart(
            page_charts.loss_lines(records),
            reference_losses=this.reference_losses,
            bits_per_nat=bits_per_byte(1, this.bytes_per_token) if this.bytes_per_token else None,
        ),
        page_charts.norm_chart(page_charts.norm_lines(records), records, this.config.clipping_max_norm),
        page_charts.learning_rate_chart([learning_rates]),
        page_charts.speed_chart([page_charts.line(f"median of {period:,} steps", speeds)], this.mfu_of_one),
    ]


def _rejections(this: RunInProgress) -> list[tuple[int, float | None, str]]:
    """Return the newest rejected updates, as events."""
    steps = this.records.column("global_step")[this.records.column("rejected") == 1].astype(int).tolist()
    events: list[tuple[int, float | None, str]] = []
    for step in steps[-MAX_REJECTIONS:]:
        path, reason, seconds = this.run.rejected(step), "", None
        with contextlib.suppress(OSError, ValueError):
            found, seconds = read_json(path), path.stat().st_mtime
            where = found.get("first_gradient_not_finite") or found.get("largest_gradient")
            reason = f": {found.get('reason')}" + (f" ({where})" if where else "")
        events.append((step, seconds, f"update rejected{reason}"))
    if len(steps) > MAX_REJECTIONS:
        events[0] = (*events[0][:2], f"{events[0][2]}; {len(steps) - MAX_REJECTIONS:,} more were rejected before it")
    return events


def _checkpoints(checkpoints: list[Checkpoint]) -> tuple[list[str], list[list[Any]]]:
    best = find_best(checkpoints)
    rows = []
    for checkpoint in checkpoints:
        meta = _meta(checkpoint)
        numbers = [_number(meta.get(name)) for name in ("avg_train_loss", "val_loss", "seconds_trained")]
        tags = ("best" if checkpoint == best else "", "latest" if checkpoint == checkpoints[-1] else "")
        saved = float(calendar.timegm(time.strptime(checkpoint.path.name[:16], TIME_FORMAT)))
        tag = ", ".join(filter(None, tags))
        rows.append([checkpoint.global_step, moment(saved), *numbers, _peak_memory(checkpoint), tag])
    return ["step", "when", "training loss", "validation loss", "seconds trained", "peak memory", ""], rows


def _configs(this: RunInProgress) -> list[list[Any]]:
    configs: list[Config] = [this.model_config, this.config]
    rows: list[list[Any]] = []
    for config in configs:
        for name, info in type(config).model_fields.items():
            default = "required" if info.is_required() else _literal(info.get_default())
            rows.append([name, _literal(getattr(config, name)), default])
    return rows + [[name, version, ""] for name, version in this.versions.items()]


def _samples(run: RunDirectory) -> list[tuple[int, list[str]]]:
    """Return the completions of some checkpoints, the first and the last among them."""
    with contextlib.suppress(OSError):
        found = list(samples.read(run.samples).items())
        keep = np.linspace(0, len(found) - 1, min(len(found), MAX_SAMPLES)).round().astype(int)
        return [(found[i][0], found[i][1].split("\n")) for i in keep]
    return []


def _meta(checkpoint: Checkpoint) -> dict[str, Any]:
    with contextlib.suppress(ValueError, OSError):
        return checkpoint.meta
    return {}


def _peak_memory(checkpoint: Checkpoint) -> str | None:
    peak = _number(_meta(checkpoint).get("peak_memory_bytes"))
    return None if peak is None else f"{peak / 1e9:.2f} GB"


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


def _literal(value: Any) -> str:
    return json.dumps(value, default=dict)
