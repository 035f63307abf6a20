"""`metrics.jsonl`: one strict-JSON line per global step, append-only."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def append(path: Path, records: Iterable[Record], *, durable: bool = False) -> None:
    """Append one line per record; `durable` waits for the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> list[Record]:
    """Read all records, oldest first; no file is no records, and a torn last line is left out.

    Raises ValueError with the line number when any other line is not a JSON object with a `global_step`.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn or empty
        try:
            record = json.loads(line)
            record["global_step"] + 0
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path}: line {number} is not a metrics record; restore it or delete the file") from None
        records.append(record)
    return records


def cut_after(path: Path, global_step: int) -> list[Record]:
    """Drop the lines after `global_step` (and a torn last one) from the file; return the lines that stay."""
    kept = [record for record in read(path) if record["global_step"] <= global_step]
    if path.exists():
        shorter = path.with_suffix(".jsonl.tmp")
        shorter.unlink(missing_ok=True)
        append(shorter, kept, durable=True)
        shorter.replace(path)
    return kept


def finite(value: float) -> float | None:
    """Return the number, or None (null in the file) when it is not finite."""
    return value if math.isfinite(value) else None
