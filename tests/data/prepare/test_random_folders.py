"""Whatever lies in a folder: every document is in the tokens once, or in a count of what was left out."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tempfile
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet
from safetensors.numpy import load_file

from outside_in.data.prepare.documents import FileSearch
from outside_in.data.prepare.pipeline import Options, Preparation
from outside_in.data.prepare.rows import ReadOptions
from outside_in.data.tokenizer import gpt2

pytestmark = pytest.mark.slow

SEPARATORS = ["\n%%\n", "\r\n\r\n", "\u2028"]
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
KINDS = [".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow", ".html", ""]
TEXT, EMPTY, BAD = "text", "empty", "bad"


@dataclass
class Entry:
    """A file of the folder: what it holds, and how often it is there."""

    suffix: str
    compression: str
    folder: str
    documents: list[str]  # each TEXT, EMPTY or BAD
    mark: bool  # a byte order mark
    again: str  # "", a link to it, a hard link, or a copy with another compression

    @property
    def is_hidden(self):
        return "/." in f"/{self.folder}"

    @property
    def is_read(self):
        may_be_something_else = self.suffix in (".json", ".csv") and set(self.documents) == {BAD}
        return not self.is_hidden and self.suffix not in (".html", "") and not may_be_something_else

    @property
    def reason(self):
        return "hidden files" if self.is_hidden else self.suffix + self.compression or "no suffix"


ENTRIES = st.builds(
    Entry,
    suffix=st.sampled_from(KINDS),
    compression=st.sampled_from(list(COMPRESS)),
    folder=st.sampled_from(["", "", "sub/", "sub/deep/", ".hidden/", "sub/.venv/lib/"]),
    documents=st.lists(st.sampled_from([TEXT, TEXT, EMPTY, BAD]), min_size=1, max_size=4),
    mark=st.booleans(),
    again=st.sampled_from(["", "", "link", "hard link", "copy"]),
)


def content_of(entry, number, separator):
    rows = [{TEXT: f"text {number}-{i}", EMPTY: "", BAD: None}[kind] for i, kind in enumerate(entry.documents)]
    mark = b"\xef\xbb\xbf" if entry.mark else b""
    if entry.suffix in (".parquet", ".arrow"):
        table, sink = (
            pa.table({"id": list(range(len(rows))), "text": pa.array(rows, pa.string())}),
            pa.BufferOutputStream(),
        )
        if entry.suffix == ".parquet":
            parquet.write_table(table, sink)
        else:
            with ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        return sink.getvalue().to_pybytes()
    if entry.suffix == ".json":
        return mark + json.dumps([{"text": row} for row in rows], indent=entry.mark or None).encode()
    if entry.suffix == ".jsonl":
        return mark + "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    if entry.suffix == ".csv":
        sink = io.StringIO()
        csv.writer(sink).writerows([["id", "text"], *([1, row] if row is not None else [1, 2, 3] for row in rows)])
        return mark + sink.getvalue().encode()
    return mark + b"".join((b"bad \xff" if row is None else row.encode()) + separator.encode() for row in rows)


def write(root, entry, number, separator):
    content = content_of(entry, number, separator)
    path = root / entry.folder / f"{number}{entry.suffix}{entry.compression}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(COMPRESS[entry.compression](content))
    if entry.again == "link":
        path.with_name(f"{number}-again{entry.suffix}{entry.compression}").symlink_to(path.name)
    elif entry.again == "hard link":
        path.with_name(f"{number}-again{entry.suffix}{entry.compression}").hardlink_to(path)
    elif entry.again == "copy":
        other = ".gz" if not entry.compression else ""
        path.with_name(f"{number}{entry.suffix}{other}").write_bytes(COMPRESS[other](content))


def expected_of(entries):
    """The texts, the dropped documents, and the files left out."""
    texts, dropped, left_out = [], Counter(), Counter()
    for number, entry in enumerate(entries):
        if entry.is_read:
            texts += [f"text {number}-{i}" for i, kind in enumerate(entry.documents) if kind == TEXT]
            dropped += Counter(kind for kind in entry.documents if kind != TEXT)
            if entry.again:
                left_out["copies, compressed otherwise" if entry.again == "copy" else "files met twice"] += 1
        else:
            left_out[entry.reason] += 1
            if entry.again == "copy" and not entry.is_hidden:
                left_out[entry.suffix + ("" if entry.compression else ".gz") or "no suffix"] += 1
            elif entry.again:
                left_out[entry.reason] += 1
    return texts, dropped, left_out


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ENTRIES, max_size=8), st.sampled_from(SEPARATORS), st.sampled_from(["", "circle", "outside", "within"]))
def test_every_document_is_in_the_tokens_once_or_in_a_count(entries, separator, folder_link):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "texts"
        (root / "sub").mkdir(parents=True)
        (root / "always.txt").write_text("always")
        for number, entry in enumerate(entries):
            write(root, entry, number, separator)
        texts, dropped, left_out = expected_of(entries)
        texts.append("always")
        if folder_link:
            target = {"circle": root, "outside": Path(name) / "outside", "within": root / "sub"}[folder_link]
            target.mkdir(exist_ok=True)
            (root / "sub/linked").symlink_to(target)
            if folder_link == "outside":
                (target / "b.md").write_text("outside")
                texts.append("outside")
            else:
                left_out["folders met again"] += 1

        reading = ReadOptions(separator=separator, skip_bad=True)
        search = FileSearch(reading)
        files = search.files([root, root / "always.txt"])
        left_out["files met twice"] += 1
        search.look_into(files)
        out = Path(name) / "out"
        options = Options(reading, validation=0)
        with closing(Preparation(out, files, options, overwrite=False, left_out=search.left_out)) as preparation:
            preparation.read(2, lambda: False, lambda *_: None)
            description = preparation.finish(lambda done: None)

        read = gpt2().decode(load_file(out / "train.safetensors")["tokens"].tolist()).split("<|endoftext|>")[:-1]
        assert sorted(read) == sorted(texts)
        assert (description["empty_dropped"], description["bad_dropped"]) == (dropped[EMPTY], dropped[BAD])
        assert description["left_out"] == dict(left_out)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(ENTRIES, max_size=4),
    st.sampled_from(["utf-16", "utf-16-le", "utf-16-be", "utf-32"]),
    st.sampled_from(["z.txt", "z.md", "z.jsonl", "z.txt.gz", "sub/z.txt.xz"]),
)
def test_a_file_in_another_encoding_is_named_before_anything_is_read(entries, encoding, name):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "sub").mkdir()
        for number, entry in enumerate(entries):
            write(root, entry, number, "\n")
        content = "Some text, in lines.\nAnd another.\n".encode(encoding)
        (root / name).write_bytes(COMPRESS["." + name.rpartition(".")[2]](content) if name.count(".") > 1 else content)
        search = FileSearch(ReadOptions(skip_bad=True))
        with pytest.raises(ValueError, match=r"z\..*expected UTF-8 text, got UTF-.*iconv"):
            search.look_into(search.files([root]))
