"""Several runs side by side: a Markdown table and a chart."""

import contextlib
import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpointing import find_checkpoints
from model import count_parameters
from outside_in.config import ModelConfig, TrainConfig
from outside_in.config_files import load_config
from outside_in.data.hub import HUB
from outside_in.overrides import as_trained
from outside_in.reports import markdown, page
from outside_in.reports.charts import Curve, draw_comparison, over_steps
from outside_in.reports.comparison_page import ComparedRun, comparison_page
from outside_in.reports.labels import X_LABELS
from outside_in.reports.series import Series
from outside_in.reports.time_to_loss import Reached, reach
from outside_in.storage import metrics
from outside_in.storage.records import Records
from outside_in.storage.run_directory import RunDirectory

NOT_COMPARABLE = "* other data, objective or vocabulary than most runs here: losses are not comparable"
Column = Callable[["RunResult"], str]


@dataclass(frozen=True)
class RunResult:
    """A run that has metrics."""

    run: RunDirectory
    model_config: ModelConfig
    config: TrainConfig  # with the overrides that it was trained under
    records: Records  # at least one
    meta: dict[str, Any]  # of the newest readable checkpoint; empty without one

    @property
    def checkpoint_seconds(self) -> float | None:
        """Return the time of training up to it, with compiling, validation and checkpoints."""
        seconds = self.meta.get("seconds_trained")
        return float(seconds) if isinstance(seconds, int | float) else None

    @property
    def place(self) -> tuple[Any, ...]:
        """Return where its validation tokens are."""
        config = self.config
        return config.dataset.removeprefix(HUB), config.start_val_token, config.val_tokens

    @property
    def fingerprint(self) -> str | None:
        """Return what its validation tokens are; None if no checkpoint says."""
        data = self.meta.get("data")
        return data.get("validation") if isinstance(data, dict) else None

    @property
    def average_loss(self) -> float | None:
        """Return the mean training loss since the last milestone before the end, as the run itself does."""
        interval = self.config.checkpoint_interval
        losses = self.records.column("loss", (self.records.last["global_step"] - 1) % interval + 1)
        return statistics.fmean(losses) if len(losses := losses[~np.isnan(losses)]) else None

    @property
    def validation_loss(self) -> float | None:
        validation = over_steps(self.records, "val_loss").y
        return float(validation[-1]) if len(validation) else None

    @property
    def tokens_per_second(self) -> float:
        seconds, last = float(np.median(self.records.column("seconds"))), self.records.last
        return last["tokens_seen"] / last["global_step"] / max(seconds, 1e-9)

    @property
    def seconds(self) -> float:
        """Return the time of training. Since the newest checkpoint, only that of the steps is known."""
        before = self.checkpoint_seconds
        since = 0 if before is None else self.meta.get("global_step", 0)
        steps = self.records.column("seconds")[self.records.column("global_step") > since]
        return (before or 0) + float(steps.sum())


def compare(runs: list[RunDirectory], x: str, chart: Path, to_loss: float | None = None) -> list[str]:
    """Draw the chart and the page beside it, and return the lines to print.

    Those are the table, and which runs were skipped. `x` is the horizontal axis, a key of `X_LABELS`. With `to_loss`,
    the table says what each run took to reach that validation loss. Raises ValueError when no run has metrics.
    """
    found = {run: read(run) for run in runs}
    trained = [run for run in found.values() if run]
    if not trained:
        raise ValueError(f"{runs[0].path}: nothing to compare, no run has metrics yet; train one first")
    apart, names = not_comparable(trained), labels(trained)
    curves = [_curve(run, names[run.run], x, is_comparable=run not in apart) for run in trained]
    draw_comparison(chart, curves, x_label=X_LABELS[x])
    skipped = [f"{run.path}: no metrics yet, skipped" for run, read_run in found.items() if read_run is None]
    compared = [
        ComparedRun(names[run.run], run.records, dict(run.model_config) | dict(run.config), run not in apart)
        for run in trained
    ]
    seeds = seed_results(trained, to_loss)
    tables = {"Results": results(trained, to_loss), "Means over seeds": seeds}
    page.write(path := chart.with_suffix(".html"), comparison_page(chart.stem, compared, tables, x))
    means = ["", *markdown.table(*seeds)] if seeds[1] else []
    return [*table(trained, to_loss), *means, "", *skipped, f"chart: {chart}", f"page: {path}"]


def read(run: RunDirectory) -> RunResult | None:
    """Read a run's configs and metrics; None without metrics. Raises ValueError when they are unreadable."""
    model_config, config = load_config(run.model_config, ModelConfig), load_config(run.train_config, TrainConfig)
    records = metrics.load(run.metrics)
    meta = newest_meta(run)
    with contextlib.suppress(ValueError):  # a damaged checkpoint's
        config = as_trained(run, config, meta)
    return RunResult(run, model_config, config, records, meta) if records else None


