"""Metrics to PNG: loss, learning rate, gradient norm over global steps. Never touches JAX.

Matplotlib takes a second to import, so that waits for the first chart.
"""

import contextlib
import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from outside_in.storage import atomic
from outside_in.storage.metrics import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_SCALE_FROM = 8  # ratio of the largest to the smallest loss above which a logarithmic axis reads better
MAX_POINTS = 400  # periods on the loss chart; a band of more is a blur
MAX_CLIP_RATIO = 1_000  # of the clip line to the largest norm, above which it would squeeze the curve
SMOOTH_POINTS = 60  # of each run's training loss where runs are compared
COMPARISON = "comparison.png"  # unless another name is asked for
X_LABELS = {  # where runs are compared
    "tokens": "training tokens",
    "steps": "global step",
    "seconds": "seconds of training steps, compiling included",
}


class Curve(NamedTuple):
    """One run where runs are compared."""

    label: str
    training: list[tuple[float, float]]  # horizontal position, loss: one pair per global step
    validation: list[tuple[float, float]]


def draw_loss(
    path: Path,
    records: list[Record],
    *,
    interval: int,
    title: str,
    reference_losses: dict[str, float] | None = None,
    bytes_per_token: float | None = None,
) -> None:
    """Draw the training loss and the validation loss.

    The training loss is a mean and a min-max band per checkpoint period. `interval` is the period's length in global
    steps; while the run is younger than ten periods, shorter ones are drawn. `reference_losses` are named losses in
    nats, drawn as horizontal lines. With `bytes_per_token`, a second axis shows bits per byte.
    """
    finite = [record for record in records if record["loss"] is not None]
    if not finite:
        return
    last_step = finite[-1]["global_step"]
    period = max(min(interval, -(-last_step // 10)), -(-last_step // MAX_POINTS), 1)
    steps, averages, lows, highs = _periods(finite, period)
    with _figure(path, title, "loss (nats per token)") as axes:
        axes.fill_between(steps, lows, highs, alpha=0.2, linewidth=0, label=f"training, min to max of {period:,} steps")
        axes.plot(steps, averages, marker="." if len(steps) < 30 else None, label=f"training, mean of {period:,} steps")
        validated = [record for record in records if record.get("val_loss") is not None]
        if validated:
            x, y = ([record[key] for record in validated] for key in ("global_step", "val_loss"))
            axes.plot(x, y, "o", markersize=4, color="tab:orange", label="validation")
            best, best_step = min(zip(y, x))
        else:
            best, best_step = min(zip(averages, steps))
        axes.axvline(
            best_step, color="black", linestyle="--", linewidth=1, label=f"best: {best:.3f} at step {best_step:,}"
        )
        for i, (name, value) in enumerate((reference_losses or {}).items()):
            axes.axhline(value, color="gray", linestyle=(":", "-.")[i % 2], linewidth=1, label=f"{name} {value:.2f}")
        if min(lows) > 0 and max(highs) / min(lows) > LOG_SCALE_FROM:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        if bytes_per_token:
            nats = bytes_per_token * math.log(2)  # per token, in one bit per byte
            functions: Any = (lambda loss: loss / nats, lambda bits: bits * nats)
            second = axes.secondary_yaxis("right", functions=functions)
            second.set_ylabel(f"bits per byte ({bytes_per_token:.2f} bytes a token)")


def draw_learning_rate(path: Path, records: list[Record], *, title: str) -> None:
    """Draw the learning rate that each global step used."""
    with _figure(path, title, "learning rate") as axes:
        axes.plot([r["global_step"] for r in records], [r["learning_rate"] for r in records])
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))


def draw_gradient_norm(path: Path, records: list[Record], *, clipping_max_norm: float | None, title: str) -> None:
    """Draw the gradient norm before clipping. Also the clip line, and a mark at every rejected step."""
    measured = [record for record in records if record["gradient_norm"] is not None]
    clipped = sum(record["clipped"] for record in records)
    with _figure(path, title, "gradient norm before clipping") as axes:
        x, y = ([record[key] for record in measured] for key in ("global_step", "gradient_norm"))
        axes.plot(x, y, linewidth=0.8, label="gradient norm")
        if clipping_max_norm is not None and clipping_max_norm < MAX_CLIP_RATIO * max(y, default=0):
            share = f"{clipped:,} of {len(records):,} steps clipped"
            label = f"clip at {clipping_max_norm:g} ({share})"
            axes.axhline(clipping_max_norm, color="tab:red", linestyle="--", linewidth=1, label=label)
        rejected = [record["global_step"] for record in records if record["rejected"]]
        if rejected:
            bottom = [0.02] * len(rejected)
            axes.plot(
                rejected,
                bottom,
                "x",
                color="black",
                transform=axes.get_xaxis_transform(),
                label=f"{len(rejected):,} rejected updates",
            )
        if any(value > 0 for value in y):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")


def draw_comparison(path: Path, curves: list[Curve], *, x_label: str) -> None:
    """Draw several runs: validation as dots, smoothed training loss as thin lines."""
    import matplotlib

    colors = matplotlib.colormaps["tab10" if len(curves) <= 10 else "tab20"]
    with _figure(path, "dots: validation; thin lines: training, smoothed", "loss (nats per token)", x_label) as axes:
        for i, curve in enumerate(curve for curve in curves if curve.training):
            color = colors(i % colors.N)
            window = -(-len(curve.training) // SMOOTH_POINTS)
            groups = [curve.training[at : at + window] for at in range(0, len(curve.training), window)]
            means = [sum(loss for _, loss in group) / len(group) for group in groups]
            axes.plot([group[-1][0] for group in groups], means, color=color, linewidth=0.8, alpha=0.6)
            if curve.validation:
                axes.plot(*zip(*curve.validation), "o-", color=color, markersize=4, label=literal(curve.label))
            else:
                axes.plot([], color=color, linewidth=0.8, label=literal(f"{curve.label} (no validation)"))


def _periods(records: list[Record], period: int) -> tuple[list[float], list[float], list[float], list[float]]:
    """Group by period: last step, mean, minimum and maximum loss of each."""
    steps, averages, lows, highs = [], [], [], []
    for _, group in groupby(records, key=lambda record: (record["global_step"] - 1) // period):
        members = list(group)
        losses = [record["loss"] for record in members]
        steps.append(members[-1]["global_step"])
        averages.append(sum(losses) / len(losses))
        lows.append(min(losses))
        highs.append(max(losses))
    return steps, averages, lows, highs


def literal(name: str) -> str:
    """Return a name as Matplotlib shows it: a dollar is no mathematics, an underscore at its start hides no label."""
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


@contextlib.contextmanager
def _figure(path: Path, title: str, y_label: str, x_label: str = "global step") -> Iterator["Axes"]:
    """Yield the axes of a new chart, which is then written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    yield axes
    axes.set_title(literal(title))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, format="png")
