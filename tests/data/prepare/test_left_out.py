"""What a preparation drops, counts and tells: empty and bad documents, separators, special text, sources."""

import gzip
import json
import lzma
import os
import subprocess
import sys
import threading
from contextlib import closing

import numpy as np
import pytest
from helpers import ROOT
from safetensors.numpy import load_file

from outside_in.data.prepare import encode
from outside_in.data.prepare.documents import FileSearch
from outside_in.data.prepare.pipeline import Options, Preparation
from outside_in.data.prepare.rows import ReadOptions
from outside_in.data.tokenizer import gpt2

pytestmark = pytest.mark.slow


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(path, documents):
    return lines(path, [{"text": text} for text in documents])


def tokens_of(folder, split="train"):
    return load_file(folder / f"{split}.safetensors")["tokens"].tolist()


def description_of(folder):
    return json.loads((folder / "data.json").read_text())


@pytest.fixture
def prepare(call_program, tmp_path):
    """Call the program: `prepare("--text", …)`; returns what it printed and the folder."""

    def call(*arguments, folder="out"):
        finished = call_program("prepare_data", tmp_path / folder, *arguments)
        return finished, tmp_path / folder

    return call


def test_empty_documents_are_dropped_and_counted(prepare, tmp_path):
    finished, out = prepare("--text", texts(tmp_path / "a.jsonl", ["A.", "", "", "B."]), "--validation", 0)
    assert finished.returncode == 0
    assert tokens_of(out) == [32, 13, 50256, 33, 13, 50256]
    assert description_of(out)["empty_dropped"] == 2
    assert description_of(out)["splits"]["train"]["documents"] == 2
    assert "empty documents dropped: 2" in finished.stdout


def test_empty_documents_between_separators_are_dropped(prepare, tmp_path):
    (tmp_path / "a.txt").write_text("A.\n\n\n\n\n\nB.\n\n")
    _, out = prepare("--text", tmp_path / "a.txt", "--validation", 0, "--separator", r"\n\n")
    assert tokens_of(out) == [32, 13, 50256, 33, 13, 50256]


def test_a_document_of_white_space_alone_is_not_empty(prepare, tmp_path):
    _, out = prepare("--text", texts(tmp_path / "a.jsonl", ["A.", " ", "\n"]), "--validation", 0)
    assert tokens_of(out) == [32, 13, 50256, 220, 50256, 198, 50256]


def test_only_empty_documents_are_no_text(prepare, tmp_path):
    finished, out = prepare("--text", texts(tmp_path / "a.jsonl", ["", ""]), "--validation", 0)
    assert finished.returncode == 2
    assert "got none (2 empty, 0 bad, 0 duplicates)" in finished.stderr
    assert not out.exists() and not list(tmp_path.glob(".preparing*"))


BAD = [{"text": "one"}, {"text": None}, {"title": "x"}, {"text": "two"}]


def test_a_bad_row_is_named_and_nothing_is_left(prepare, tmp_path):
    finished, out = prepare("--text", lines(tmp_path / "a.jsonl", BAD), "--validation", 0)
    assert finished.returncode == 2
    assert "a.jsonl: line 2: expected text in 'text', got NoneType; or leave out" in finished.stderr
    assert "--skip-bad" in finished.stderr
    assert not out.exists() and not list(tmp_path.glob(".preparing*"))


def test_bad_rows_are_skipped_and_counted(prepare, tmp_path):
    finished, out = prepare("--text", lines(tmp_path / "a.jsonl", BAD), "--validation", 0, "--skip-bad")
    assert finished.returncode == 0, finished.stderr
    assert gpt2().decode(tokens_of(out)) == "one<|endoftext|>two<|endoftext|>"
    assert description_of(out)["bad_dropped"] == 2
    assert "a.jsonl: line 2" in description_of(out)["first_bad"]
    assert "bad documents dropped: 2, the first:" in finished.stdout


