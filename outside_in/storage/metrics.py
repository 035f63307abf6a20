"""`metrics.jsonl`: one strict-JSON line per global step, append-only."""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from operator import is_not, itemgetter
from pathlib import Path
from types import NoneType
from typing import BinaryIO

from outside_in.storage import atomic
from outside_in.storage.records import Record, Records, chunked

MAX_LINE_BYTES = 1_000_000  # bytes; a record has some hundred, with norms of many layers more

NUMBERS = {"clipped", "learning_rate", "rejected", "rejected_updates", "seconds", "tokens_seen"}  # in every record
NULLABLE = {"gradient_norm", "loss"}  # as well, null where they were not finite
NUMBERS_OF = itemgetter(*sorted(NUMBERS))


class MetricsLog:
    """The records of a run, written to its file if `enabled`."""

    def __init__(self, path: Path, *, enabled: bool = True) -> None:
        self._path, self._enabled = path, enabled
        self._new: list[Record] = []  # not written yet
        self._last_line = 0  # where the newest one that is written begins
        self.records = Records()

    def load(self) -> Records:
        return load(self._path) if self._enabled else Records()

    def append(self, record: Record) -> None:
        self.records.append(record)
        self._new.append(record)

    def write(self, *, durable: bool = False) -> None:
        """Append the new records; after an OSError they are still new."""
        if self._enabled:
            append(self._path, self._new, durable=durable)
            if self._new:
                self._last_line = self._path.stat().st_size - len(_line(self._new[-1]).encode())
        self._new = []

    def amend(self, name: str, number: float | None) -> None:
        """Add a number to the newest record, also if it is written."""
        self.records.last[name] = number
        if self._enabled and not self._new:
            atomic.replace_end(self._path, self._last_line, _line(self.records.last))

    def cut_after(self, global_step: int) -> None:
        """Read the file, and drop later steps from it."""
        if self._enabled:
            self.records = cut_after(self._path, global_step)
            if self.records:
                self._last_line = self._path.stat().st_size - len(_line(self.records.last).encode())


def append(path: Path, records: Iterable[Record], *, durable: bool = False) -> None:
    """Append one line per record; `durable` waits for the disk. After an OSError the file is as it was."""
    atomic.append_text(path, "".join(map(_line, records)), durable=durable)


def read(path: Path) -> list[Record]:
    """Read all records as they are, oldest first.

    Returns none if there is no file; a torn last line is ignored. Raises ValueError with the line number when any other
    line is not a record: a flat JSON object of finite numbers, truth values and nulls with a `global_step`.
    """
    return [record for chunk, _ in _chunks(path) for record in chunk]


def load(path: Path) -> Records:
    """Read all records into columns, as `read` does. Raises ValueError also when one lacks a field that is needed."""
    records = Records()
    for chunk, _ in _chunks(path):
        check_complete(path, chunk)
        records.extend(chunk)
    return records


def cut_after(path: Path, global_step: int) -> Records:
    """Drop later lines and a torn one; return the rest.

    Raises ValueError, with the file as it was, when one of the rest is not complete.
    """
    records, end = Records(), 0
    for chunk, num_bytes in _chunks(path, until=global_step):  # what follows may be anything: it goes
        check_complete(path, chunk)
        records.extend(chunk)
        end += num_bytes
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(end)
        atomic.fsync(path)
    return records


def _chunks(path: Path, until: int | None = None) -> Iterator[tuple[Sequence[Record], int]]:
    """Yield some records at a time, and the bytes that they take in the file. Stops before a step after `until`."""
    if not path.exists():
        return
    if not path.is_file():  # opening a pipe would wait for its writer
        raise ValueError(f"{path}: expected a file of metrics, got a folder or a device; move it away")
    num_lines = 0
    with path.open("rb") as file:
        for lines in chunked(_lines(file)):
            try:
                records = _parse_all(lines)
            except (ValueError, OverflowError, RecursionError):
                records = list(_parse_each(path, lines, num_lines, until))
            if until is not None and records and records[-1]["global_step"] > until:
                records = [record for record in records if record["global_step"] <= until]
            yield records, sum(map(len, lines[: len(records)]))
            if len(records) < len(lines):
                return
            num_lines += len(lines)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file, up to one that is torn or too long."""
    for line in iter(lambda: file.readline(MAX_LINE_BYTES), b""):
        yield line
        if not line.endswith(b"\n"):
            return


def _parse_all(lines: Sequence[bytes]) -> list[Record]:
    """Parse lines together, which takes half the time. Raises ValueError when any of them is not a record."""
    if not all(line[:1] == b"{" and line[-2:] == b"}\n" for line in lines):
        raise ValueError
    records = json.loads(b"[%b]" % b",".join(lines))
    if len(records) != len(lines):
        raise ValueError
    _check(records)
    return records


def _parse_each(path: Path, lines: Sequence[bytes], num_before: int, until: int | None) -> Iterator[Record]:
    """Parse lines one by one, up to a torn one or a step from `until` on."""
    for i, line in enumerate(lines, start=num_before + 1):
        if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
            return  # torn
        try:
            if not line.endswith(b"\n"):
                raise ValueError  # too long
            record = json.loads(line.decode())
            _check([record])
        except (ValueError, OverflowError, RecursionError):
            raise ValueError(f"{path}: line {i} is not a metrics record; restore it or delete the file") from None
        yield record
        if until is not None and record["global_step"] >= until:
            return


def _check(records: Sequence[Record]) -> None:
    """Raise ValueError or OverflowError for what is not a record."""
    if set(map(type, records)) != {dict} or {type(record.get("global_step")) for record in records} != {int}:
        raise ValueError
    values = list(itertools.chain.from_iterable(record.values() for record in records))
    if not set(map(type, values)) <= {int, float, bool, NoneType}:
        raise ValueError
    if not all(map(math.isfinite, filter(partial(is_not, None), values))):
        raise ValueError


def check_complete(path: Path, records: Iterable[Record]) -> None:
    """Raise ValueError when a record lacks a field that is needed. Charts, tables and checkpoints need them."""
    for record in records:
        if NULLABLE <= record.keys() >= NUMBERS and None not in NUMBERS_OF(record):
            continue
        missing = (NUMBERS - {name for name, value in record.items() if value is not None}) | (NULLABLE - record.keys())
        names = ", ".join(sorted(missing))
        raise ValueError(f"{path}: step {record['global_step']} lacks {names}; restore it or delete the file")


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def finite(value: float) -> float | None:
    """Return the number, or None (null in the file) if not finite."""
    return value if math.isfinite(value) else None
