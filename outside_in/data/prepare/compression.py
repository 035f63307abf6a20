"""Compressed files, read as streams: what fsspec reads, and zstd."""

import errno
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from fsspec.compression import compr
from fsspec.utils import infer_compression

BLOCK_BYTES = 2**20
STARTS = {  # of files, by what has compressed them
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "lzma": re.compile(rb"\x5d\x00\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "lz4": re.compile(rb"\x04\x22\x4d\x18"),
}
PROGRAMS = {"gzip": "gunzip", "bz2": "bunzip2", "xz": "unxz", "lzma": "unlzma", "zstd": "unzstd", "lz4": "unlz4"}


def named_compression(name: str) -> str | None:
    """Return the compression that a file's suffix names."""
    named = infer_compression(name.lower())
    return named if named in STARTS else None


def find_compression(start: bytes, name: str) -> str | None:
    """Return the compression of a file by its content. Raises ValueError if only its suffix names one."""
    found = next((compression for compression, pattern in STARTS.items() if pattern.match(start)), None)
    if (named := named_compression(name)) and not found:
        raise ValueError(
            f"{name}: expected {named}, got other content: damaged or cut off; fetch it again or rename it"
        )
    return found


@contextmanager
def decompressed(raw: BinaryIO, compression: str | None, name: str) -> Iterator[Any]:
    """Open a compressed file's content. Raises ValueError, naming the file, when it is damaged."""
    try:
        if compression == "zstd":
            yield io.BufferedReader(_Chunks(_zstd_content(raw)), BLOCK_BYTES)
        elif compression:
            opened: Any = compr
            if compression not in opened:
                require(compression)
            with opened[compression](raw, mode="rb") as content:
                yield content
        else:
            yield raw
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{name}: damaged or cut off ({error}); fetch it again") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:  # where a compressed table is unpacked
            raise
        if error.errno is None:  # gzip's and bz2's own
            raise ValueError(f"{name}: damaged or cut off ({error}); fetch it again") from error
        raise ValueError(f"{name}: cannot be read ({error.strerror or error})") from error
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise ValueError(f"{name}: damaged or cut off ({error}); fetch it again") from error
        raise


def _zstd_content(raw: BinaryIO) -> Iterator[bytes]:
    """Yield the content of all frames of a zstd file. Raises EOFError when the last one is incomplete.

    fsspec's reader takes a file that is cut off for a whole one.
    """
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
        raise ValueError(
            f"the package {module} is not installed; add `--group prepare` or `--with {module}` to `uv run`"
        ) from None
