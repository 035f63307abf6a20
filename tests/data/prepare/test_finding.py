"""Every file below a folder is read once, or counted as left out."""

import gzip
import json

import pytest

from outside_in.data.prepare.documents import FileSearch
from outside_in.data.prepare.rows import ReadOptions


def search(tmp_path, *paths, **options):
    """The names that are found, relative to the folder, and what is left out."""
    found = FileSearch(ReadOptions())
    files = found.files(paths or [tmp_path], **options)
    return [file.path.relative_to(tmp_path).as_posix() for file in files], dict(found.left_out)


def write(path, content="some text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_folders_and_files_behind_links_are_read(tmp_path):
    write(tmp_path / "src/a.txt")
    write(tmp_path / "real/deep/b.txt")
    (tmp_path / "src/linked").symlink_to(tmp_path / "real")
    (tmp_path / "src/c.txt").symlink_to(write(tmp_path / "elsewhere"))
    names, left_out = search(tmp_path, tmp_path / "src")
    assert names == ["src/a.txt", "src/c.txt", "src/linked/deep/b.txt"]
    assert left_out == {}


def test_links_in_a_circle_end(tmp_path):
    write(tmp_path / "deep/a.txt")
    (tmp_path / "deep/up").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "nowhere.txt").symlink_to("gone")
    assert search(tmp_path) == (["deep/a.txt"], {"folders met again": 1, "links that lead nowhere": 2})


def test_what_is_no_text_is_counted_by_suffix(tmp_path):
    for name in ("a.txt", "b.json", "c.csv", "d.bz2", "e.html", "f.HTML", "README", "g.tar.gz", "h.pdf.gz"):
        write(tmp_path / name)
    names, left_out = search(tmp_path)
    assert names == ["a.txt"]
    assert left_out == {".json": 1, ".csv": 1, ".bz2": 1, ".html": 2, "no suffix": 1, ".tar.gz": 1, ".pdf.gz": 1}


def test_json_and_csv_with_the_field_are_read(tmp_path):
    write(tmp_path / "a.json", '[{"text": "one"}]')
    write(tmp_path / "b.json.gz", gzip.compress(b'{"text": null}\n{"text": "two"}\n'))
    write(tmp_path / "package.json", '{"name": "x"}')
    write(tmp_path / "c.csv", "text\nthree\n")
    write(tmp_path / "numbers.csv", "1,2\n3,4\n")
    assert search(tmp_path) == (["a.json", "b.json.gz", "c.csv"], {".json": 1, ".csv": 1})


def test_hidden_files_and_folders_are_left_out_and_counted(tmp_path):
    for name in ("a.txt", "._book.txt", ".ipynb_checkpoints/a.txt", ".venv/lib/b.txt", ".venv/lib/c.txt"):
        write(tmp_path / name)
    assert search(tmp_path) == (["a.txt"], {"hidden files": 4})
    assert search(tmp_path / ".venv")[0] == ["lib/b.txt", "lib/c.txt"]  # it is named itself


@pytest.mark.parametrize("again", ["link", "hard link", "spelling", "folder", "linked folder"])
def test_a_file_is_read_once_whatever_it_is_called(tmp_path, again):
    path = write(tmp_path / "texts/a.txt")
    paths = [tmp_path / "texts"]
    if again == "link":
        (tmp_path / "texts/b.txt").symlink_to(path)
    elif again == "hard link":
        (tmp_path / "texts/b.txt").hardlink_to(path)
    elif again == "linked folder":
        (tmp_path / "also").symlink_to("texts")
        paths.append(tmp_path / "also")
    else:
        paths.append(tmp_path / "texts/../texts" / ("a.txt" if again == "spelling" else ""))
    names, left_out = search(tmp_path, *paths)
    assert names == ["texts/a.txt"] and sum(left_out.values()) == 1


def test_a_compressed_copy_is_left_out_and_another_text_is_not(tmp_path, logged):
    write(tmp_path / "a.jsonl", '{"text": "one"}\n')
    write(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "one"}\n'))
    assert search(tmp_path) == (["a.jsonl"], {"copies, compressed otherwise": 1})
    assert not logged
    write(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "other"}\n'))
    assert search(tmp_path) == (["a.jsonl", "a.jsonl.gz"], {})
    assert "name only one if they are the same text" in logged[0]


def test_an_empty_file_in_a_folder_is_counted(tmp_path):
    write(tmp_path / "a.txt")
    write(tmp_path / "b.txt", "")
    assert search(tmp_path) == (["a.txt"], {"empty files": 1})


def test_a_folder_without_text_says_what_is_in_it(tmp_path):
    write(tmp_path / "a.html")
    with pytest.raises(ValueError, match=r"found none below it \(left out: 1 .html\)"):
        search(tmp_path)


def test_files_called_test_or_valid_are_noticed(tmp_path, logged):
    for name in ("train.txt", "latest.txt", "wiki.valid.txt", "sub/test_00.txt"):
        write(tmp_path / name)
    search(tmp_path)
    assert len(logged) == 1 and logged[0].startswith(f"WARNING {tmp_path}/sub/test_00.txt, {tmp_path}/wiki.valid.txt: ")
    search(tmp_path, tmp_path / "wiki.valid.txt")  # meant so
    assert len(logged) == 1


def test_validation_text_below_the_training_folder_is_for_validation_alone(tmp_path, logged):
    for name in ("train.txt", "valid.txt"):
        write(tmp_path / name)
    found = FileSearch(ReadOptions())
    [validation] = found.files([tmp_path / "valid.txt"], for_validation=True)
    [train] = found.files([tmp_path])
    assert (train.path.name, validation.path.name) == ("train.txt", "valid.txt")
    assert dict(found.left_out) == {"files that are for validation": 1}
    assert not logged


def test_what_a_name_does_not_tell_is_told(tmp_path, logged):
    paths = [write(tmp_path / "a.txt", gzip.compress(b"text")), write(tmp_path / "b.txt", json.dumps({"text": "x"}))]
    found = FileSearch(ReadOptions())
    found.look_into(found.files(paths))
    assert logged == [f"read as what it holds, not as its name says: 2 files: {paths[0]} (gzip), {paths[1]} (JSON)"]


def test_a_folder_at_a_url_is_searched_too(tmp_path):
    for name in ("a.txt", ".b.txt", "deep/c.txt.gz", "d.html"):
        write(tmp_path / name, gzip.compress(b"text") if name.endswith(".gz") else "text")
    found = FileSearch(ReadOptions())
    files = found.files([f"local://{tmp_path}"])
    assert [file.name.rpartition("/")[2] for file in files] == ["a.txt", "c.txt.gz"]
    assert dict(found.left_out) == {"hidden files": 1, ".html": 1}
