"""Records of global steps, kept in columns: a million of them take some 40 MB."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

Record = dict[str, Any]  # numbers, truth values and nulls by name; one global step

CHUNK = 4096  # records that are packed together
Column = tuple[np.ndarray | None, np.ndarray]  # rows (None: all) and their values, or one value for all


class Records:
    """Records of a run, oldest first. Append-only; only the newest may be changed."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._chunks: list[dict[str, Column]] = []
        self._tail: list[Record] = []  # not packed yet; never empty if there are records
        self.extend(list(records))

    def __len__(self) -> int:
        return CHUNK * len(self._chunks) + len(self._tail)

    @property
    def last(self) -> Record:
        return self._tail[-1]

    def append(self, record: Record) -> None:
        self.extend([record])

    def extend(self, records: Sequence[Record]) -> None:
        self._tail += records
        while len(self._tail) > CHUNK:
            self._chunks.append(_pack(self._tail[:CHUNK]))
            self._tail = self._tail[CHUNK:]

    def copy(self) -> "Records":
        """Return the records up to now, to be read in another thread."""
        copied = Records()
        copied._chunks, copied._tail = list(self._chunks), [*self._tail[:-1], *map(dict, self._tail[-1:])]
        return copied

    def column(self, name: str, newest: int | None = None) -> np.ndarray:
        """Return one number of every record, or of the `newest` ones. Returns float64, NaN where null or missing."""
        count = len(self) if newest is None else min(newest, len(self))
        tail = _values(self._tail[-count:], name) if count else np.empty(0)
        first = (len(self) - count) // CHUNK
        return np.concatenate([*(_unpack(chunk.get(name)) for chunk in self._chunks[first:]), tail])[-count:]

    def names(self) -> set[str]:
        return set(itertools.chain.from_iterable(itertools.chain(self._chunks, self._tail)))


def _values(records: Sequence[Record], name: str) -> np.ndarray:
    try:
        numbers = list(map(itemgetter(name), records))  # twice as fast as what follows
    except KeyError:
        numbers = [record.get(name) for record in records]
    return np.array(numbers, np.float64)


def _pack(records: Sequence[Record]) -> dict[str, Column]:
    return {name: _smallest(_values(records, name)) for name in set().union(*records)}


def _smallest(values: np.ndarray) -> Column:
    """Return a column in its smallest exact form."""
    rows = None
    present = np.flatnonzero(~np.isnan(values))
    if len(present) < len(values) / 2:
        rows, values = present.astype(np.uint16), values[present]
    elif (values == values[0]).all():
        values = values[:1]
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    return rows, single if np.array_equal(single, values, equal_nan=True) else values


def _unpack(column: Column | None) -> np.ndarray:
    rows, values = column or (np.empty(0, np.uint16), np.empty(0))
    if rows is None:
        return np.broadcast_to(values.astype(np.float64), CHUNK)
    whole = np.full(CHUNK, np.nan)
    whole[rows] = values
    return whole


def chunked(records: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield lists of up to CHUNK records."""
    iterator = iter(records)
    while chunk := list(itertools.islice(iterator, CHUNK)):
        yield chunk
