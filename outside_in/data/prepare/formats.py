"""What a file holds: plain text, JSON, CSV or a table, by its content first and its suffix second.

What is none of these is refused with the command that converts it.
"""

import codecs
import json
import re
import shlex
from pathlib import PurePosixPath
from typing import Literal

from outside_in.data.prepare.compression import PROGRAMS, STARTS, named_compression
from outside_in.data.prepare.rows import ReadOptions

Kind = Literal["text", "lines", "json", "csv", "parquet", "arrow"]

TEXT, LINES, JSON, CSV = {".txt", ".text", ".md"}, {".jsonl", ".ndjson"}, {".json"}, {".csv", ".tsv"}
PARQUET, ARROW = {".parquet"}, {".arrow", ".feather"}
SURE = TEXT | LINES | PARQUET | ARROW  # suffixes of documents
POSSIBLE = JSON | CSV  # suffixes of documents, or of something else
KIND_OF_SUFFIX: dict[str, Kind] = {
    suffix: kind
    for suffixes, kind in ((LINES, "lines"), (CSV, "csv"), (PARQUET, "parquet"), (ARROW, "arrow"))
    for suffix in suffixes
}
PROBE_BYTES = 2**18
OTHERS = [  # the start of a file, what it is, and the program that makes text of it
    (re.compile(rb"PK(\x03\x04|\x05\x06)"), "a zip archive", "unzip"),
    (re.compile(rb".{257}ustar", re.DOTALL), "a tar archive", "tar -xf"),
    (re.compile(rb"7z\xbc\xaf\x27\x1c"), "a 7z archive", "7z x"),
    (re.compile(rb"Rar!\x1a\x07"), "a rar archive", "unrar x"),
    (re.compile(rb"%PDF-"), "a PDF", "pdftotext"),
]
BYTE_ORDER_MARKS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
JSON_ROWS = re.compile(r"\[\s*\{\s*[\"}]")  # how an array of objects begins
PIPES = STANDARD_INPUT, PIPE = "standard input", "pipe"  # names of what has none
PRINTABLE = bytes(range(0x20, 0x7F))
MANY, MOST = 0.1, 0.25  # shares of bytes that are not UTF-8: of text, and of what is none


def suffix_of(name: str) -> str:
    """Return the suffix of a file's content, without that of its compression."""
    path = PurePosixPath(name)
    return (path.with_suffix("") if named_compression(name) else path).suffix.lower()


def find_kind(start: bytes, name: str, reading: ReadOptions, compression: str | None = None) -> Kind:
    """Return what a file holds, by the start of its content and its suffix.

    Text whose suffix tells nothing, or plain text, is JSON if it begins with an object that has the field.
    Raises ValueError, naming the remedy, for what cannot be read as documents.
    """
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith(b"ARROW1") or (start.startswith(b"\xff\xff\xff\xff") and start[6:8] == b"\0\0"):
        return "arrow"  # a file or a stream
    _check_format(start, name, compression)
    suffix = suffix_of(name)
    if suffix in PARQUET | ARROW:
        raise ValueError(f"{name}: not a readable {suffix[1:].title()} file; fetch it again or rename it")
    check_encoding(start, name, compression, with_nuls=reading.skip_bad)
    text = start.decode("utf-8-sig", "replace").lstrip()
    if suffix in JSON:
        if not text.startswith(("{", "[")):
            raise ValueError(f"{name}: expected JSON, got other text; rename it if it is plain text")
        return _layout(text)
    if suffix in KIND_OF_SUFFIX:
        return "json" if suffix in LINES and JSON_ROWS.match(text) else KIND_OF_SUFFIX[suffix]
    return _layout(text) if _has_field(text, reading.field) else "text"


