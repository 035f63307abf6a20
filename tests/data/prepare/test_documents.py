"""Documents out of files: what is in them comes out, and what cannot be read is named with its place."""

import gzip
import json
import random

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from outside_in.data.prepare import files
from outside_in.data.prepare.documents import File, HubDataset, ReadOptions, find_files

TEXTS = ["one", "", "zwei\nZeilen\n", "三 🦜", "\x00\x1b[0m\t"]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def read(path, skip=0, **reading):
    return [text for text, _ in File(path).documents(ReadOptions(**reading), skip)]


def lines(texts, field="text"):
    return "".join(json.dumps({"id": number, field: text}) + "\n" for number, text in enumerate(texts)).encode()


def table(texts, field="text"):
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"id": list(range(len(texts))), field: texts}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(("suffix", "make"), [(".jsonl", lines), (".parquet", table)])
def test_documents_come_out_as_they_went_in(tmp_path, suffix, make, compression):
    path = tmp_path / f"texts{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](make(TEXTS)))
    assert read(path) == TEXTS
    assert read(path, skip=2) == TEXTS[2:]
    path.write_bytes(COMPRESS[compression](make(TEXTS, "body")))
    assert read(path, field="body") == TEXTS


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_file_of_plain_text_is_a_document(tmp_path, compression):
    path = tmp_path / f"a.txt{compression}"
    texts = TEXTS[:-1]  # without NULs
    path.write_bytes(COMPRESS[compression]("\n\n".join(texts).encode()))
    assert read(path) == ["\n\n".join(texts)]
    assert read(path, separator="\n\n") == "\n\n".join(texts).split("\n\n")


def test_a_separator_across_blocks_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 3)
    (tmp_path / "a.txt").write_text("first<|end|>second<|end|>")
    assert read(tmp_path / "a.txt", separator="<|end|>") == ["first", "second"]


def test_two_compressed_files_in_one_are_read_to_the_end(tmp_path):
    for suffix, compress in list(COMPRESS.items())[1:]:
        (tmp_path / f"a.txt{suffix}").write_bytes(compress(b"first ") + compress(b"second"))
        assert read(tmp_path / f"a.txt{suffix}") == ["first second"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(["one"]))
    assert read(tmp_path / "a.txt") == read(tmp_path / "a.jsonl") == ["one"]


def test_files_below_a_folder_are_found_in_order_once_and_others_are_not(tmp_path):
    for name in ("b.txt", "a.jsonl.gz", "deep/c.parquet", "image.png", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [file.path.relative_to(tmp_path).as_posix() for file in find_files([tmp_path, tmp_path / "b.txt"])]
    assert found == ["a.jsonl.gz", "b.txt", "deep/c.parquet"]


def test_a_file_that_is_named_is_taken_whatever_its_suffix(tmp_path):
    (tmp_path / "README").write_text("hello")
    [file] = find_files([tmp_path / "README"])
    assert read(file.path) == ["hello"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"good \xff bad", r"expected UTF-8 text, but byte 5 is 0xff; convert it, or use --errors replace"),
        ("a.txt", b"lone \xed\xa0\x80", r"byte 5 is 0xed"),
        ("a.jsonl", lines(["good"]) + b'{"text": "\xff"}\n', r"byte 36 is 0xff"),
        ("a.jsonl", lines(["good"]) + b"not JSON\n", r"line 2: expected a JSON object, got other text"),
        ("a.jsonl", b"[1]\n", r"line 1: expected a JSON object, got list"),
        ("a.jsonl", b'{"id": 1, "body": "x"}\n', r"line 1: no field 'text'; --field takes one of id, body"),
        ("a.jsonl", b'{"text": null}\n', r"line 1: expected text in 'text', got NoneType"),
        ("a.jsonl", b"\n\n", r"expected documents, got none"),
        ("a.parquet", table(["x"], "body"), r"no column 'text'; --field takes one of id, body"),
        ("a.parquet", table([1]), r"row 1: expected text in 'text', got int"),
        ("a.parquet", table(["x"])[:-20], r"not a readable Parquet file"),
        ("a.parquet", b"<!DOCTYPE html>", r"not a readable Parquet file"),
        ("a.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-10], r"damaged or cut off"),
        ("a.txt.gz", b"plain text", r"damaged or cut off"),
        ("a.txt.zst", b"plain text", r"damaged or cut off"),
        ("a.txt.zst", COMPRESS[".zst"](random.randbytes(100_000))[:-50_000], r"damaged or cut off"),
        (
            "a.jsonl.zst",
            COMPRESS[".zst"](b"{}") + COMPRESS[".zst"](b"{}")[:-3],
            r"damaged or cut off|expected a JSON object",
        ),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_can_be_replaced(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good \xff bad")
    assert read(tmp_path / "a.txt", errors="replace") == ["good � bad"]


def test_positions_count_from_the_beginning_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 5)
    (tmp_path / "a.txt").write_bytes(b"first--second--\xffthird")
    with pytest.raises(ValueError, match="byte 15 is 0xff"):
        read(tmp_path / "a.txt", separator="--")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_document_that_would_not_fit_into_memory_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "MAX_DOCUMENT_BYTES", 100)
    (tmp_path / name).write_bytes(b"x" * 101)
    with pytest.raises(ValueError, match=r"--separator|split it"):
        read(tmp_path / name)


def test_paths_without_text_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    for path, complaint in (("nowhere", "found nothing"), ("empty", "found none below it"), ("empty.txt", "is empty")):
        with pytest.raises(ValueError, match=complaint):
            find_files([tmp_path / path])


def test_the_bytes_that_were_read_grow_to_the_size_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS * 100))
    places = [place for _, place in File(tmp_path / "a.jsonl").documents(ReadOptions(), 0)]
    assert places == sorted(places)
    assert places[-1] == (tmp_path / "a.jsonl").stat().st_size


def test_a_dataset_of_the_library_is_streamed(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(TEXTS))
    dataset = HubDataset(str(tmp_path), None, "train")
    assert [text for text, _ in dataset.documents(ReadOptions(), 0)] == TEXTS
    assert [text for text, _ in dataset.documents(ReadOptions(), 3)] == TEXTS[3:]
    with pytest.raises(ValueError, match="no field 'body'; --field takes one of id, text"):
        list(dataset.documents(ReadOptions("body"), 0))


def test_a_dataset_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(ValueError, match="the dataset cannot be opened"):
        list(HubDataset(str(tmp_path / "nowhere"), None, "train").documents(ReadOptions(), 0))
