"""Which documents a command means: of files that are named, of files below folders, and of Hub datasets."""

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from outside_in.data.prepare.compression import BLOCK_BYTES, named_compression
from outside_in.data.prepare.description import listed_counts
from outside_in.data.prepare.files import File
from outside_in.data.prepare.folders import EMPTY, HIDDEN, TWICE, full_suffix, looks_held_out, walk
from outside_in.data.prepare.formats import POSSIBLE, SURE, suffix_of
from outside_in.data.prepare.hub_dataset import HubDataset
from outside_in.data.prepare.places import Local, Piped, Remote, is_remote, remote
from outside_in.data.prepare.rows import ReadOptions
from outside_in.runtime.log import log
from outside_in.storage.text import counted

AGAIN, COPIES, FOR_VALIDATION = "files met twice", "copies, compressed otherwise", "files that are for validation"
ROWS_LOOKED_AT = 100  # of a file that may hold documents, or something else
NAMED = 3  # of many files

Source = File | HubDataset


def find_files(paths: Iterable[Path | str | Piped]) -> list[File]:
    """List the files of documents that paths mean; see `FileSearch`."""
    return FileSearch(ReadOptions()).files(paths)


class FileSearch:
    """Finds files of documents, each once; counts what it leaves out, by suffix or reason."""

    def __init__(self, reading: ReadOptions) -> None:
        self.left_out: Counter[str] = Counter()
        self._reading = reading
        self._met: dict[Any, str] = {}  # why a file that is met again is left out, by identity

    def files(self, paths: Iterable[Path | str | Piped], *, for_validation: bool = False) -> list[File]:
        """List the files that are named, and those of documents below folders, sorted by name.

        Raises ValueError when a path does not exist, a file is empty or of another format, or a folder has none.
        """
        visited: set[tuple[int, int]] = set()
        paths = list(paths)
        found: dict[str, tuple[File, str]] = {}  # by name; with the part of it that is below a folder
        plain: dict[str, File] = {}  # by name without the suffix of a compression
        for file, inner in itertools.chain.from_iterable(self._below(path, visited) for path in paths):
            if reason := self._met.get(file.place.identity):
                self.left_out[reason] += 1
                continue
            self._met[file.place.identity] = FOR_VALIDATION if for_validation else AGAIN
            name = file.name.removesuffix(Path(file.name).suffix) if named_compression(file.name) else file.name
            if name in plain and _is_copy(plain[name], file):
                self.left_out[COPIES] += 1
                continue
            if name in plain:
                log.warning(
                    f"{plain[name].name} and {file.name}: both are read; name only one if they are the same text"
                )
            plain[name] = file
            found[file.name] = file, inner
        files = [file for file, _ in found.values()]
        if not files:
            first = paths[0].name if isinstance(paths[0], Piped) else paths[0]
            raise ValueError(f"{first}: expected text, but all of it is left out: {listed_counts(self.left_out)}")
        if not for_validation:
            _notice_held_out({file.name: inner for file, inner in found.values()})
        return files

    def _below(self, path: Path | str | Piped, visited: set[tuple[int, int]]) -> list[tuple[File, str]]:
        """Return the file at a path, or those of documents below it, and their names below it."""
        if isinstance(path, Piped):
            return [(_not_empty(File(path)), path.name)]
        before, is_first = self.left_out.copy(), not visited
        path = path.removeprefix("file://") if isinstance(path, str) else path
        if is_remote(str(path)):
            inside = _remote_files(str(path))
            if inside is None:
                return [(_not_empty(File(Remote(str(path)))), str(path).rpartition("/")[2])]
        else:
            path = Path(path)
            if not path.exists():
                raise ValueError(f"{path}: expected a file or folder of text, found nothing")
            if not path.is_dir():
                return [(_not_empty(File(path)), path.name)]
            inside = [(File(each), str(each.relative_to(path))) for each in walk(path, self.left_out, visited)]
        if taken := [(file, name) for file, name in inside if self._is_taken(file, name)]:
            return taken
        left_out = self.left_out - before
        if TWICE in left_out and not is_first:
            return []
        raise ValueError(
            f"{path}: expected files that end in {' '.join(sorted(SURE | POSSIBLE))} (also .gz, .bz2, .xz, .zst), "
            f"found none below it{f' (left out: {listed_counts(left_out)})' if left_out else ''}"
        )

    def _is_taken(self, file: File, name: str) -> bool:
        """Return whether a file below a folder holds documents; count it if not."""
        suffix = suffix_of(name)
        if any(part.startswith(".") for part in name.split("/")):
            reason = HIDDEN  # at a URL
        elif suffix not in SURE | POSSIBLE:
            reason = full_suffix(name)
        elif file.size_bytes == 0:
            reason = EMPTY
        elif suffix in POSSIBLE and not self._has_documents(file):
            reason = full_suffix(name)
        else:
            return True
        self.left_out[reason] += 1
        return False

    def _has_documents(self, file: File) -> bool:
        """Return whether one of the first rows has text."""
        reading = ReadOptions(self._reading.field, None, self._reading.errors, skip_bad=True)
        try:
            rows = itertools.islice(file.documents(reading, 0), ROWS_LOOKED_AT)
            return any(isinstance(document, str) for document, _ in rows)
        except ValueError:
            return False

    def look_into(self, files: list[File]) -> None:
        """Raise ValueError for files of other formats, before hours of work; tell what their names do not."""
        others = []
        for file in files:
            kind, compression = file.format(self._reading)
            if compression != named_compression(file.name):
                others.append(f"{file.name} ({compression})")
            elif kind in ("lines", "json") and suffix_of(file.name) not in (".jsonl", ".ndjson", ".json"):
                others.append(f"{file.name} (JSON)")
        if others:
            named = ", ".join(others[:NAMED]) + (", …" if len(others) > NAMED else "")
            log.info(f"read as what it holds, not as its name says: {counted(len(others), 'file')}: {named}")


def _not_empty(file: File) -> File:
    if file.size_bytes == 0:
        raise ValueError(f"{file.name}: the file is empty; leave it out")
    return file


def _remote_files(url: str) -> list[tuple[File, str]] | None:
    """List the files below a URL, and their names below it; None if there is a file."""
    with remote(url) as (system, top):
        if system.isfile(top):
            return None
        if not system.exists(top):
            raise FileNotFoundError
        paths = [str(path) for path in system.find(top)]
        return [
            (File(Remote(system.unstrip_protocol(path))), path.removeprefix(f"{top.rstrip('/')}/")) for path in paths
        ]


def _is_copy(one: File, other: File) -> bool:
    """Return whether two files, compressed in different ways, have the same content; False if not both are local."""
    if not isinstance(one.place, Local) or not isinstance(other.place, Local):
        return False
    with one.content() as (_, content), other.content() as (_, other_content):
        while (block := content.read(BLOCK_BYTES)) == other_content.read(BLOCK_BYTES):
            if not block:
                return True
    return False


def _notice_held_out(names: dict[str, str]) -> None:
    """Tell when some of the training files, but not all, are called as validation or test text is."""
    held_out = [name for name, inner in names.items() if looks_held_out(inner)]
    if held_out and len(held_out) < len(names):
        which = ", ".join(held_out[:NAMED]) + (", …" if len(held_out) > NAMED else "")
        log.warning(
            f"{which}: called like test or validation text, but read as training text; "
            "use --validation-text for it, or leave it out"
        )