def _layout(text: str) -> Kind:
    """Return whether JSON objects are one a line, or in another layout."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):  # cut off
        end = 2
    return "json" if text.startswith("[") or "\n" in text[:end] else "lines"


def _has_field(text: str, field: str) -> bool:
    """Return whether text begins with a JSON object, or an array of them, that has a field."""
    if not re.match(r"(\[\s*)?\{\s*\"", text):
        return False
    try:
        row, _ = json.JSONDecoder().raw_decode(text.lstrip("[ \t\r\n"))
    except RecursionError:
        return False
    except ValueError:  # no JSON, or cut off
        return len(text) > PROBE_BYTES // 4 and f'"{field.rpartition(".")[2]}"' in text
    return field in row or field.partition(".")[0] in row


def _check_format(start: bytes, name: str, compression: str | None) -> None:
    """Raise ValueError for archives and the like."""
    for pattern, what, program in OTHERS:
        if pattern.match(start):
            command = f"{program} {shlex.quote(name)}"
            raise ValueError(f"{name}: expected documents, got {what}; unpack it: {command}")
    for inner, pattern in STARTS.items():
        if compression and pattern.match(start):
            raise ValueError(
                f"{name}: expected documents, got {inner} inside {compression}; unpack it: "
                f"{PROGRAMS[compression]} {shlex.quote(name)}"
            )


def check_encoding(start: bytes, name: str, compression: str | None = None, *, with_nuls: bool = False) -> None:
    """Raise ValueError, with the command that converts, for text in UTF-16 or UTF-32, and for NULs unless allowed."""
    encoding = next((found for mark, found in BYTE_ORDER_MARKS.items() if start.startswith(mark)), None)
    if encoding := encoding or _encoding_without_mark(start):
        command = conversion(f"iconv -f {encoding} -t UTF-8", name, compression)
        raise ValueError(f"{name}: expected UTF-8 text, got {encoding}; convert it: {command}")
    if b"\0" not in start:
        return
    if _share_of_invalid(start) > MOST:
        raise ValueError(f"{name}: expected UTF-8 text, got binary data; leave it out, or make text of it")
    if not with_nuls:
        raise ValueError(has_nul(start.index(b"\0"), name, compression))


def has_nul(position: int, name: str, compression: str | None = None) -> str:
    """Return the complaint about NUL bytes in text."""
    command = conversion(r"tr -d '\000'", name, compression)
    return f"{name}: expected text, but byte {position:,} is NUL; remove these bytes: {command}"


def not_utf8(content: bytes, error: UnicodeDecodeError, position: int, name: str) -> str:
    """Return the complaint about text that is not UTF-8: a few bytes of it, or all of it."""
    where = f"byte {position + error.start:,} is 0x{content[error.start]:02x}"
    around = content[max(0, error.start - PROBE_BYTES) : error.start + PROBE_BYTES]
    rare = len(around) * _share_of_invalid(around) < 3 or _share_of_invalid(around) <= MANY
    encoding = _encoding_without_mark(content[:PROBE_BYTES]) or "ENCODING"
    command = conversion(f"iconv -f {encoding} -t UTF-8", name)
    remedy = "convert it, or use --errors replace" if rare else f"it is in another encoding; convert it: {command}"
    return f"{name}: expected UTF-8 text, but {where}; {remedy}"


def conversion(program: str, name: str, compression: str | None = None) -> str:
    """Return the command that sends a file's content through a program."""
    if name in PIPES:
        return f"… | {program} | …"
    path = PurePosixPath(name)
    if compression := compression or named_compression(name):
        path = path.with_suffix("") if named_compression(name) else path
        program = f"{PROGRAMS[compression]} -c < {shlex.quote(name)} | {program}"
    else:
        program = f"{program} < {shlex.quote(name)}"
    return f"{program} > {shlex.quote(f'{path.stem}.utf8{path.suffix}')}"


def _share_of_invalid(content: bytes) -> float:
    """Return the share of bytes that are not UTF-8. A character that is cut off at the end counts as well."""
    valid = content.decode("utf-8", "ignore").encode()
    return 1 - len(valid) / max(1, len(content))


def _encoding_without_mark(content: bytes) -> str | None:
    """Return UTF-16LE or UTF-16BE if text without a byte order mark is one of them.

    The NULs of its spaces, digits and line ends are on one side, and its bytes are less printable than those of ASCII.
    """
    content = content[: len(content) // 2 * 2]
    nuls = content[::2].count(0), content[1::2].count(0)
    printable = len(content) - len(content.translate(None, PRINTABLE))
    if not any(nuls) or max(nuls) < 0.95 * sum(nuls) or printable > 0.7 * len(content):
        return None
    encoding = "UTF-16BE" if nuls[0] > nuls[1] else "UTF-16LE"
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(content)
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else encoding
