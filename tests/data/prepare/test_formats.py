"""Files are read as what they hold; what cannot be read as documents is named, with the command that converts it."""

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import tarfile

import pyarrow as pa
import pytest
import zstandard
from pyarrow import feather, ipc, parquet

from outside_in.data.prepare import json_stream
from outside_in.data.prepare.files import File
from outside_in.data.prepare.places import Remote, read_pipe
from outside_in.data.prepare.rows import Bad, ReadOptions

STORIES = ["Story 1.", 'Story, "2".', "Story\n三 🦜"]
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def lines(texts=STORIES, field="text"):
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


def array(texts=STORIES, field="text", indent=None):
    return json.dumps([{"id": 1, field: text} for text in texts], indent=indent).encode()


def pretty_objects(texts=STORIES):
    return "\n".join(json.dumps({"id": 1, "text": text}, indent=2) for text in texts).encode()


def table(texts=STORIES, dialect="excel"):
    sink = io.StringIO()
    csv.writer(sink, dialect).writerows([["id", "text"], *([1, text] for text in texts)])
    return sink.getvalue().encode()


def columns(texts=STORIES):
    return pa.table({"id": [1] * len(texts), "text": texts})


def parquet_file(texts=STORIES):
    sink = pa.BufferOutputStream()
    parquet.write_table(columns(texts), sink)
    return sink.getvalue().to_pybytes()


def arrow(texts=STORIES, make=ipc.new_file):
    sink = pa.BufferOutputStream()
    with make(sink, columns(texts).schema) as writer:
        writer.write_table(columns(texts), max_chunksize=2)
    return sink.getvalue().to_pybytes()


def read(path, skip=0, **reading):
    return [text for text, _ in File(path).documents(ReadOptions(**reading), skip)]


def refusal(path, **reading):
    with pytest.raises(ValueError) as caught:
        read(path, **reading)
    line = str(caught.value)
    assert line.startswith(str(path)) and "\n" not in line
    return line


FORMATS = {
    "a.json": lines(),
    "b.json": array(),
    "c.json": array(indent=2),
    "d.json": pretty_objects(),
    "a.jsonl": array(),
    "b.jsonl": lines(),
    "a.csv": table(),
    "a.tsv": table(dialect="excel-tab"),
    "a.parquet": parquet_file(),
    "a.arrow": arrow(),
    "b.arrow": arrow(make=ipc.new_stream),
    "a.feather": arrow(),
    "plain.txt": lines(),
    "array.txt": array(),
    "no-suffix": lines(),
    "parquet.txt": parquet_file(),
    "arrow": arrow(make=ipc.new_stream),
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_documents(tmp_path, name, compression):
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESS[compression](FORMATS[name]))
    assert read(path) == STORIES
    assert read(path, skip=2) == STORIES[2:]


@pytest.mark.parametrize("name", ["a.txt", "no-suffix", "a.txt.gz"])
@pytest.mark.parametrize("compression", list(COMPRESS)[1:])
def test_compression_goes_by_content(tmp_path, name, compression):
    (tmp_path / name).write_bytes(COMPRESS[compression](b"some text"))
    assert read(tmp_path / name) == ["some text"]


def test_a_compressed_feather_file_is_read(tmp_path):
    feather.write_feather(columns(), tmp_path / "a.feather", compression="zstd")
    assert read(tmp_path / "a.feather") == STORIES


