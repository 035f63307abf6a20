"""Compressed files, read as streams: gzip and zstd."""

import errno
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

COMPRESSED = {".gz", ".zst"}
BLOCK_BYTES = 2**20


@contextmanager
def open_compressed(path: Path) -> Iterator[tuple[BinaryIO, Any]]:
    """Open a file twice: raw, and decompressed."""
    try:
        with path.open("rb") as raw:
            if path.suffix.lower() == ".gz":
                with gzip.open(raw) as content:
                    yield raw, content
            elif path.suffix.lower() == ".zst":
                yield raw, io.BufferedReader(_Chunks(_decompressed(raw)), BLOCK_BYTES)
            else:
                yield raw, raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged or cut off ({error}); fetch it again") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:  # where a compressed table is unpacked
            raise
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise ValueError(f"{path}: damaged or cut off ({error}); fetch it again") from error
        raise


def _decompressed(raw: BinaryIO) -> Iterator[bytes]:
    """Yield the content of all frames of a zstd file. Raises EOFError when the last one is incomplete."""
    decompressor = require("zstandard").ZstdDecompressor(max_window_size=2**31)
    frame = None
    while content := raw.read(BLOCK_BYTES):
        while content:
            if frame is None or frame.eof:
                frame = decompressor.decompressobj()
            yield frame.decompress(content)
            content = frame.unused_data if frame.eof else b""
    if frame and not frame.eof:
        raise EOFError("it ends within a frame")


class _Chunks(io.RawIOBase):
    """A file whose content comes in chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def require(module: str) -> Any:
    try:
        return __import__(module)
    except ImportError:
        raise ValueError(f"the package {module} is not installed; add `--group prepare` to `uv run`") from None
