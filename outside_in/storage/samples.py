"""`samples.txt`: a line for each completion, after the global step of its checkpoint."""

import re
from collections.abc import Iterable
from pathlib import Path

from outside_in.storage import atomic

LINE = re.compile(r"step (\d+) \| (.*)")


def append(path: Path, global_step: int, texts: Iterable[str]) -> None:
    """Append completions, each as one line. After an OSError the file is as it was."""
    atomic.append_text(path, "".join(f"step {global_step} | {one_line(text)}\n" for text in texts))


def read(path: Path) -> dict[int, str]:
    """Read the completions of each global step, one a line."""
    texts: dict[int, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        if match := LINE.fullmatch(line):
            step = int(match[1])
            texts[step] = f"{texts[step]}\n{match[2]}" if step in texts else match[2]
    return texts


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


def one_line(text: str) -> str:
    """Return a text as one line: its line breaks and other control characters escaped."""
    joined = "\\n".join(text.splitlines())
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in joined)
