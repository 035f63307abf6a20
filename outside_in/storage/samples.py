"""`samples.txt`: one line per checkpoint, its global step and a completion."""

import re
from pathlib import Path

from outside_in.storage import atomic

LINE = re.compile(r"step (\d+) \| .*")


def append(path: Path, global_step: int, text: str) -> None:
    """Append a completion as one line, its line breaks escaped. After an OSError the file is as it was."""
    atomic.append_text(path, f"step {global_step} | {_one_line(text)}\n")


def cut_after(path: Path, global_step: int) -> None:
    """Drop the completions of later global steps."""
    if not path.exists():
        return
    if not path.is_file():  # opening a pipe would wait for its writer
        raise ValueError(f"{path}: expected a file of samples, got a folder or a device; move it away")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # a kill can tear the last one
    kept = [line for line in whole if not (match := LINE.match(line)) or int(match[1]) <= global_step]
    atomic.write_text(path, "".join(kept))


def _one_line(text: str) -> str:
    return "\\n".join(text.splitlines())