@pytest.mark.parametrize("suffix", list(COMPRESS)[1:])
def test_what_is_compressed_and_cut_off_is_named(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    content = COMPRESS[suffix](bytes(range(33, 127)) * 3000 + str(list(range(30_000))).encode())
    path.write_bytes(content[: len(content) // 2])
    assert "damaged or cut off" in refusal(path)


@pytest.mark.parametrize("errors", ["strict", "replace"])
@pytest.mark.parametrize(
    ("text", "encoding", "named"),
    [
        ("Hello, wörld.", "utf-16", "UTF-16"),
        ("Hello, wörld.", "utf-16-le", "UTF-16LE"),
        ("Hello, wörld.", "utf-16-be", "UTF-16BE"),
        ("Привет, мир. Как дела?", "utf-16-le", "UTF-16LE"),
        ("三只猫在这里。\n他们走了。", "utf-16-be", "UTF-16BE"),
        ("Hello", "utf-32", "UTF-32"),
        ('{"text": "Hello"}\n', "utf-16", "UTF-16"),
        ("text\nHello\n", "utf-16-le", "UTF-16LE"),
    ],
)
@pytest.mark.parametrize("name", ["a b.txt", "a.jsonl", "a.csv", "a.txt.gz"])
def test_utf16_is_named_with_the_command_that_converts_it(tmp_path, text, encoding, named, errors, name):
    path = tmp_path / name
    content = text.encode(encoding)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    line = refusal(path, errors=errors)
    assert f"got {named}; convert it: " in line
    assert "--errors" not in line
    command = line.partition("convert it: ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    converted = tmp_path / name.replace(".gz", "").replace(".", ".utf8.")
    assert converted.read_text("utf-8-sig") == text


@pytest.mark.parametrize("errors", ["strict", "replace"])
@pytest.mark.parametrize("place", [2, 2**19])
def test_nul_bytes_in_text_are_named_with_the_command_that_removes_them(tmp_path, errors, place):
    (tmp_path / "a.txt").write_bytes(b"x" * place + b"\0" + b"y" * 100)
    line = refusal(tmp_path / "a.txt", errors=errors)
    assert f"byte {place:,} is NUL" in line and "--errors" not in line
    command = line.partition("remove these bytes: ")[2].partition("; or")[0]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "a.utf8.txt").read_bytes() == b"x" * place + b"y" * 100


ZIP = b"PK\x05\x06" + bytes(18)  # the empty one
TAR = tarfile.TarInfo("a.txt").tobuf()


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", ZIP, "got a zip archive; unpack it: unzip"),
        ("a.txt.xz", lzma.compress(TAR), "a tar archive"),
        ("a.txt", b"%PDF-1.7 and so on", "got a PDF"),
        ("a.txt", bytes(range(256)) * 20, "binary data"),
        ("a.txt.xz", lzma.compress(bz2.compress(b"text")), "got bz2 inside xz"),
        ("a.json", b"Dear reader", "expected JSON, got other text"),
        ("a.json", b'[{"text": "one"}, {"text": "tw', "row 2: expected a JSON object, got other text"),
        ("a.json", b'[{"text": "one"}, {"text": "two"}', "row 3: expected a comma or ]|it is cut off"),
        ("a.json", b'[{"text": "one"} {"text": "two"}]', "row 2: expected a comma"),
        ("a.json", b'[{"text": "one"}] more', "expected the end of the file"),
        ("a.json", b'{"title": "one"}', "no field 'text'; --field takes one of title"),
        ("a.csv", b"id,body\n1,x\n", "no column 'text'; --field takes one of id, body"),
        ("a.csv", b'text\n"never closed\n', "expected CSV"),
        ("a.csv", b"id,text\n1,one, two\n", "row 1: expected 2 values, got 3"),
        ("a.arrow", b"text", "not a readable Arrow file"),
        ("a.arrow", arrow()[:-300], "not a readable Arrow file|damaged"),
        ("a.txt", "Привет".encode("koi8-r"), r"in another encoding; convert it: iconv -f ENCODING"),
    ],
)
def test_what_holds_no_documents_is_named(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    line = refusal(tmp_path / name)
    assert any(part in line for part in complaint.split("|")), line
    assert "--errors replace" not in line


def test_prose_that_looks_like_json_stays_prose(tmp_path):
    for content in ("[1] Smith et al.", "{curly} words", '{"key": 1}\nis a line of JSON', "[]"):
        (tmp_path / "a.txt").write_text(content)
        assert read(tmp_path / "a.txt") == [content]


def test_a_field_may_be_inside_another(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"meta": {"text": "one", "n": 1}}\n{"meta.text": "two"}\n')
    assert read(tmp_path / "a.jsonl", field="meta.text") == ["one", "two"]
    parquet.write_table(pa.table({"meta": [{"text": "one", "n": 1}, {"text": "two", "n": 2}]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", field="meta.text") == ["one", "two"]
    assert "--field takes one of meta." in refusal(tmp_path / "a.parquet", field="meta.body")
    assert "--field takes one of meta.text, meta.n" in refusal(tmp_path / "a.jsonl", field="meta.body")
    assert "no field 'meta.text.more'" in refusal(tmp_path / "a.jsonl", field="meta.text.more")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": null}\n{"id": 2}\n[1]\nno JSON\n{"text": "\xff"}\n{"text": "two"}\n'),
        ("a.json", b'[{"text": "one"}, {"text": null}, {"id": 2}, 7, {"text": ["x"]}, {}, {"text": "two"}]'),
        ("a.csv", b"id,text\n1,one\n2\n3,x,y\n4,5,6\n7\n8\n9,two\n"),
        ("a.txt", b"one--\xff--\0--x\xff--\xfe--\xfd--two"),
        ("a.parquet", parquet_file(["one", None, None, None, None, None, "two"])),
        ("a.arrow", arrow(["one", None, None, None, None, None, "two"])),
    ],
)
def test_bad_rows_are_named_or_skipped(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refusal(tmp_path / name, separator="--")
    documents = read(tmp_path / name, separator="--", skip_bad=True)
    assert [text for text in documents if isinstance(text, str)] == ["one", "two"]
    assert sum(isinstance(text, Bad) for text in documents) == 5
    assert read(tmp_path / name, separator="--", skip_bad=True, skip=3) == documents[3:]


def test_a_line_that_is_too_long_is_one_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr("outside_in.data.prepare.files.MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + b"x" * 3_000_000 + b"\n" + b'{"text": "two"}\n')
    assert "line 2: expected at most" in refusal(tmp_path / "a.jsonl")
    one, bad, two = read(tmp_path / "a.jsonl", skip_bad=True)
    assert (one, two) == ("one", "two") and isinstance(bad, Bad)


def test_text_in_parquet_that_is_not_utf8_names_its_row(tmp_path):
    binary = pa.array([b"one", b"ab\xffc"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, binary.buffers())
    parquet.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    assert "row 2: expected UTF-8 text, but byte 2 of it is 0xff; use --errors replace" in refusal(
        tmp_path / "a.parquet"
    )
    assert read(tmp_path / "a.parquet", errors="replace") == ["one", "ab\N{REPLACEMENT CHARACTER}c"]


@pytest.mark.parametrize("block", [1, 7, 64])
def test_json_values_are_found_across_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_stream, "BLOCK_BYTES", block)
    texts = [*STORIES, "x" * 100, ""]
    for content in (array(texts), array(texts, indent=2), pretty_objects(texts)):
        (tmp_path / "a.json").write_bytes(content)
        assert read(tmp_path / "a.json") == texts


def test_a_url_is_read_as_a_file_is(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines()))
    (tmp_path / "a.parquet").write_bytes(parquet_file())
    for name in ("a.jsonl.gz", "a.parquet"):
        remote = File(Remote(f"local://{tmp_path / name}"))
        assert [text for text, _ in remote.documents(ReadOptions(), 1)] == STORIES[1:]
        assert remote.size_bytes == (tmp_path / name).stat().st_size and remote.version
    with pytest.raises(ValueError, match=r"^local://.*nowhere: expected a file"):
        list(File(Remote(f"local://{tmp_path}/nowhere")).documents(ReadOptions(), 0))
    with pytest.raises(ValueError, match=r"^nothing://x: cannot be opened"):
        list(File(Remote("nothing://x")).documents(ReadOptions(), 0))


def test_what_came_from_a_pipe_can_be_read_again(tmp_path):
    (tmp_path / "text").write_bytes(COMPRESS[".zst"](lines()))
    file = File(read_pipe(str(tmp_path / "text"), tmp_path / "folder"))
    for _ in range(2):
        assert [text for text, _ in file.documents(ReadOptions(), 0)] == STORIES
    assert file.version == file.sha256() and not list((tmp_path / "folder").iterdir())
    file.path.file.close()
