"""Documents out of a file of text, JSON, CSV, Parquet or Arrow, perhaps compressed."""

import codecs
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

from outside_in.data.prepare import json_stream
from outside_in.data.prepare.compression import BLOCK_BYTES, decompressed, find_compression
from outside_in.data.prepare.formats import PROBE_BYTES, Kind, find_kind, has_nul, not_utf8
from outside_in.data.prepare.places import Local, Piped, Place, Remote
from outside_in.data.prepare.rows import Bad, Document, ReadOptions, accepted, text_of
from outside_in.data.prepare.tables import arrow_rows, csv_rows, parquet_rows
from outside_in.runtime.log import log

MAX_DOCUMENT_BYTES = 2**28  # a document is held in memory, several times over


class Format(NamedTuple):
    kind: Kind
    compression: str | None


class Line(NamedTuple):
    number: int  # from 1 on
    text: Document


@dataclass(frozen=True)
class File:
    """A file of documents."""

    path: Path | Remote | Piped
    revision: ClassVar[None] = None

    @property
    def place(self) -> Place:
        return Local(self.path) if isinstance(self.path, Path) else self.path

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def size_bytes(self) -> int | None:
        return self.place.size_bytes

    @property
    def version(self) -> Any:
        """Return what changes with the content."""
        return self.place.version

    def sha256(self) -> str | None:
        return self.place.sha256()

    @contextmanager
    def content(self) -> Iterator[tuple[BinaryIO, Any]]:
        """Open the file: as it lies there, and decompressed."""
        compression = self._compression()
        with self.place.open() as raw, decompressed(raw, compression, self.name) as content:
            yield raw, content

    def _compression(self) -> str | None:
        with self.place.open() as raw:
            return find_compression(raw.read(16), self.name)

    def format(self, reading: ReadOptions) -> Format:
        """Look into the file. Raises ValueError, naming the remedy, when it holds no documents."""
        compression = self._compression()
        with self.content() as (_, content):
            return Format(find_kind(content.read(PROBE_BYTES), self.name, reading, compression), compression)

    def documents(self, reading: ReadOptions, skip: int) -> Iterator[tuple[Document, int]]:
        """Yield documents after the first `skip`, and the bytes read so far.

        Raises ValueError, naming the place, when one cannot be read. It is `Bad` instead if these are to be skipped.
        """
        kind, compression = self.format(reading)
        count = 0
        with self.content() as (raw, content):
            for count, document in enumerate(_read(kind, compression, self.name, content, reading), start=1):
                if count > skip:
                    yield accepted(document, reading), raw.tell()
        if not count:
            if not reading.skip_bad:
                raise ValueError(f"{self.name}: expected documents, got none; leave it out")
            log.warning(f"{self.name}: has no documents")

    def contains(self, texts: list[bytes]) -> list[bool]:
        """Search the content for texts, however large it is."""
        overlap, rest, found = max(map(len, texts)) - 1, b"", [False] * len(texts)
        with self.content() as (_, content):
            while (block := content.read(BLOCK_BYTES)) and not all(found):
                block = rest + block
                found = [known or text in block for known, text in zip(found, texts)]
                rest = block[len(block) - overlap :] if overlap else b""
        return found


def _read(
    kind: Kind, compression: str | None, name: str, content: BinaryIO, reading: ReadOptions
) -> Iterator[Document]:
    if kind == "text":
        yield from _texts(name, content, reading)
    elif kind == "lines":
        yield from _json_lines(name, content, reading)
    elif kind == "json":
        values = json_stream.values(name, content, reading.errors, MAX_DOCUMENT_BYTES)
        yield from (text_of(row, reading.field, f"{name}: row {i:,}") for i, row in enumerate(values, start=1))
    elif kind == "csv":
        yield from csv_rows(name, (text for _, text in _lines(name, content, reading)), reading)
    else:
        rows = parquet_rows if kind == "parquet" else arrow_rows
        with tempfile.TemporaryFile() as plain:
            if compression:  # a table is read from several places of a file
                shutil.copyfileobj(content, plain)
                plain.seek(0)
            yield from rows(name, plain if compression else content, reading)


def _texts(name: str, content: BinaryIO, reading: ReadOptions) -> Iterator[Document]:
    """Yield the texts between separators, or all of a plain text file."""
    separator = (reading.separator or "").encode()
    rest, position, at_start = b"", 0, True
    while block := content.read(BLOCK_BYTES if separator else MAX_DOCUMENT_BYTES + 1):
        if at_start and block.startswith(codecs.BOM_UTF8):
            block, position = block[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
        at_start = False
        *whole, rest = (rest + block).split(separator) if separator else [rest + block]
        for document in whole:
            yield _decoded(document, name, position, reading)
            position += len(document) + len(separator)
        if len(rest) > MAX_DOCUMENT_BYTES:
            windows = with_windows_line_ends(reading.separator or "")
            hint = f" {windows!r}, as its line ends are CRLF" if windows and windows.encode() in rest else ""
            raise ValueError(
                f"{name}: expected documents of at most {MAX_DOCUMENT_BYTES // 2**20} MiB, got a larger one at "
                f"byte {position:,}; split it with --separator{hint}"
            )
    if rest:
        yield _decoded(rest, name, position, reading)


def with_windows_line_ends(separator: str) -> str | None:
    """Return a separator's form in a file with CRLF line ends; None if it is the same."""
    windows = separator.replace("\r\n", "\n").replace("\n", "\r\n")
    return windows if windows != separator else None


def _lines(name: str, content: BinaryIO, reading: ReadOptions) -> Iterator[Line]:
    """Yield the lines of a file, with their ends."""
    position = 0
    for i in itertools.count(1):
        line = content.readline(MAX_DOCUMENT_BYTES + 1)
        if not line:
            return
        position, start = position + len(line), position
        if len(line) <= MAX_DOCUMENT_BYTES:
            yield Line(i, _decoded(line.removeprefix(codecs.BOM_UTF8) if i == 1 else line, name, start, reading))
            continue
        yield Line(
            i, Bad(f"{name}: line {i:,}: expected at most {MAX_DOCUMENT_BYTES // 2**20} MiB in a line; split it")
        )
        while not line.endswith(b"\n") and (line := content.readline(BLOCK_BYTES)):
            position += len(line)


def _json_lines(name: str, content: BinaryIO, reading: ReadOptions) -> Iterator[Document]:
    """Yield one field of the JSON object in each line that is not blank."""
    for i, line in _lines(name, content, reading):
        if isinstance(line, Bad):
            yield line
        elif line.strip():
            yield _from_json(line, reading.field, f"{name}: line {i:,}")


def _from_json(line: str, field: str, where: str) -> Document:
    try:
        row = json.loads(line)
    except ValueError as error:
        return Bad(f"{where}: expected a JSON object, got other text ({error})")
    except RecursionError:
        return Bad(f"{where}: nested too deeply")
    return text_of(row, field, where)


def _decoded(content: bytes, name: str, position: int, reading: ReadOptions) -> Document:
    """Decode the bytes of a document that begins at a position of a file."""
    if (nul := content.find(b"\0")) >= 0:
        return Bad(has_nul(position + nul, name))
    try:
        return content.decode("utf-8", reading.errors)
    except UnicodeDecodeError as error:
        return Bad(not_utf8(content, error, position, name))
