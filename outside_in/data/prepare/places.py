"""Where the bytes of a file are: on the disk, at a URL, or in a pipe."""

import functools
import hashlib
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from outside_in.data.prepare.compression import BLOCK_BYTES
from outside_in.data.prepare.formats import PIPE, STANDARD_INPUT


@dataclass(frozen=True)
class Local:
    """A file on the disk."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def size_bytes(self) -> int:
        return self.path.stat().st_size

    @property
    def version(self) -> list[int]:
        """Return size and time of modification, which change with the content."""
        return [self.path.stat().st_size, self.path.stat().st_mtime_ns]

    @property
    def identity(self) -> tuple[int, int]:
        """Return what is the same for two names of one file."""
        return self.path.stat().st_dev, self.path.stat().st_ino

    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        with file:
            yield file


@dataclass(frozen=True)
class Remote:
    """A file at a URL that fsspec can open. Raises ValueError when it cannot."""

    name: str

    @functools.cached_property
    def _info(self) -> dict[str, Any]:
        with remote(self.name) as (system, path):
            return system.info(path)

    @property
    def size_bytes(self) -> int | None:
        return self._info.get("size")

    @property
    def version(self) -> list[str]:
        """Return size and whatever its server says of the content."""
        facts = {key.lower(): value for key, value in self._info.items()}
        kinds = ("size", "etag", "md5hash", "sha256", "lastmodified", "last_modified", "mtime", "created")
        return [str(facts[kind]) for kind in kinds if facts.get(kind) is not None]

    @property
    def identity(self) -> str:
        return self.name

    def sha256(self) -> None:
        """Return None: it would be fetched again."""

    @contextmanager
    def open(self) -> Iterator[Any]:
        with remote(self.name) as (system, path), system.open(path, "rb") as file:
            yield file


@dataclass(frozen=True)
class Piped:
    """What came from a pipe, in a temporary file without a name."""

    name: str
    file: BinaryIO
    size_bytes: int
    digest: str

    @property
    def version(self) -> str:
        return self.digest

    @property
    def identity(self) -> str:
        return self.digest

    def sha256(self) -> str:
        return self.digest

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        self.file.seek(0)
        yield self.file


Place = Local | Remote | Piped


def is_remote(path: str) -> bool:
    return "://" in path


def is_pipe(path: str) -> bool:
    return path == "-" or (Path(path).exists() and not _is_file_or_folder(Path(path)))


def _is_file_or_folder(path: Path) -> bool:
    mode = path.stat().st_mode
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def read_pipe(path: str, folder: Path) -> Piped:
    """Copy what comes from a pipe, or standard input, to a nameless file on the disk of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    digest = hashlib.sha256()
    with open(sys.stdin.fileno() if path == "-" else path, "rb", closefd=path != "-") as pipe:
        while block := pipe.read(BLOCK_BYTES):
            digest.update(block)
            file.write(block)
    file.flush()
    return Piped(STANDARD_INPUT if path == "-" else PIPE, file, file.tell(), digest.hexdigest())


@contextmanager
def remote(url: str) -> Iterator[tuple[Any, str]]:
    """Return fsspec's file system for a URL, and the path in it.

    Raises ValueError, naming the URL, for what the packages below fsspec raise in the block.
    """
    try:
        system_and_path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{url}: cannot be opened ({reason}); add `--with PACKAGE` to `uv run`") from None
    try:
        yield system_and_path
    except ValueError:
        raise
    except FileNotFoundError:
        raise ValueError(f"{url}: expected a file or folder of text, found nothing") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{url}: cannot be read ({reason}); the same command resumes") from error
