"""`metrics.jsonl`: one strict-JSON line per global step, append-only."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from outside_in.storage import atomic

Record = dict[str, Any]
MAX_LINE_BYTES = 100_000  # bytes; a record has some hundred

NUMBERS = {"clipped", "learning_rate", "rejected", "rejected_updates", "seconds", "tokens_seen"}  # in every record
NULLABLE = {"gradient_norm", "loss"}  # as well, null where they were not finite


class MetricsLog:
    """The records of a run, written to its file if `enabled`."""

    def __init__(self, path: Path, *, enabled: bool = True) -> None:
        self._path, self._enabled = path, enabled
        self.records: list[Record] = []
        self._written = 0

    @property
    def is_written(self) -> bool:
        return self._written == len(self.records)

    def read(self) -> list[Record]:
        return read(self._path) if self._enabled else []

    def write(self, *, durable: bool = False) -> None:
        """Append the new records; after an OSError they are still new."""
        if self._enabled:
            append(self._path, self.records[self._written :], durable=durable)
        self._written = len(self.records)

    def rewrite(self) -> None:
        """Replace the file, since a written record has changed."""
        if self._enabled:
            rewrite(self._path, self.records)

    def cut_after(self, global_step: int) -> None:
        """Read the file, and drop later steps from it."""
        if self._enabled:
            self.records = cut_after(self._path, global_step)
            self._written = len(self.records)


def append(path: Path, records: Iterable[Record], *, durable: bool = False) -> None:
    """Append one line per record; `durable` waits for the disk. After an OSError the file is as it was."""
    atomic.append_text(path, _lines(records), durable=durable)


def read(path: Path, until: int | None = None) -> list[Record]:
    """Read all records, oldest first, or those up to step `until`.

    Returns none if there is no file; a torn last line is ignored. Raises ValueError with the line number when any other
    line is not a record: a flat JSON object of finite numbers, truth values and nulls with a `global_step`.
    """
    if not path.exists():
        return []
    if not path.is_file():  # opening a pipe would wait for its writer
        raise ValueError(f"{path}: expected a file of metrics, got a folder or a device; move it away")
    records = []
    with path.open("rb") as file:
        for i, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), start=1):
            if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                break  # torn
            try:
                records.append(_parse(line))
            except (ValueError, OverflowError, RecursionError):
                raise ValueError(f"{path}: line {i} is not a metrics record; restore it or delete the file") from None
            if until is not None and records[-1]["global_step"] >= until:
                break
    return [record for record in records if until is None or record["global_step"] <= until]


def _parse(line: bytes) -> Record:
    record = json.loads(line.decode())
    is_too_long = not line.endswith(b"\n")
    if is_too_long or type(record) is not dict or type(record.get("global_step")) is not int:
        raise ValueError
    values = [value for value in record.values() if value is not None]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise ValueError
    return record


def check_complete(path: Path, records: Iterable[Record]) -> None:
    """Raise ValueError when a record lacks a field that is needed. Charts, tables and checkpoints need them."""
    for record in records:
        missing = (NUMBERS - {name for name, value in record.items() if value is not None}) | (NULLABLE - record.keys())
        if missing:
            names = ", ".join(sorted(missing))
            raise ValueError(f"{path}: step {record['global_step']} lacks {names}; restore it or delete the file")


def cut_after(path: Path, global_step: int) -> list[Record]:
    """Drop later lines and a torn one; return the rest.

    Raises ValueError, with the file as it was, when one of the rest is not complete.
    """
    kept = read(path, until=global_step)  # what follows may be anything: it goes
    check_complete(path, kept)
    if path.exists():
        rewrite(path, kept)
    return kept


def rewrite(path: Path, records: Iterable[Record]) -> None:
    """Replace the file atomically."""
    atomic.write_text(path, _lines(records), durable=True)


def _lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)


def finite(value: float) -> float | None:
    """Return the number, or None (null in the file) if not finite."""
    return value if math.isfinite(value) else None