def test_a_bad_row_of_a_dataset_is_named_with_its_index(prepare, tmp_path):
    (tmp_path / "data").mkdir()
    lines(tmp_path / "data/train.jsonl", [{"text": "one"}, {"text": None}, {"text": "two"}])
    finished, _ = prepare("--hub", tmp_path / "data", "--validation", 0)
    assert finished.returncode == 2 and "row 2 (index 1): expected text" in finished.stderr
    finished, out = prepare("--hub", tmp_path / "data", "--validation", 0, "--skip-bad")
    assert gpt2().decode(tokens_of(out)) == "one<|endoftext|>two<|endoftext|>"


def prepare_in_steps(out, path, *, batches, skip_bad=True, **options):
    """Read so many batches; finish if all is read. Returns whether it is complete."""
    reading, shown = ReadOptions(skip_bad=skip_bad), []
    sources = FileSearch(reading).files([path])
    with closing(
        Preparation(out, sources, Options(reading, validation=0.2, **options), overwrite=False)
    ) as preparation:
        preparation.read(2, lambda: len(shown) >= batches, lambda *_: shown.append(1))
        if preparation.progress.all_read:
            preparation.finish(lambda done: None)
        return preparation.progress.all_read


@pytest.mark.parametrize("batches", [1, 2, 5])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".jsonl.xz"])
def test_a_resumed_preparation_counts_the_same(tmp_path, monkeypatch, batches, suffix):
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 700)
    rows = [{"text": ["", None, f"text {i}", f"text {i // 9}", "<|endoftext|>"][i % 5]} for i in range(100)]
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        path.write_text("text,n\n" + "".join(f"{row['text'] or ''},1{',2' * (row['text'] is None)}\n" for row in rows))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(lzma.compress(content) if suffix.endswith("xz") else content)
    assert prepare_in_steps(tmp_path / "whole", path, batches=10**6, deduplicate=True)
    for _ in range(200):
        if prepare_in_steps(tmp_path / "steps", path, batches=batches, deduplicate=True):
            break
    whole, steps = (description_of(tmp_path / name) for name in ("whole", "steps"))
    assert whole == steps
    assert whole["empty_dropped"] == 20 and whole["bad_dropped"] == 20
    for split in ("train", "validation"):
        assert tokens_of(tmp_path / "whole", split) == tokens_of(tmp_path / "steps", split)