def newest_meta(run: RunDirectory) -> dict[str, Any]:
    """Return the meta of a run's newest checkpoint; empty without a readable one."""
    with contextlib.suppress(IndexError, ValueError):
        return find_checkpoints(run.checkpoints)[-1].meta
    return {}


def not_comparable(runs: list[RunResult]) -> list[RunResult]:
    """Return the runs whose losses cannot be compared with most others'. In a tie, the first run's count as most.

    They must share objective, vocabulary and validation tokens. Those are the same if their fingerprints are; a run
    without a checkpoint has those of another one that takes them from the same place.
    """
    known = {run.place: run.fingerprint for run in runs if run.fingerprint}

    def key(run: RunResult) -> tuple[Any, ...]:
        tokens = run.fingerprint or known.get(run.place, run.place)
        return run.model_config.vocab_size, run.config.objective, tokens

    [(usual, _)] = Counter(map(key, runs)).most_common(1)
    return [run for run in runs if key(run) != usual]


def table(runs: list[RunResult], to_loss: float | None = None) -> list[str]:
    """Return the lines of a Markdown table. Runs that are not comparable are marked."""
    lines = markdown.table(*results(runs, to_loss, mark="\\*"))
    if not_comparable(runs):
        lines += ["", f"\\{NOT_COMPARABLE}"]
    return lines


def results(runs: list[RunResult], to_loss: float | None = None, mark: str = "*") -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of the table. The `mark` is on runs that are not comparable."""
    marked, names = not_comparable(runs), labels(runs)
    columns: dict[str, Column] = {
        "run": lambda run: names[run.run] + (f" {mark}" if run in marked else ""),
        "parameters": lambda run: f"{count_parameters(run.model_config):,}",
        "tokens": lambda run: f"{run.records.last['tokens_seen']:,}",
        "training loss": lambda run: _loss(run.average_loss),
        "validation loss": lambda run: _loss(run.validation_loss),
        "perplexity": lambda run: _perplexity(run.validation_loss),
        "tokens/s": lambda run: f"{run.tokens_per_second:,.0f}",
        "rejected": lambda run: f"{run.records.last['rejected_updates']:,}",
        "time": lambda run: _clock(run.seconds),
    }
    if to_loss is not None:
        reached = {run.run: reach(run.records, run.model_config, to_loss) for run in runs}
        shown: dict[str, Callable[[Reached], str]] = {
            f"tokens to {to_loss:g}": lambda at: f"{at.tokens:,.0f}",
            "steps": lambda at: f"{at.steps:,.0f}",
            "time of steps": lambda at: _clock(at.seconds),
            "FLOPs": lambda at: f"{at.flops:.2e}",
        }
        for name, show in shown.items():
            columns[name] = lambda run, show=show: show(at) if (at := reached[run.run]) else "–"
    return list(columns), [[column(run) for column in columns.values()] for run in runs]


def seed_results(runs: list[RunResult], to_loss: float | None = None) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a table of runs that are alike but for their seeds, trained equally far."""
    groups, names = defaultdict(list), labels(runs)
    for run in runs:
        keys = dict(run.model_config) | dict(run.config) | {"seed": None, "tokens": run.records.last["tokens_seen"]}
        groups[json.dumps(keys, default=dict)].append(run)
    columns = ["alike but for the seed", "runs", "mean validation loss", "lowest", "highest"]
    rows = []
    for group in groups.values():
        losses = [loss for run in group if (loss := run.validation_loss) is not None]
        if 1 < len(group) == len(losses):
            shown = map(_loss, (statistics.fmean(losses), min(losses), max(losses)))
            rows.append([min((names[run.run] for run in group), key=len), str(len(group)), *shown])
            if to_loss is not None:
                reached = [at.tokens for run in group if (at := reach(run.records, run.model_config, to_loss))]
                rows[-1].append(f"{statistics.fmean(reached):,.0f}" if len(reached) == len(group) else "–")
    return columns if to_loss is None else [*columns, f"mean tokens to {to_loss:g}"], rows


def labels(runs: list[RunResult]) -> dict[RunDirectory, str]:
    """Return a label for every run. That is the folder's name, or the path if names repeat."""
    are_unique = len({run.run.path.name for run in runs}) == len(runs)
    return {run.run: run.run.path.name if are_unique else str(run.run.path) for run in runs}


def _curve(run: RunResult, label: str, x: str, *, is_comparable: bool) -> Curve:
    name = {"tokens": "tokens_seen", "steps": "global_step", "seconds": "seconds"}[x]
    positions = run.records.column(name)
    if x == "seconds":
        positions = positions.cumsum()
    training, validation = (Series(positions, run.records.column(key)).finite() for key in ("loss", "val_loss"))
    return Curve(label, training, validation, is_comparable)


def _loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.4f}"


def _perplexity(loss: float | None) -> str:
    if loss is None:
        return "–"
    perplexity = math.exp(min(loss, 700))
    return f"{perplexity:,.4g}" if perplexity >= 1000 else f"{perplexity:#.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
