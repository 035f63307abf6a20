"""Series of numbers over training, made short enough to draw. Never touches JAX."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MAX_SPANS = 1_000  # about the pixels of a chart's width


class Series(NamedTuple):
    """Points of one line: horizontal positions, which ascend, and values."""

    x: np.ndarray
    y: np.ndarray

    def finite(self) -> "Series":
        keep = np.isfinite(self.y)
        return Series(self.x[keep], self.y[keep])


def thinned(series: Series, spans: int = MAX_SPANS) -> Series:
    """Keep the lowest and the highest point of each span, so that the line looks the same."""
    count = len(series.x)
    if count <= 2 * spans:
        return series
    starts = np.linspace(0, count, spans, endpoint=False).astype(int)
    kept = {0, count - 1}
    for start, end in zip(starts, [*starts[1:], count]):
        kept |= {start + int(np.argmin(series.y[start:end])), start + int(np.argmax(series.y[start:end]))}
    rows = np.array(sorted(kept))
    return Series(series.x[rows], series.y[rows])


def period_means(series: Series, periods: Sequence[int] | np.ndarray) -> Series:
    """Average each period's points, positions too. `periods` numbers the period of every point; ascending."""
    _, starts, counts = np.unique(np.asarray(periods), return_index=True, return_counts=True)
    if not len(starts):
        return series
    return Series(np.add.reduceat(series.x, starts) / counts, np.add.reduceat(series.y, starts) / counts)
