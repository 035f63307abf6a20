"""From documents to token files: nothing is lost, changed or in both splits, wherever it is interrupted."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import closing, suppress

import numpy as np
import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from outside_in.data.prepare import encode as batches
from outside_in.data.prepare import pipeline
from outside_in.data.prepare.documents import HubDataset, ReadOptions, find_files
from outside_in.data.prepare.encode import cut
from outside_in.data.prepare.pipeline import Options, Preparation
from outside_in.data.prepare.seen import SeenDocuments
from outside_in.data.token_files import HEADER_BYTES, TokenWriter
from outside_in.data.tokenizer import GPT2_VOCAB_SIZE, gpt2, gpt2_encoding

pytestmark = pytest.mark.slow

END = gpt2().end_of_text
SCRIPTS = [
    "Every effort moves you",
    "Всякое усилие движет тебя",
    "每一份努力都会推动你",
    "あらゆる努力があなたを動かす",
    "모든 노력이 당신을 움직인다",
    "كل جهد يحركك",
    "כל מאמץ מזיז אותך",
    "हर प्रयास आपको आगे बढ़ाता है",
    "প্রতিটি প্রচেষ্টা",
    "ஒவ்வொரு முயற்சியும்",
    "ప్రతి ప్రయత్నం",
    "ทุกความพยายาม",
    "ყოველი ძალისხმევა",
    "Յուրաքանչյուր ջանք",
    "Κάθε προσπάθεια",
    "እያንዳንዱ ጥረት",
    "ការខិតខំប្រឹងប្រែង",
    "ကြိုးစားမှုတိုင်း",
    "སྦྱོར་བ་རེ་རེ",
    "ᏂᎦᎥ ᎠᏟᏂᎬᏁᎯ",
]
STRANGE = [
    "🦜👩‍👩‍👧‍👦🏳️‍🌈",
    "\x00\x01\x7f\x1b[31m",
    " \t\n\r\u2028\ufeff",
    "<|endoftext|>",
    "a" * 3000,
    "\n" * 500,
    "  two  spaces  ",
]
TEXTS = SCRIPTS + STRANGE


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepare(out, *paths, workers=2, stop_after=None, overwrite=False, **options):
    """Prepare a folder, or stop after so many batches; return the preparation."""
    options.setdefault("reading", ReadOptions())
    with closing(Preparation(out, find_files(list(paths)), Options(**options), overwrite=overwrite)) as preparation:
        shown = []
        preparation.read(
            workers, lambda: stop_after is not None and len(shown) >= stop_after, lambda *_: shown.append(1)
        )
        if preparation.progress.all_read:
            preparation.finish(lambda done: None)
        return preparation


def tokens_of(folder, split="train"):
    return load_file(folder / f"{split}.safetensors")["tokens"]


def documents_of(folder, split="train"):
    tokens = tokens_of(folder, split)
    assert tokens[-1] == END
    return [gpt2_encoding().decode(part.tolist()) for part in np.split(tokens, np.flatnonzero(tokens == END) + 1)[:-1]]


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 300)


def test_decoded_tokens_are_the_documents(tmp_path):
    prepare(tmp_path / "out", write_lines(tmp_path / "a.jsonl", TEXTS), validation=0)
    assert documents_of(tmp_path / "out") == [text + "<|endoftext|>" for text in TEXTS]
    assert tokens_of(tmp_path / "out").dtype == np.uint16
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data.json", "train.safetensors"]


def test_half_of_a_surrogate_pair_becomes_the_replacement_character(tmp_path):
    prepare(tmp_path / "out", write_lines(tmp_path / "a.jsonl", ["a\ud83d b"]), validation=0)
    assert documents_of(tmp_path / "out") == ["a\ufffd b<|endoftext|>"]


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_survives_its_encoding(text):
    assert gpt2_encoding().decode(gpt2().encode(text).tolist()) == text


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(["a", "word", " ", "  ", "\n", "1", "12", "'s", "!", "é", "三", " \t", "\u00a0"]), max_size=60
    )
)
def test_a_long_document_is_cut_where_its_tokens_do_not_change(parts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "PIECE_CHARACTERS", 7)
        pieces = cut("".join(parts))
    assert "".join(pieces) == "".join(parts)
    tokens = gpt2().encode("".join(parts)).tolist()
    assert [token for piece in pieces for token in gpt2().encode(piece).tolist()] == tokens


def test_a_document_of_ten_million_characters_is_one_document(tmp_path):
    text = "Every effort moves you, said 1234 parrots.\n" * 250_000
    prepare(tmp_path / "out", write_lines(tmp_path / "a.jsonl", ["before", text, "after"]), validation=0)
    tokens = tokens_of(tmp_path / "out")
    assert (tokens == END).sum() == 3
    assert gpt2_encoding().decode(tokens.tolist()) == f"before<|endoftext|>{text}<|endoftext|>after<|endoftext|>"


def test_special_text_is_the_token_only_if_asked(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["one<|endoftext|>two"])
    prepare(tmp_path / "text", path, validation=0)
    prepare(tmp_path / "token", path, validation=0, special_tokens=True)
    assert (tokens_of(tmp_path / "text") == END).sum() == 1
    assert (tokens_of(tmp_path / "token") == END).sum() == 2


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"deduplicate": True}], ids=str)
def test_one_worker_and_eight_make_the_same(tmp_path, small_batches, options):
    path = write_lines(tmp_path / "a.jsonl", [f"{text} {number}" for number in range(30) for text in TEXTS])
    for workers in (1, 8):
        prepare(tmp_path / str(workers), path, workers=workers, validation=0.2, **options)
    for split in ("train", "validation"):
        np.testing.assert_array_equal(tokens_of(tmp_path / "1", split), tokens_of(tmp_path / "8", split))


@pytest.mark.parametrize("options", [{}, {"shuffle": True, "deduplicate": True, "limit_tokens": 3000}], ids=str)
def test_an_interruption_at_any_place_changes_nothing(tmp_path, small_batches, options):
    texts = [f"{text} {number}" for number in range(2) for text in TEXTS]
    paths = [
        write_lines(tmp_path / "a.jsonl", texts + texts[:9]),
        write_lines(tmp_path / "b.jsonl", [*texts[5:], "end"]),
    ]
    prepare(tmp_path / "whole", *paths, validation=0.2, **options)
    for stop_after in range(0, 40, 3):
        out = tmp_path / f"stopped-{stop_after}"
        for _ in range(100):
            if prepare(out, *paths, validation=0.2, stop_after=stop_after or 1, **options).progress.all_read:
                break
        for split in ("train", "validation"):
            np.testing.assert_array_equal(tokens_of(out, split), tokens_of(tmp_path / "whole", split))
        old, new = (json.loads((folder / "data.json").read_text()) for folder in (tmp_path / "whole", out))
        assert old == new


@pytest.mark.parametrize("function", ["rename", "unlink", "fsync"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_failure_at_any_moment_of_finishing_changes_nothing(tmp_path, monkeypatch, function, shuffle):
    path = write_lines(tmp_path / "a.jsonl", [f"{text} {number}" for number in range(4) for text in TEXTS])
    options = {"validation": 0.2, "shuffle": shuffle, "deduplicate": True}
    prepare(tmp_path / "whole", path, **options)
    original = getattr(os, function)
    for fatal in range(1, 40):
        calls = []

        def fail(*arguments, calls=calls, fatal=fatal, **keywords):
            calls.append(1)
            if len(calls) == fatal:
                raise KeyboardInterrupt
            return original(*arguments, **keywords)

        out = tmp_path / f"out-{fatal}"
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            with suppress(KeyboardInterrupt):
                prepare(out, path, **options)
        if len(calls) < fatal:
            break
        if not out.exists():
            prepare(out, path, **options)
        for split in ("train", "validation"):
            np.testing.assert_array_equal(tokens_of(out, split), tokens_of(tmp_path / "whole", split))
    assert fatal < 39


def test_no_document_is_in_both_splits_not_even_twice(tmp_path):
    texts = [f"document {number % 300}" for number in range(600)]
    prepare(tmp_path / "out", write_lines(tmp_path / "a.jsonl", texts), validation=0.3)
    train, validation = (documents_of(tmp_path / "out", split) for split in ("train", "validation"))
    assert len(train) + len(validation) == 600
    assert not set(train) & set(validation)
    assert 100 < len(validation) < 260


def test_what_is_for_validation_depends_on_the_text_and_the_seed_alone(tmp_path):
    texts = [f"document {number}" for number in range(300)]
    for name, order, seed in (("a", texts, 1), ("b", texts[::-1], 1), ("c", texts, 2)):
        prepare(tmp_path / name, write_lines(tmp_path / f"{name}.jsonl", order), validation=0.3, seed=seed)
    a, b, c = (set(documents_of(tmp_path / name, "validation")) for name in "abc")
    assert a == b != c


def test_duplicates_are_dropped_and_counted(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["one", "two", "one", "three", "two"])
    prepare(tmp_path / "out", path, validation=0, deduplicate=True)
    assert documents_of(tmp_path / "out") == [f"{text}<|endoftext|>" for text in ("one", "two", "three")]
    assert json.loads((tmp_path / "out/data.json").read_text())["duplicates_dropped"] == 2


def test_shuffling_keeps_every_document_and_changes_their_order(tmp_path):
    texts = [f"document {number}" for number in range(200)]
    for shuffle in (False, True):
        prepare(tmp_path / str(shuffle), write_lines(tmp_path / "a.jsonl", texts), validation=0, shuffle=shuffle)
    plain, shuffled = documents_of(tmp_path / "False"), documents_of(tmp_path / "True")
    assert plain != shuffled
    assert sorted(plain) == sorted(shuffled)


@pytest.mark.parametrize("limit", [1, 10, 57])
def test_a_limit_stops_after_the_document_that_reaches_it(tmp_path, limit):
    texts = ["one two three"] * 50
    prepare(tmp_path / "out", write_lines(tmp_path / "a.jsonl", texts), validation=0, limit_tokens=limit)
    per_document = len(gpt2().encode(texts[0])) + 1
    assert len(tokens_of(tmp_path / "out")) == -(-limit // per_document) * per_document


def test_the_description_counts_what_came_from_where(tmp_path):
    paths = [write_lines(tmp_path / "a.jsonl", ["one two"] * 3), write_lines(tmp_path / "b.jsonl", ["three"])]
    prepare(tmp_path / "out", *paths, validation=0)
    description = json.loads((tmp_path / "out/data.json").read_text())
    a, b = description["sources"]
    assert (a["documents"], b["documents"]) == (3, 1)
    assert a["tokens"] + b["tokens"] == description["splits"]["train"]["tokens"] == len(tokens_of(tmp_path / "out"))
    assert a["share"] + b["share"] == pytest.approx(1)
    assert a["size_bytes"] == paths[0].stat().st_size
    assert len(a["sha256"]) == 64
    assert a["sha256"] != b["sha256"]
    assert description["splits"]["train"]["documents"] == 4
    assert description["splits"]["train"]["longest_document"] == 2


def test_a_header_written_last_is_read_by_the_library(tmp_path):
    for count in (0, 1, 1000):
        writer = TokenWriter(tmp_path / f"{count}.safetensors")
        writer.append(np.arange(count, dtype=np.uint16) % GPT2_VOCAB_SIZE)
        writer.finish()
        np.testing.assert_array_equal(load_file(tmp_path / f"{count}.safetensors")["tokens"], np.arange(count))


# Refusals


def refusal(*arguments, **keywords):
    with pytest.raises(ValueError) as caught:
        prepare(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_is_there_is_not_touched_unless_asked(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["new"])
    (tmp_path / "out").mkdir()
    assert "already exists; use --overwrite" in refusal(tmp_path / "out", path)
    prepare(tmp_path / "out", path, validation=0, overwrite=True)
    assert documents_of(tmp_path / "out") == ["new<|endoftext|>"]


@pytest.mark.parametrize("what", ["file", "link", "other things", "a source"])
def test_only_a_folder_of_token_files_is_ever_replaced(tmp_path, what):
    path = write_lines(tmp_path / "a.jsonl", ["new"])
    out = tmp_path / "out"
    (tmp_path / "else").mkdir()
    (tmp_path / "else/notes.txt").write_text("dear")
    if what == "file":
        out.write_text("dear")
    elif what == "link":
        out.symlink_to(tmp_path / "else")
    else:
        (tmp_path / "else").rename(out)
    sources = [out] if what == "a source" else [path]
    assert "use another name" in refusal(out, *sources, validation=0, overwrite=True)
    assert (out if what == "file" else out / "notes.txt").read_text() == "dear"


def test_digests_without_a_note_are_not_those_of_another_start(tmp_path, monkeypatch):
    texts = [f"document {number}" for number in range(50)]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_write_json", lambda *arguments: 1 / 0)  # killed before the first note
        with pytest.raises(ZeroDivisionError):
            prepare(tmp_path / "out", write_lines(tmp_path / "a.jsonl", texts), validation=0, deduplicate=True)
    prepare(tmp_path / "out", write_lines(tmp_path / "b.jsonl", texts[::-1]), validation=0, deduplicate=True)
    assert documents_of(tmp_path / "out") == [f"{text}<|endoftext|>" for text in texts[::-1]]


@pytest.mark.parametrize("damage", ["tokens", "note", "form"])
def test_what_cannot_be_gone_on_with_is_begun_anew_if_asked(tmp_path, small_batches, damage):
    path = write_lines(tmp_path / "a.jsonl", TEXTS * 5)
    prepare(tmp_path / "out", path, stop_after=3, validation=0)
    folder = tmp_path / ".preparing-out"
    if damage == "tokens":
        (folder / "train.tokens").write_bytes(b"short")
    elif damage == "note":
        (folder / "progress.json").write_text("{")
    else:
        (folder / "progress.json").write_text('{"unknown": 1}')
    refusal(tmp_path / "out", path, validation=0)
    prepare(tmp_path / "out", path, validation=0, overwrite=True)
    assert documents_of(tmp_path / "out") == [text + "<|endoftext|>" for text in TEXTS * 5]


def test_a_full_disk_below_the_digests_is_a_full_disk(tmp_path):
    seen = SeenDocuments(tmp_path / "seen.sqlite")
    seen._database.execute("PRAGMA max_page_count = 2")
    with closing(seen), pytest.raises(OSError, match="No space left"):
        for number in range(10_000):
            seen.add(number.to_bytes(16, "little"), number)


def test_thousands_of_files_can_be_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr("outside_in.storage.strict_json.MAX_BYTES", 1000)
    (tmp_path / "texts").mkdir()
    for number in range(300):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text {number}")
    prepare(tmp_path / "out", tmp_path / "texts", stop_after=100, validation=0)
    prepare(tmp_path / "out", tmp_path / "texts", validation=0)
    assert len(documents_of(tmp_path / "out")) == 300


def test_a_hub_dataset_keeps_the_revision_that_was_begun_with(tmp_path, monkeypatch):
    newest = iter("ab")
    monkeypatch.setattr(HubDataset, "newest_revision", lambda self: next(newest))
    source = HubDataset("owner/name", None, "train")
    for _ in range(2):
        with closing(Preparation(tmp_path / "out", [source], Options(ReadOptions()), overwrite=False)) as preparation:
            assert preparation.sources[0].revision == "a"
            preparation.save_progress()


def test_other_options_do_not_go_on_with_what_was_begun(tmp_path, small_batches):
    path = write_lines(tmp_path / "a.jsonl", TEXTS * 5)
    prepare(tmp_path / "out", path, stop_after=2, validation=0.1, deduplicate=True)
    assert "started with other options (validation)" in refusal(
        tmp_path / "out", path, validation=0.2, deduplicate=True
    )
    write_lines(path, ["changed"])
    assert "sources (or they have changed since)" in refusal(tmp_path / "out", path, validation=0.1, deduplicate=True)
    prepare(tmp_path / "out", path, validation=0, deduplicate=True, overwrite=True)
    assert documents_of(tmp_path / "out") == ["changed<|endoftext|>"]


def test_a_second_process_is_kept_out(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["text"])
    held = Preparation(tmp_path / "out", find_files([path]), Options(ReadOptions()), overwrite=False)
    assert "is being prepared by another process" in refusal(tmp_path / "out", path)
    held.close()


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", ["text"] * 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: os.statvfs_result([0] * 11) and type("", (), {"free": 10}))
    assert "expected about 0.00 GiB of free disk space, got 0.00 GiB" in refusal(tmp_path / "out", path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_documents_too_few_for_two_splits_are_told(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["one"])
    assert "none of 1 document is in validation" in refusal(tmp_path / "out", path)
    prepare(tmp_path / "out", path, validation=0)
    assert documents_of(tmp_path / "out") == ["one<|endoftext|>"]


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_end_of_a_single_document_is_held_out(tmp_path, logged, shuffle):
    text = " ".join(map(str, range(1000)))
    prepare(tmp_path / "out", write_lines(tmp_path / "a.jsonl", [text]), validation=0.1, shuffle=shuffle)
    train, validation = tokens_of(tmp_path / "out"), tokens_of(tmp_path / "out", "validation")
    assert np.concatenate([train, validation]).tolist() == [*gpt2().encode(text), END]
    assert len(validation) == round(0.1 * (len(train) + len(validation)))
    held_out = (
        f"one document, whose end is for validation: {len(validation)} tokens of {len(train) + len(validation):,}"
    )
    assert held_out in logged


@pytest.mark.parametrize(("documents", "share", "held_out"), [(17, 0.1, True), (17, 0.03, True), (17, 0.029, False)])
def test_of_few_documents_one_is_held_out_if_the_share_rounds_to_one(
    tmp_path, monkeypatch, logged, documents, share, held_out
):
    monkeypatch.setattr(pipeline, "split_of", lambda digest, options: "train")  # by chance
    texts = [f"document {i}" for i in range(documents)]
    path = write_lines(tmp_path / "a.jsonl", texts)
    if not held_out:
        assert f"none of {documents} documents is in validation" in refusal(tmp_path / "out", path, validation=share)
        return
    prepare(tmp_path / "out", path, validation=share)
    assert documents_of(tmp_path / "out") == [f"{text}<|endoftext|>" for text in texts[:-1]]
    assert documents_of(tmp_path / "out", "validation") == [f"{texts[-1]}<|endoftext|>"]
    assert any(line.startswith("few documents, of which the last is for validation") for line in logged)


@pytest.mark.parametrize(("place", "call"), [("save_progress", 2), ("_describe", 1)])  # save_progress: 1 after reading
def test_a_kill_while_the_end_is_held_out_loses_nothing(tmp_path, monkeypatch, place, call):
    text = " ".join(map(str, range(1000)))
    path, real, calls = write_lines(tmp_path / "a.jsonl", [text]), getattr(Preparation, place), []

    def killed(self, *arguments):
        calls.append(place)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Preparation, place, killed)
        prepare(tmp_path / "out", path, validation=0.1)
    prepare(tmp_path / "out", path, validation=0.1)
    tokens = [*tokens_of(tmp_path / "out"), *tokens_of(tmp_path / "out", "validation")]
    assert tokens == [*gpt2().encode(text), END]


# The program


def program(*arguments, **keywords):
    command = [sys.executable, ROOT / "prepare_data.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **keywords)


def test_the_program_makes_data_that_it_describes_and_a_run_can_read(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [f"{text} {number}" for number in range(9) for text in TEXTS])
    made = program(tmp_path / "out", "--text", path, "--validation", "10%")
    assert made.returncode == 0, made.stderr
    described = program("--describe", tmp_path / "out")
    assert described.returncode == 0, described.stderr
    assert "WARNING" not in described.stdout
    for line in ("train", "validation", "leakage", "a.jsonl"):
        assert line in made.stdout
        assert line in described.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "expected a folder to write"),
        (["out"], "expected a folder to write"),
        (["out", "--text", "nowhere"], "nowhere: expected a file or folder of text, found nothing"),
        (["out", "--text", "x", "--validation", "100%"], "argument --validation"),
        (["out", "--text", "x", "--limit-tokens", "0"], "argument --limit-tokens"),
        (["out", "--text", "x", "--seed", "-1"], "argument --seed"),
        (["out", "--describe", "x"], "--describe: expected without another folder, --text and --hub"),
        (["--describe", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(tmp_path, arguments, complaint):
    result = program(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert complaint in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_ctrl_c_and_the_same_command_make_the_same(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [f"{text} {number}" * 20 for number in range(2000) for text in SCRIPTS])
    command = [sys.executable, ROOT / "prepare_data.py", str(tmp_path / "out"), "--text", str(path), "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    growing = tmp_path / ".preparing-out" / "train.tokens"
    while process.poll() is None and not (growing.exists() and growing.stat().st_size > HEADER_BYTES):
        time.sleep(0.01)
    process.terminate()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "the same command resumes" in output
    assert not (tmp_path / "out").exists()
    again = program(tmp_path / "out", "--text", path)
    assert again.returncode == 0, again.stderr
    assert "resuming after" in again.stdout
    whole = program(tmp_path / "whole", "--text", path)
    assert whole.returncode == 0
    for split in ("train", "validation"):
        np.testing.assert_array_equal(tokens_of(tmp_path / "out", split), tokens_of(tmp_path / "whole", split))