def test_skip_bad_resumes_what_a_bad_row_has_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 300)
    rows = [{"text": f"text {i}" if i != 30 else None} for i in range(60)]
    path = lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match="line 31"):
        prepare_in_steps(tmp_path / "out", path, batches=10**6, skip_bad=False)
    kept = json.loads((tmp_path / ".preparing-out/progress.json").read_text())
    assert kept["documents"] > 10
    assert not prepare_in_steps(tmp_path / "out", path, batches=kept["documents"] // 2)
    with pytest.raises(ValueError, match="was started with --skip-bad"):
        prepare_in_steps(tmp_path / "out", path, batches=1, skip_bad=False)
    assert prepare_in_steps(tmp_path / "out", path, batches=10**6)
    assert prepare_in_steps(tmp_path / "whole", path, batches=10**6)
    assert description_of(tmp_path / "out") == description_of(tmp_path / "whole")
    assert tokens_of(tmp_path / "out") == tokens_of(tmp_path / "whole")


# Separators


def test_a_separator_that_occurs_nowhere_is_warned_of(prepare, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"A.\r\n\r\nB.")
    finished, _ = prepare("--text", tmp_path / "a.txt", "--validation", 0, "--separator", r"\n\n")
    assert finished.returncode == 0
    assert r"WARNING --separator '\n\n' occurs nowhere" in finished.stdout
    assert r"(CRLF); use --separator '\r\n\r\n'" in finished.stdout
    (tmp_path / "a.txt").write_bytes(b"A. B.")
    finished, _ = prepare("--text", tmp_path / "a.txt", "--validation", 0, "--separator", "--overwrite", "--overwrite")
    assert finished.returncode == 2  # an option is no separator
    finished, _ = prepare("--text", tmp_path / "a.txt", "--validation", 0, "--separator", "xx", "--overwrite")
    assert "WARNING --separator 'xx' occurs nowhere in 1 file of plain text" in finished.stdout
    finished, _ = prepare(
        "--text", texts(tmp_path / "b.jsonl", ["A"]), "--validation", 0, "--separator", "xx", folder="other"
    )
    assert "WARNING --separator 'xx' has split nothing" in finished.stdout


def test_a_windows_file_among_others_is_warned_of(prepare, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_bytes(b"A.\n\nB.\n\n")
    (tmp_path / "texts/b.txt").write_bytes(b"C.\r\n\r\nD.")
    (tmp_path / "texts/c.txt").write_bytes(b"one document")
    finished, _ = prepare("--text", tmp_path / "texts", "--validation", 0, "--separator", r"\n\n")
    warnings = [line for line in finished.stdout.splitlines() if "WARNING" in line]
    assert len(warnings) == 1 and "b.txt, but" in warnings[0] and "c.txt" not in warnings[0]


def test_a_separator_that_is_there_is_not_warned_of(prepare, tmp_path):
    (tmp_path / "a.txt").write_text("one document and its end\n\n")
    finished, _ = prepare("--text", tmp_path / "a.txt", "--validation", 0, "--separator", r"\n\n")
    assert "WARNING" not in finished.stdout


@pytest.mark.parametrize("separator", [r"\u2028", "\u2028", r"\x1e", "三", r"\t", "🦜", "\\n三"])
def test_any_separator_works_as_it_is_typed(prepare, tmp_path, separator):
    meant = {r"\u2028": "\u2028", r"\x1e": "\x1e", r"\t": "\t", "\\n三": "\n三"}.get(separator, separator)
    (tmp_path / "a.txt").write_text(f"A.{meant}B.")
    _, out = prepare("--text", tmp_path / "a.txt", "--validation", 0, "--separator", separator)
    assert tokens_of(out) == [32, 13, 50256, 33, 13, 50256]


def test_no_separator_is_refused(call_program, tmp_path, capsys):
    finished = subprocess.run(
        [sys.executable, ROOT / "prepare_data.py", "out", "--text", "x", "--separator", ""],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: argument --separator: expected some text, got none")


# Special text


def test_special_text_is_noticed_unless_an_option_says_what_it_is(prepare, tmp_path):
    path = texts(tmp_path / "a.jsonl", ["one<|endoftext|>two<|endoftext|>", "three<|endoftext|>"])
    finished, out = prepare("--text", path, "--validation", 0)
    assert "notice: '<|endoftext|>' is in the text 3 times" in finished.stdout
    assert "--special-tokens" in finished.stdout
    assert tokens_of(out).count(50256) == 2
    for option, count in (("--special-tokens", 5), ("--no-special-tokens", 2)):
        finished, out = prepare("--text", path, "--validation", 0, option, folder=option.strip("-"))
        assert "notice:" not in finished.stdout
        assert tokens_of(out).count(50256) == count


# Validation text of its own


def test_validation_text_is_all_of_validation(prepare, tmp_path):
    train, held_out = [f"train {i}" for i in range(40)], ["held out 1", "held out 2"]
    paths = texts(tmp_path / "a.jsonl", train), texts(tmp_path / "b.jsonl", held_out)
    finished, out = prepare("--text", paths[0], "--validation-text", paths[1])
    assert finished.returncode == 0, finished.stderr
    assert gpt2().decode(tokens_of(out)) == "".join(f"{text}<|endoftext|>" for text in train)
    assert gpt2().decode(tokens_of(out, "validation")) == "".join(f"{text}<|endoftext|>" for text in held_out)
    assert [source["split"] for source in description_of(out)["sources"]] == ["validation", "train"]


def test_a_limit_leaves_validation_text_whole(prepare, tmp_path):
    train, held_out = ["one two three"] * 50, ["held out"] * 30
    paths = texts(tmp_path / "a.jsonl", train), texts(tmp_path / "b.jsonl", held_out)
    _, out = prepare("--text", paths[0], "--validation-text", paths[1], "--limit-tokens", 9)
    assert len(tokens_of(out)) == 12 and tokens_of(out, "validation").count(50256) == 30


def test_a_copy_of_a_validation_document_is_dropped_from_training(prepare, tmp_path):
    paths = texts(tmp_path / "a.jsonl", ["one", "two"]), texts(tmp_path / "b.jsonl", ["two"])
    _, out = prepare("--text", paths[0], "--validation-text", paths[1], "--deduplicate")
    assert gpt2().decode(tokens_of(out)) == "one<|endoftext|>"
    assert gpt2().decode(tokens_of(out, "validation")) == "two<|endoftext|>"


def test_a_split_of_a_dataset_is_for_validation(prepare, tmp_path):
    (tmp_path / "data").mkdir()
    texts(tmp_path / "data/train.jsonl", ["one", "two"])
    texts(tmp_path / "data/validation.jsonl", ["three"])
    finished, out = prepare("--hub", tmp_path / "data", "--validation-split", "validation")
    assert finished.returncode == 0, finished.stderr
    assert gpt2().decode(tokens_of(out)) == "one<|endoftext|>two<|endoftext|>"
    assert gpt2().decode(tokens_of(out, "validation")) == "three<|endoftext|>"


@pytest.mark.parametrize(
    "options",
    [
        ("--text", "a", "--validation-split", "validation"),
        ("--text", "a", "--validation", "1%", "--validation-text", "b"),
        ("--text", "a", "--validation-text", "nowhere"),
        ("--text", "a", "--validation-text", "empty"),
        ("--text", "a", "--validation-text", "a"),
    ],
    ids=str,
)
def test_validation_options_without_sense_are_refused(tmp_path, options):
    (tmp_path / "a").write_text("text")
    (tmp_path / "empty").touch()
    command = [sys.executable, ROOT / "prepare_data.py", "out", *options]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]


# Pipes, many sources, hidden folders


def program(*arguments, **options):
    command = [sys.executable, ROOT / "prepare_data.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=120, **options)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_text_comes_from_standard_input(tmp_path, compress):
    content = b'{"text": "one"}\n{"text": "two"}\n'
    finished = program(tmp_path / "out", "--text", "-", "--validation", 0, input=compress(content))
    assert finished.returncode == 0, finished.stderr
    assert gpt2().decode(tokens_of(tmp_path / "out")) == "one<|endoftext|>two<|endoftext|>"
    [source] = description_of(tmp_path / "out")["sources"]
    assert source["name"] == "standard input" and source["sha256"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_text_comes_from_a_pipe_with_a_name(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("from a pipe"))
    writer.start()
    finished = program(tmp_path / "out", "--text", tmp_path / "pipe", "--validation", 0)
    writer.join()
    assert finished.returncode == 0, finished.stderr
    assert gpt2().decode(tokens_of(tmp_path / "out")) == "from a pipe<|endoftext|>"


def test_of_many_sources_the_summary_fits_on_the_screen(prepare, tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(300):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "texts/page.html").write_text("<p>")
    finished, out = prepare("--text", tmp_path / "texts")
    printed = finished.stdout.splitlines()
    assert len(printed) < 20 and len(description_of(out)["sources"]) == 300
    assert any(line.startswith("sources: 300, ") and line.endswith(" listed in data.json") for line in printed)
    assert "left out: 1 .html" in printed and description_of(out)["left_out"] == {".html": 1}
    assert printed[-1].endswith("in a run's train.json")


def test_hidden_folders_are_named(prepare, tmp_path, monkeypatch, call_program):
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 300)
    path = lines(tmp_path / "a.jsonl", [{"text": f"text {i}" if i != 30 else None} for i in range(60)])
    finished, _ = prepare("--text", path, "--validation", 0)
    assert finished.returncode == 2
    hidden = tmp_path / ".preparing-out"
    assert f"kept in {hidden}; the same command resumes, or remove that folder" in finished.stdout
    finished, _ = prepare("--text", texts(tmp_path / "b.jsonl", ["one"]), "--validation", 0, folder="other")
    assert f"{hidden}: left by another preparation" in finished.stdout
    assert hidden.exists()


def test_files_with_the_same_content_are_warned_of(prepare, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "texts" / name).write_text("the same")
    finished, out = prepare("--text", tmp_path / "texts", "--validation", 0)
    assert "WARNING 1 file with the content of another: " in finished.stdout
    np.testing.assert_array_equal(tokens_of(out), tokens_of(out)[:3] * 2)
