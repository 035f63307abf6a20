"""The files below a folder: behind links too, each once, and what is left out is counted."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath

from outside_in.data.prepare.compression import named_compression
from outside_in.data.prepare.formats import suffix_of

HIDDEN, LINKS, TWICE, EMPTY = "hidden files", "links that lead nowhere", "folders met again", "empty files"
OTHER_KINDS = "pipes and devices"
HELD_OUT = re.compile(r"(^|[^a-z])(tests?|valid|validation|val|dev|eval)([^a-z]|$)")


def walk(folder: Path, left_out: Counter[str], visited: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield the files below a folder, sorted by name, and count what is none or hidden.

    A folder that is met again, through a link or in a circle, is not entered again.
    """
    facts = folder.stat()
    if (facts.st_dev, facts.st_ino) in visited:
        left_out[TWICE] += 1
        return
    visited.add((facts.st_dev, facts.st_ino))
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror or error}); allow it, or leave it out") from error
    for path in paths:
        if path.name.startswith("."):
            left_out[HIDDEN] += _count_files(path)
        elif path.is_dir():
            yield from walk(path, left_out, visited)
        elif path.is_file():
            yield path
        else:
            left_out[OTHER_KINDS if path.exists() else LINKS] += 1


def _count_files(path: Path) -> int:
    """Count a file, or the files below a folder."""
    if path.is_symlink() or not path.is_dir():
        return 1
    return sum(len(names) for _, _, names in os.walk(path))


def full_suffix(name: str) -> str:
    """Return the suffix by which a file that is left out is counted."""
    suffix = suffix_of(name)
    compression = PurePath(name).suffix.lower() if named_compression(name) else ""
    return suffix + compression or "no suffix"


def looks_held_out(name: str) -> bool:
    """Return whether a file, or a folder above it, is called as validation or test text is."""
    return bool(HELD_OUT.search(name.lower()))
