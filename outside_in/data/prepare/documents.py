"""Documents from text, JSON lines or Parquet files, and from Hub datasets."""

import codecs
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, Self

from outside_in.data.prepare.compression import BLOCK_BYTES, COMPRESSED, open_compressed, require

TEXT, LINES, TABLE = {".txt", ".text", ".md"}, {".jsonl", ".ndjson"}, {".parquet"}
MAX_DOCUMENT_BYTES = 2**28  # a document is held in memory, several times over
ROWS = 256  # of a table, read at a time


@dataclass(frozen=True)
class ReadOptions:
    """How to find documents in files: see `prepare_data.py --help`."""

    field: str = "text"
    separator: str | None = None
    errors: Literal["strict", "replace"] = "strict"


@dataclass(frozen=True)
class File:
    """A file of documents."""

    path: Path
    revision: ClassVar[None] = None

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

    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def documents(self, reading: ReadOptions, skip: int) -> Iterator[tuple[str, int]]:
        """Yield documents after the first `skip`, and the bytes read so far.

        Raises ValueError, naming the place, when one cannot be read.
        """
        with open_compressed(self.path) as (raw, content):
            kind = _kind(self.path)
            read = _lines if kind in LINES else _rows if kind in TABLE else _texts
            count = 0
            for count, text in enumerate(read(self.path, content, reading), start=1):
                if count > skip:
                    yield text, raw.tell()
        if not count:
            raise ValueError(f"{self.path}: expected documents, got none; leave it out")


@dataclass(frozen=True)
class HubDataset:
    """A dataset that the library `datasets` loads, from the Hub or locally."""

    dataset: str
    config: str | None
    split: str
    revision: str | None = None  # a commit

    def at(self, revision: str | None) -> Self:
        return replace(self, revision=revision)

    def sha256(self) -> None:
        """Return None: it is not read as files."""

    def newest_revision(self) -> str | None:
        """Ask the Hub for the newest commit; None for a local folder."""
        if Path(self.dataset).exists():
            return None
        from huggingface_hub import HfApi  # half a second, which local text does not need

        try:
            return HfApi().dataset_info(self.dataset).sha
        except Exception as error:  # of any library below
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> ValueError:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return ValueError(f"{self.name}: the dataset cannot be opened: {reason}")

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.dataset, self.config, self.split) if part)

    @property
    def size_bytes(self) -> None:
        return None

    @property
    def version(self) -> str | None:
        return self.revision

    def documents(self, reading: ReadOptions, skip: int) -> Iterator[tuple[str, int]]:
        """Stream documents after the first `skip`, and their bytes so far."""
        datasets = require("datasets")
        datasets.disable_progress_bars()
        try:
            rows = datasets.load_dataset(
                self.dataset, self.config, split=self.split, revision=self.revision, streaming=True
            )
        except Exception as error:  # of any library below
            raise self._unavailable(error) from error
        size = 0
        for i, row in enumerate(rows.skip(skip), start=skip + 1):
            text = _text_of(row, reading.field, f"{self.name}: row {i:,}")
            size += len(text.encode("utf-8", "surrogatepass"))
            yield text, size


def find_files(paths: list[Path]) -> list[File]:
    """List files, and the text files below folders, sorted by name.

    Raises ValueError when a path does not exist, a file is empty, or a folder has no text files.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: expected a file or folder of text, found nothing")
        if path.is_dir():
            known = TEXT | LINES | TABLE
            below = [file for file in sorted(path.rglob("*")) if file.is_file() and _kind(file) in known]
            if not below:
                endings = " ".join(sorted(known))
                raise ValueError(f"{path}: expected files that end in {endings} (also .gz, .zst), found none below it")
            found += below
        else:
            found.append(path)
    for path in found:
        if path.is_file() and path.stat().st_size == 0:
            raise ValueError(f"{path}: the file is empty; leave it out")
    return [File(path) for path in dict.fromkeys(found)]


def _kind(path: Path) -> str:
    """Return the suffix of a file's content, without that of its compression."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return inner.suffix.lower()


def _texts(path: Path, content: BinaryIO, reading: ReadOptions) -> Iterator[str]:
    """Yield the texts between separators, or all of a plain text file."""
    separator = (reading.separator or "").encode()
    rest, position, at_start = b"", 0, True
    while block := content.read(BLOCK_BYTES if separator else MAX_DOCUMENT_BYTES + 1):
        if at_start and block.startswith(codecs.BOM_UTF8):
            block, position = block[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
        at_start = False
        *whole, rest = (rest + block).split(separator) if separator else [rest + block]
        for document in whole:
            yield _decoded(document, path, position, reading)
            position += len(document) + len(separator)
        if len(rest) > MAX_DOCUMENT_BYTES:
            raise ValueError(
                f"{path}: expected documents of at most {MAX_DOCUMENT_BYTES // 2**20} MiB, got a larger one at "
                f"byte {position:,}; split it with --separator"
            )
    if rest:
        yield _decoded(rest, path, position, reading)


def _lines(path: Path, content: BinaryIO, reading: ReadOptions) -> Iterator[str]:
    """Yield one field of the JSON object in each line."""
    position = 0
    for i in itertools.count(1):
        line = content.readline(MAX_DOCUMENT_BYTES + 1)
        if not line:
            return
        where = f"{path}: line {i:,}"
        if len(line) > MAX_DOCUMENT_BYTES:
            raise ValueError(f"{where}: expected at most {MAX_DOCUMENT_BYTES // 2**20} MiB in a line; split it")
        text = _decoded(line.removeprefix(codecs.BOM_UTF8) if i == 1 else line, path, position, reading)
        position += len(line)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{where}: expected a JSON object, got other text ({error})") from None
        except RecursionError:
            raise ValueError(f"{where}: nested too deeply") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")  # noqa: TRY004
        yield _text_of(row, reading.field, where)


def _rows(path: Path, content: BinaryIO, reading: ReadOptions) -> Iterator[str]:
    """Yield one column of a Parquet table, which needs a seekable file."""
    require("pyarrow")
    import pyarrow  # an optional package
    from pyarrow import parquet

    with tempfile.TemporaryFile() as plain:
        if path.suffix.lower() in COMPRESSED:
            shutil.copyfileobj(content, plain)
        try:
            table = parquet.ParquetFile(plain if path.suffix.lower() in COMPRESSED else content)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: not a readable Parquet file ({str(error)[:200]})") from None
        names = table.schema_arrow.names
        if reading.field not in names:
            raise ValueError(f"{path}: no column {reading.field!r}; --field takes one of {_listed(names)}")
        rows = 0
        try:
            for batch in table.iter_batches(ROWS, columns=[reading.field]):
                for text in batch.column(0).to_pylist():
                    rows += 1
                    yield _text_of({reading.field: text}, reading.field, f"{path}: row {rows:,}")
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: damaged after row {rows:,} ({str(error)[:200]}); fetch it again") from None


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise ValueError(f"{where}: no field {field!r}; --field takes one of {_listed(row)}")
    if not isinstance(row[field], str):
        raise ValueError(f"{where}: expected text in {field!r}, got {type(row[field]).__name__}")  # noqa: TRY004
    return row[field]


def _decoded(content: bytes, path: Path, position: int, reading: ReadOptions) -> str:
    try:
        return content.decode("utf-8", reading.errors)
    except UnicodeDecodeError as error:
        where = f"byte {position + error.start:,} is 0x{content[error.start]:02x}"
        raise ValueError(f"{path}: expected UTF-8 text, but {where}; convert it, or use --errors replace") from None


def _listed(names: Any) -> str:
    return ", ".join(map(str, list(names)[:20])) or "none"
