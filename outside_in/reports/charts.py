"""Metrics to PNG: loss, learning rate, gradient norm over global steps. Never touches JAX.

Matplotlib takes a second to import, so that waits for the first chart.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from outside_in.reports.labels import X_LABELS
from outside_in.reports.series import Series, period_means, thinned
from outside_in.storage import atomic
from outside_in.storage.records import Records
from outside_in.storage.text import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_SCALE_FROM = 8  # ratio of the largest to the smallest value above which a logarithmic axis reads better
MAX_POINTS = 400  # periods on the loss chart; more of them are a blur
MAX_DOTS = 200  # of validation; more of them hide what is behind
FEW_POINTS = 30  # up to which each has a marker
SMOOTH_POINTS = 60  # of each run's training loss where runs are compared
MARKERS = "o^sDvP*"  # of runs that share a color


class Curve(NamedTuple):
    """One run where runs are compared."""

    label: str
    training: Series
    validation: Series
    is_comparable: bool = True  # with most of the others


def draw_loss(
    path: Path,
    records: Records,
    *,
    interval: int,
    title: str,
    reference_losses: dict[str, float] | None = None,
    bytes_per_token: float | None = None,
) -> None:
    """Draw the training loss and the validation loss.

    The training loss is a mean per checkpoint period, in its middle, and a thin line of every step. `interval` is the
    period's length in global steps; while the run is younger than ten periods, shorter ones are drawn.
    `reference_losses` are named losses in nats, drawn as horizontal lines. With `bytes_per_token`, a second axis shows
    bits per byte.
    """
    training, validation = (over_steps(records, name) for name in ("loss", "val_loss"))
    if not len(training.x):
        return
    last_step = int(training.x[-1])
    period = max(min(interval, -(-last_step // 10)), -(-last_step // MAX_POINTS), 1)
    means = period_means(training, (training.x - 1) // period)
    of = f"mean of {period:,} steps" if period > 1 else "every step"
    judged, measure = (validation, "validation loss") if len(validation.x) else (means, f"training loss ({of})")
    best = int(np.argmin(judged.y))
    best_label = f"best {measure}: {judged.y[best]:.3f} at step {judged.x[best]:,.0f}"
    with _figure(path, title, "loss (nats per token)", records) as axes:
        every, means, validation = _scaled(axes, training, means, validation)
        if period > 1:
            axes.plot(*thinned(every), color="tab:blue", alpha=0.3, linewidth=0.6, label="training, every step")
        axes.plot(*means, color="tab:blue", marker=_marker(means), label=f"training, {of}")
        if len(validation.x):
            style: Any = {"marker": "o", "markersize": 4} if len(validation.x) <= MAX_DOTS else {}
            axes.plot(*thinned(validation), **style, linewidth=1, color="tab:orange", label="validation")
        axes.axvline(float(judged.x[best]), color="black", linestyle="--", linewidth=1, label=best_label)
        for i, (name, value) in enumerate((reference_losses or {}).items()):
            axes.axhline(value, color="gray", linestyle=(":", "-.")[i % 2], linewidth=1, label=f"{name} {value:.2f}")
        if bytes_per_token:
            nats = bytes_per_token * math.log(2)  # per token, in one bit per byte
            functions: Any = (lambda loss: loss / nats, lambda bits: bits * nats)
            second = axes.secondary_yaxis("right", functions=functions)
            second.yaxis.set_major_formatter("{x:g}")
            second.set_ylabel(f"bits per byte ({bytes_per_token:.2f} bytes a token)")


def draw_learning_rate(path: Path, records: Records, *, title: str) -> None:
    """Draw the learning rate that each global step used."""
    with _figure(path, title, "learning rate", records) as axes:
        series = over_steps(records, "learning_rate")
        axes.plot(*thinned(series), marker=_marker(series))
        axes.set_ylim(bottom=0)


def draw_gradient_norm(path: Path, records: Records, *, clipping_max_norm: float | None, title: str) -> None:
    """Draw the gradient norm before clipping. Also the clip line, and a mark at every rejected step.

    The clip line never decides the scale: where it lies outside, only the legend names it.
    """
    norms = over_steps(records, "gradient_norm")
    steps, rejected = (records.column(name) for name in ("global_step", "rejected"))
    with _figure(path, title, "gradient norm before clipping", records) as axes:
        [norms] = _scaled(axes, norms)
        axes.plot(*thinned(norms), linewidth=0.8, marker=_marker(norms), label="gradient norm")
        if clipping_max_norm is not None:
            shown, clipped = axes.get_ylim(), int(records.column("clipped").sum())
            label = f"clip at {clipping_max_norm:g} ({clipped:,} of {len(records):,} steps clipped)"
            axes.axhline(clipping_max_norm, color="tab:red", linestyle="--", linewidth=1, label=label)
            axes.set_ylim(shown)
        if rejected.any():
            x = steps[rejected == 1]
            label, across = counted(len(x), "rejected update"), axes.get_xaxis_transform()
            axes.plot(x, np.full(len(x), 0.02), "x", color="black", transform=across, label=label)


def draw_comparison(path: Path, curves: Sequence[Curve], *, x_label: str) -> None:
    """Draw several runs: validation as dots, smoothed training loss as thin lines.

    Runs that are not comparable with most have axes of their own. The legend is in the order of the last losses.
    """
    from matplotlib.figure import Figure

    drawn = [curve._replace(training=_smooth(curve.training)) for curve in curves if len(curve.training.x)]
    groups = [[curve for curve in drawn if curve.is_comparable is is_comparable] for is_comparable in (True, False)]
    groups = [group for group in groups if group] or [[]]
    figure = Figure(figsize=(10, 4.5 * len(groups) + 1), dpi=120, layout="constrained")
    for group, axes in zip(groups, figure.subplots(len(groups), squeeze=False)[:, 0]):
        title = "dots: validation; thin lines: training, smoothed; in the legend: last loss"
        if group and not group[0].is_comparable:
            title = "not comparable with the others: other data, objective or vocabulary"
        _draw_curves(axes, sorted(group, key=_last_loss, reverse=True))
        _finish(axes, title, "loss (nats per token)", x_label)
        if x_label == X_LABELS["tokens"]:
            axes.xaxis.set_major_formatter(_short)
        if group:
            axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_curves(axes: "Axes", curves: Sequence[Curve]) -> None:
    import matplotlib

    colors = matplotlib.colormaps["tab10"]
    all_series = _scaled(axes, *(series for curve in curves for series in (curve.training, curve.validation)))
    for i, (curve, training, validation) in enumerate(zip(curves, all_series[::2], all_series[1::2])):
        looks: Any = {"color": colors(i % colors.N), "linestyle": "-" if i < colors.N else "--"}
        looks["marker"] = MARKERS[i // colors.N % len(MARKERS)] if len(validation.x) <= MAX_DOTS else None
        kind = "" if len(validation.x) else " (training)"
        axes.plot(*training, **looks | {"marker": _marker(training)}, markersize=2, linewidth=0.8, alpha=0.6)
        label = literal(f"{curve.label}  {_last_loss(curve):.3f}{kind}")
        axes.plot(*thinned(validation), **looks, markersize=4, label=label)


def _smooth(series: Series) -> Series:
    count = len(series.x)
    return period_means(series, np.arange(count) // -(-count // SMOOTH_POINTS))


def _last_loss(curve: Curve) -> float:
    return float((curve.validation if len(curve.validation.x) else curve.training).y[-1])


def over_steps(records: Records, name: str) -> Series:
    """Return a number over global steps, where it was measured and finite."""
    return Series(records.column("global_step"), records.column(name)).finite()


def literal(name: str) -> str:
    """Return a name as Matplotlib shows it: a dollar is no mathematics, an underscore at its start hides no label."""
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


@contextlib.contextmanager
def _figure(path: Path, title: str, y_label: str, records: Records) -> Iterator["Axes"]:
    """Yield the axes of a new chart over global steps, and tokens above, which is then written."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    yield axes
    _finish(axes, title, y_label, "global step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(records) == 1:
        axes.set_xlim(records.last["global_step"] - 0.5, records.last["global_step"] + 0.5)
    if tokens := records.last.get("tokens_seen") if len(records) else None:
        per_step = tokens / records.last["global_step"]
        functions: Any = (lambda step: step * per_step, lambda tokens: tokens / per_step)
        above = axes.secondary_xaxis("top", functions=functions)
        above.set_xlabel("training tokens")
        above.xaxis.set_major_formatter(_short)
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _finish(axes: "Axes", title: str, y_label: str, x_label: str) -> None:
    axes.set_title(literal(title))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x == round(x) else f"{x:,g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")


def _scaled(axes: "Axes", *series: Series) -> list[Series]:
    """Make the vertical axis logarithmic where values differ much; return the series as they are drawn.

    There a value of 0 stands at the lower edge, and the legend says so.
    """
    values = np.concatenate([np.empty(0), *(one.y for one in series)])
    positive = values[values > 0]
    if not len(positive) or (ratio := positive.max() / positive.min()) <= LOG_SCALE_FROM:
        return list(series)
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 100 else (1,)))
    lowest = positive.min()
    if values.min() <= 0:
        lowest /= 2
        axes.plot([], " ", label="0 stands at the lower edge")
        axes.set_ylim(bottom=lowest)
    return [Series(one.x, np.maximum(one.y, lowest)) for one in series]


def _marker(series: Series) -> str | None:
    return "." if len(series.x) < FEW_POINTS else None


def _short(count: float, _: Any = None) -> str:
    """Return a count of tokens as 500, 1.5k, 2M or 10B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= unit:
            return f"{count / unit:g}{name}"
    return f"{count:g}"
