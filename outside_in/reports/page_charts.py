"""The charts of a page, from records. Never touches JAX.

Long series are thinned to their lowest and highest points, so a page has some hundred kilobytes whatever the run's
length. What is drawn is exact; the last value of a series always is.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from outside_in.reports.charts import over_steps
from outside_in.reports.series import Series, period_means, thinned
from outside_in.storage.records import Records

MAX_MEANS = 75  # of the smoothed training loss
MAX_CLOCKS = 1_000  # steps of which tokens and seconds are known; between them they are interpolated
MAX_COLUMNS = 200  # of a heat map
THIN, MAIN, DOTS, CROSSES = "thin", "main", "dots", "crosses"  # how a line is drawn


def clock(records: Records) -> dict[str, Any]:
    """Return tokens and seconds by step."""
    rows = _spread(len(records), MAX_CLOCKS)
    seconds = np.nan_to_num(records.column("seconds")).cumsum()
    columns = {"steps": "global_step", "tokens": "tokens_seen"}
    return {name: records.column(key)[rows].astype(int).tolist() for name, key in columns.items()} | {
        "seconds": np.round(seconds[rows], 3).tolist()
    }


def loss_lines(records: Records) -> list[dict[str, Any]]:
    """Return the training loss, raw and smoothed, and the validation loss."""
    training, validation = (over_steps(records, name) for name in ("loss", "val_loss"))
    means, period = smoothed(training)
    smooth = [line(f"training, mean of {period:,} steps", means)] if period > 1 else []
    return [
        line("training, every step", training, THIN if smooth else MAIN),
        *smooth,
        line("validation", validation, DOTS, color=1),
    ]


def loss_chart(
    lines: list[dict[str, Any]],
    *,
    title: str = "Loss",
    reference_losses: Mapping[str, float] | None = None,
    bits_per_nat: float | None = None,
) -> dict[str, Any]:
    levels = [level(name, value) for name, value in (reference_losses or {}).items()]
    right = {"unit": "bits per byte", "factor": bits_per_nat} if bits_per_nat else None
    return chart(title, "nats per token", lines, levels=levels, right=right)


def norm_lines(records: Records) -> list[dict[str, Any]]:
    """Return the gradient norm, raw and smoothed, and a cross at every rejected step."""
    norms = over_steps(records, "gradient_norm")
    means, period = smoothed(norms)
    steps = records.column("global_step")[records.column("rejected") == 1]
    crosses = Series(steps, np.zeros(len(steps)))
    smooth = [line(f"mean of {period:,} steps", means)] if period > 1 else []
    return [
        line("every step", norms, THIN if smooth else MAIN),
        *smooth,
        *([line("rejected update", crosses, CROSSES)] if len(steps) else []),
    ]


def norm_chart(
    lines: list[dict[str, Any]], records: Records | None = None, max_norm: float | None = None
) -> dict[str, Any]:
    levels = []
    if records and max_norm is not None:
        share = f"clip line ({int(records.column('clipped').sum()):,} of {len(records):,} steps clipped) at"
        levels = [level(share, max_norm, scales=False)]
    return chart("Gradient norm", "before clipping", lines, levels=levels)


def learning_rate_chart(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return chart("Learning rate", "", lines, zero=True)


def speed(records: Records) -> tuple[Series, int]:
    """Return the tokens per second of each period, by the median of its steps, and the period's length."""
    steps, seconds = records.column("global_step"), np.maximum(records.column("seconds"), 1e-9)
    if not len(steps):
        return Series(steps, seconds), 1
    per_step = records.last["tokens_seen"] / records.last["global_step"]
    period = _period(len(steps))
    edges = [*range(0, period * _last_period(len(steps), period) + 1, period), len(steps)]
    spans = [slice(start, end) for start, end in itertools.pairwise(edges)]
    medians = np.array([np.median(seconds[span]) for span in spans])
    middles = np.array([steps[span].mean() for span in spans])
    return Series(middles, per_step / medians), period


def speed_chart(lines: list[dict[str, Any]], mfu_of_one: float | None = None) -> dict[str, Any]:
    """Return the chart of tokens per second. `mfu_of_one` is the MFU of one token per second, if that is known."""
    right = {"unit": "MFU", "factor": 100 * mfu_of_one, "suffix": "%"} if mfu_of_one else None
    return chart("Speed", "tokens/s", lines, right=right, zero=True)


def heat_maps(records: Records) -> list[dict[str, Any]]:
    """Return a heat map for each kind of number that records have by layer, as `gradient_norm/blocks.0`."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(records.names(), key=_natural):
        if "/" in name:
            kinds.setdefault(name.partition("/")[0], []).append(name)
    return [_heat_map(kind, names, records) for kind, names in kinds.items()]


def _heat_map(kind: str, names: Sequence[str], records: Records) -> dict[str, Any]:
    values = np.stack([records.column(name) for name in names])
    measured = np.flatnonzero(~np.isnan(values).all(axis=0))
    columns = measured[_spread(len(measured), MAX_COLUMNS)]
    return {
        "title": kind.replace("_", " ").capitalize(),
        "rows": [name.partition("/")[2] for name in names],
        "steps": records.column("global_step")[columns].astype(int).tolist(),
        "values": [_numbers(row) for row in values[:, columns]],
    }


def smoothed(series: Series) -> tuple[Series, int]:
    """Average a series over periods, and return how many steps they have. The last one may be longer by half."""
    count = len(series.x)
    period = _period(count)
    return period_means(series, np.minimum(np.arange(count) // period, _last_period(count, period))), period


def line(
    name: str, series: Series, kind: str = MAIN, *, run: int = 0, color: int = 0, hover: bool = True
) -> dict[str, Any]:
    """Return one line of a chart. Its color is a number, of which the first six differ in hue, later ones in dashes."""
    short = thinned(series)
    x = [int(step) if step == int(step) else step for step in short.x.tolist()]
    return {"name": name, "kind": kind, "run": run, "color": color, "hover": hover, "x": x, "y": _numbers(short.y)}


def level(name: str, value: float, *, scales: bool = True) -> dict[str, Any]:
    """Return a horizontal line. Unless it `scales`, it never decides the axis."""
    return {"name": name, "value": value, "scales": scales}


def chart(
    title: str,
    unit: str,
    lines: list[dict[str, Any]],
    *,
    levels: Sequence[dict[str, Any]] = (),
    right: dict[str, Any] | None = None,
    zero: bool = False,
) -> dict[str, Any]:
    """Return a chart. `right` is the unit of a second axis, and its factor; with `zero`, the first one begins at 0."""
    return {"title": title, "unit": unit, "lines": lines, "levels": list(levels), "right": right, "zero": zero}


def _period(count: int) -> int:
    return max(1, -(-count // MAX_MEANS))


def _last_period(count: int, period: int) -> int:
    """Return the number of the last period, from 0: a rest of less than half a period belongs to the one before."""
    return max(0, (count + period // 2) // period - 1)


def _spread(count: int, at_most: int) -> np.ndarray:
    """Return up to `at_most` of `count` rows, evenly, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(int))


def _numbers(values: np.ndarray) -> list[float | None]:
    return [value if np.isfinite(value) else None for value in values.tolist()]


def _natural(name: str) -> list[Any]:
    """Return a key that sorts blocks.2 before blocks.10."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
