"""`--tokenizer`: of every kind, resumable; a trained one has seen training documents only; refusals leave nothing."""

import contextlib
import hashlib
import itertools
import json

import numpy as np
import pytest
from helpers import complaint, run_program
from safetensors.numpy import load_file
from test_tokenizers_everywhere import (
    PROSE,
    content_of,
    gpt2_library,
    llama_library,
    prepare,
    spec_of,
    trained,
    write_lines,
)

from outside_in.data.prepare import encode
from outside_in.data.prepare.chosen_tokenizer import training_texts
from outside_in.data.prepare.documents import ReadOptions, find_files
from outside_in.data.prepare.encode import digest_of
from outside_in.data.prepare.pipeline import Options
from outside_in.data.prepare.split import split_of
from outside_in.data.tokenizer_files import folder_tokenizer, load

KINDS = ("gpt2", "bytes", "trained", "llama")
TEXTS = [*PROSE, "Всякое усилие", "🦜 三\0", "<|endoftext|></s>", "  two  spaces  "]
COMMON = "the quick brown fox jumps over the lazy dog and runs away from "
RARE = "zebrafish "
END = "<|endoftext|>"

of_every_kind = pytest.mark.parametrize("kind", KINDS)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tokens_of(folder, split="train"):
    return load_file(folder / f"{split}.safetensors")["tokens"]


def documents_of(folder, split="train"):
    """The texts of the documents, each ended by a token."""
    made, tokens = folder_tokenizer(folder), tokens_of(folder, split)
    assert tokens[-1] == made.end_of_text
    parts = np.split(tokens, np.flatnonzero(tokens == made.end_of_text) + 1)[:-1]
    return [made.decode(part[:-1]) for part in parts]


def refusal(*arguments, **keywords):
    with pytest.raises(ValueError) as caught:
        prepare(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is in the folder


@of_every_kind
def test_decoded_tokens_are_the_documents(tmp_path, kind):
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    out = prepare(tmp_path / "out", path, tokenizer=spec_of(kind, tmp_path), validation=0.2)
    found = [documents_of(out, split) for split in ("train", "validation")]
    assert sorted(itertools.chain(*found)) == sorted(TEXTS) and len(found[1]) > 3


@of_every_kind
def test_the_folder_says_which_tokenizer_it_is(tmp_path, kind):
    path, spec = write_lines(tmp_path / "a.jsonl", TEXTS), spec_of(kind, tmp_path)
    out = prepare(tmp_path / "out", path, tokenizer=spec, validation=0.2)
    made, description = folder_tokenizer(out), json.loads((out / "data.json").read_text())
    assert description["options"]["tokenizer"] == spec
    assert description["tokenizer"] == {"gpt2": "gpt2", "bytes": "bytes"}.get(kind, "tokenizer.json") == made.name
    assert description["tokenizer_sha256"] == made.sha256
    assert description["end_of_text"] == made.end_token == ("</s>" if kind == "llama" else END)
    content = files_of(out)
    assert content.keys() - {"tokenizer.json"} == {"data.json", "train.safetensors", "validation.safetensors"}
    assert ("tokenizer.json" in content) == (kind in ("trained", "llama"))
    if "tokenizer.json" in content:
        assert hashlib.sha256(content["tokenizer.json"]).hexdigest() == made.sha256
    for split in ("train", "validation"):
        documents, counted = documents_of(out, split), description["splits"][split]
        assert counted["documents"] == len(documents)
        assert counted["bytes"] == sum(len(text.encode()) for text in documents)


def test_a_tokenizer_file_is_copied_as_it_is(tmp_path):
    content = b" \n" + content_of(llama_library(), padding=None) + b"\n"
    for name in ("tokenizer.json", "other.json"):
        (tmp_path / name).write_bytes(content)
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    for number, spec in enumerate([tmp_path, tmp_path / "tokenizer.json", tmp_path / "other.json"]):
        out = prepare(tmp_path / f"out-{number}", path, tokenizer=str(spec), validation=0)
        assert (out / "tokenizer.json").read_bytes() == content


def test_a_file_of_gpt2s_vocabulary_is_not_copied(tmp_path):
    (tmp_path / "hub.json").write_bytes(content_of(gpt2_library()))
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    out = prepare(tmp_path / "out", path, tokenizer=str(tmp_path / "hub.json"), validation=0)
    plain = prepare(tmp_path / "plain", path, validation=0)
    assert files_of(out).keys() == {"data.json", "train.safetensors"}
    assert json.loads((out / "data.json").read_text())["tokenizer"] == "gpt2"
    np.testing.assert_array_equal(tokens_of(out), tokens_of(plain))


@of_every_kind
def test_the_end_of_a_text_in_a_text_is_its_token_only_if_asked(tmp_path, kind):
    spec, end = spec_of(kind, tmp_path), "</s>" if kind == "llama" else END
    path = write_lines(tmp_path / "a.jsonl", [*PROSE, f"one{end}two{end}"])
    counts = []
    for special in (False, True):
        out = prepare(tmp_path / str(special), path, tokenizer=spec, validation=0, special_tokens=special)
        counts.append(int((tokens_of(out) == folder_tokenizer(out).end_of_text).sum()))
        assert documents_of(out)[len(PROSE) :] == (["one", "two", ""] if special else [f"one{end}two{end}"])
    assert counts == [len(PROSE) + 1, len(PROSE) + 3]


@of_every_kind
def test_shuffling_keeps_every_document_whole(tmp_path, kind):
    path, spec = write_lines(tmp_path / "a.jsonl", TEXTS), spec_of(kind, tmp_path)
    plain, shuffled = (
        documents_of(prepare(tmp_path / str(shuffle), path, tokenizer=spec, validation=0, shuffle=shuffle))
        for shuffle in (False, True)
    )
    assert plain == TEXTS and shuffled != plain and sorted(shuffled) == sorted(plain)


@pytest.mark.parametrize("kind", ["trained", "llama"])
def test_a_long_document_has_the_tokens_of_its_text(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 50)
    text = "hello  hello 三 " * 40
    path = write_lines(tmp_path / "a.jsonl", [text, *PROSE])
    out = prepare(tmp_path / "out", path, tokenizer=spec_of(kind, tmp_path), validation=0)
    made = folder_tokenizer(out)
    expected = [*made.encode(text).tolist(), made.end_of_text]
    assert tokens_of(out)[: len(expected)].tolist() == expected


# What a trained one has seen


def documents_in(split, text, count, options):
    """Documents that are the text and a number, and fall into a split."""
    texts = (f"{text}{number}" for number in itertools.count())
    return list(itertools.islice((each for each in texts if split_of(digest_of(each), options) == split), count))


def seed_for(texts, validation):
    """A seed with which all of the texts are for training."""
    return next(
        seed
        for seed in itertools.count()
        for options in [Options(reading=ReadOptions(), validation=validation, seed=seed)]
        if all(split_of(digest_of(text), options) == "train" for text in texts)
    )


def has_token_of(folder, word):
    return any(word.strip().encode() in token for token in load(folder).token_bytes)


@pytest.fixture
def trained_on(tmp_path):
    """Prepare texts with a tokenizer trained on them: `trained_on(texts, validation=…)`; returns the folder."""
    numbers = itertools.count()

    def make(texts, ids=285, **options):
        number = next(numbers)
        path = write_lines(tmp_path / f"{number}.jsonl", texts)
        out = prepare(tmp_path / f"out-{number}", path, tokenizer=f"train:{ids}", **options)
        options = Options(reading=ReadOptions(), tokenizer=f"train:{ids}", **options)
        seen = "".join(training_texts(find_files([path]), options, lambda: False))
        return out, seen

    return make


def held_out(folder):
    """The text of the validation tokens."""
    return folder_tokenizer(folder).decode(tokens_of(folder, "validation"))


def test_words_of_validation_documents_have_no_tokens(trained_on):
    options = Options(reading=ReadOptions(), validation=0.3)
    texts = documents_in("train", COMMON * 4, 20, options) + documents_in("validation", RARE * 100, 20, options)
    out, _ = trained_on(texts, validation=0.3)
    assert RARE in held_out(out)
    assert has_token_of(out, "the") and not has_token_of(out, RARE)
    out, _ = trained_on(texts, validation=0)
    assert has_token_of(out, RARE)


def test_words_of_the_end_of_a_single_document_have_no_tokens(trained_on):
    text = COMMON * 40 + RARE * 200
    out, _ = trained_on([text], validation=0.48, seed=seed_for([text], 0.48))
    assert held_out(out).count(RARE) >= 200
    assert has_token_of(out, "the") and not has_token_of(out, RARE)
    out, _ = trained_on([text], validation=0)
    assert has_token_of(out, RARE)


def test_words_of_the_last_of_a_few_documents_have_no_tokens(trained_on):
    texts = [COMMON * 10 + "1", COMMON * 10 + "2", RARE * 100]
    out, _ = trained_on(texts, validation=0.3, seed=seed_for(texts, 0.3))
    assert documents_of(out, "validation") == texts[-1:]
    assert has_token_of(out, "the") and not has_token_of(out, RARE)
    out, _ = trained_on([*texts[::-1]], validation=0.3, seed=seed_for(texts, 0.3))
    assert has_token_of(out, RARE)


def test_nothing_is_held_out_of_documents_of_which_the_share_is_less_than_one(trained_on):
    texts = [COMMON * 10 + "1", RARE * 100]
    with pytest.raises(ValueError, match="none of 2 documents is in validation"):
        trained_on(texts, validation=0.1, seed=seed_for(texts, 0.1))
    out, seen = trained_on(texts, validation=0)
    assert seen == "".join(texts) and has_token_of(out, RARE)


FEW = {  # texts of which a limit leaves so many, and what of these is held out
    "end of one": ([COMMON * 8 + RARE * 100, *(f"{COMMON * 8}{number}" for number in range(5))], 0.6, 200),
    "last": ([COMMON * 8, COMMON * 9, RARE * 100, *(f"{COMMON * 8}{number}" for number in range(9))], 0.2, 900),
}


@pytest.mark.parametrize("case", FEW)
def test_words_of_what_is_held_out_of_few_documents_up_to_a_limit_have_no_tokens(trained_on, case):
    texts, validation, limit = FEW[case]
    with contextlib.suppress(ValueError):  # to refuse it is right too: the limit is in tokens of what is to be trained
        out, _ = trained_on(texts, ids=270, validation=validation, limit_tokens=limit, seed=seed_for(texts, validation))
        assert RARE in held_out(out) and not has_token_of(out, RARE)


def test_words_of_the_end_of_the_only_document_without_duplicates_have_no_tokens(trained_on):
    text = COMMON * 40 + RARE * 200
    out, _ = trained_on([text] * 3, validation=0.48, seed=seed_for([text], 0.48), deduplicate=True)
    assert held_out(out).count(RARE) >= 200 and not has_token_of(out, RARE)


SINGLE = {
    "at the end of a token": (COMMON * 17, 0.37, {}),
    "inside a token": (COMMON * 20, 0.1, {}),
    "of many scripts": ("усилие 三 🦜 движет тебя, " * 40, 0.13, {}),
    "with ends of texts": (COMMON * 10 + END.join([COMMON] * 10), 0.4, {"special_tokens": True}),
    "with ends that are text": (COMMON * 10 + END.join([COMMON] * 10), 0.4, {}),
    "with halves of surrogate pairs": (COMMON * 10 + "\ud83d" * 60 + COMMON * 10, 0.4, {}),
}


@pytest.mark.parametrize("case", SINGLE)
def test_the_validation_of_one_document_starts_where_the_text_trained_on_ends(trained_on, case):
    text, validation, options = SINGLE[case]
    out, seen = trained_on([text], ids=270, validation=validation, seed=seed_for([text], validation), **options)
    made = folder_tokenizer(out)
    train, rest = (made.decode_bytes(tokens_of(out, split)) for split in ("train", "validation"))
    whole = train + rest.removesuffix(END.encode())
    assert whole.decode() == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if "special_tokens" in options:  # which are no text
        whole, train = (part.replace(END.encode(), b"") for part in (whole, train))
    seen = seen.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    assert whole.startswith(seen) and len(seen) == pytest.approx(len(whole) * (1 - validation), abs=30)
    ends = np.cumsum(made.bytes_per_id[made.encode(text, special="special_tokens" in options)])
    assert len(train) in (ends[ends <= len(seen)].max(), ends[ends >= len(seen)].min())


def test_the_words_between_the_ends_of_texts_are_all_that_is_trained_on(trained_on):
    out, _ = trained_on([END.join([COMMON] * 50)], ids=300, validation=0, special_tokens=True)
    assert has_token_of(out, "the")
    assert not any(part in token for token in load(out).token_bytes[1:] for part in (b"end", b"text", b"<|"))


def test_a_limit_of_tokens_bounds_the_text_that_is_trained_on(trained_on):
    texts = [f"{COMMON}{number}" for number in range(500)]
    _, seen = trained_on(texts, ids=260, validation=0, limit_tokens=100)
    assert 0 < len(seen) < 1500


# Interruptions


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 4000)


@of_every_kind
def test_an_interruption_at_any_place_changes_nothing(tmp_path, small_batches, kind):
    path, spec = write_lines(tmp_path / "a.jsonl", TEXTS), spec_of(kind, tmp_path)
    options = {"tokenizer": spec, "validation": 0.2, "shuffle": True}
    whole = files_of(prepare(tmp_path / "whole", path, **options))
    for stop_after in (0, 1, 3, 7):
        out = tmp_path / f"stopped-{stop_after}"
        stops = 0
        prepare(out, path, stop_after=stop_after, **options)
        while not out.exists() and stops < 50:
            stops += 1
            prepare(out, path, stop_after=max(1, stop_after), **options)
        assert stops and files_of(out) == whole


def test_a_tokenizer_is_trained_once(tmp_path, small_batches, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    prepare(tmp_path / "out", path, tokenizer="train:300", validation=0.2, stop_after=2)
    monkeypatch.setattr("outside_in.data.prepare.pipeline.trained_tokenizer", None)
    prepare(tmp_path / "out", path, tokenizer="train:300", validation=0.2)
    assert folder_tokenizer(tmp_path / "out").vocab_size == 300


@pytest.mark.parametrize("first", ["gpt2", "bytes", "train:300", "train:301"])
@pytest.mark.parametrize("then", ["gpt2", "bytes", "train:300"])
def test_another_tokenizer_is_refused_when_it_resumes(tmp_path, small_batches, first, then):
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    prepare(tmp_path / "out", path, tokenizer=first, validation=0.2, stop_after=2)
    if first == then:
        prepare(tmp_path / "out", path, tokenizer=then, validation=0.2)
    else:
        told = refusal(tmp_path / "out", path, tokenizer=then, validation=0.2)
        assert "was started with other options (tokenizer); type the same command again" in told
        prepare(tmp_path / "out", path, tokenizer=then, validation=0.2, overwrite=True)
    fresh = prepare(tmp_path / "fresh", path, tokenizer=then, validation=0.2)
    assert files_of(tmp_path / "out") == files_of(fresh)


def test_another_file_of_the_same_name_is_refused_when_it_resumes(tmp_path, small_batches):
    path, spec = write_lines(tmp_path / "a.jsonl", TEXTS), tmp_path / "my.json"
    spec.write_bytes(trained(300).file)
    prepare(tmp_path / "out", path, tokenizer=str(spec), validation=0.2, stop_after=2)
    spec.write_bytes(trained(299).file)
    told = refusal(tmp_path / "out", path, tokenizer=str(spec), validation=0.2)
    assert "was started with other" in told and "tokenizer" in told.partition("was started with other")[2]


# Refusals


@pytest.fixture
def text(tmp_path):
    """Text beside an empty folder, in which nothing shall be left."""
    (tmp_path / "data").mkdir()
    return write_lines(tmp_path / "a.jsonl", TEXTS)


REFUSED = {
    "not JSON": (b"[", (), "expected a tokenizer.json of Hugging Face's tokenizers"),
    "few bytes": (
        content_of(llama_library()).replace(b'"<0x41>"', b'"<41>"'),
        (),
        "lacks 1 of the 256 bytes, so it cannot encode every text; use another",
    ),
    "no end": (content_of(llama_library("[STOP]")), (), "has no end-of-text token such as <|endoftext|> or </s>"),
    "other end": (content_of(llama_library()), ("--end-of-text", "[STOP]"), "has no token '[STOP]'"),
    "missing": (None, (), "expected gpt2, bytes, or a tokenizer.json, found no such file"),
}
NUMBERS = {
    "train:256": "a tokenizer of 256 ids: expected from 257 (the bytes and the end of a text) to 65,536",
    "train:65537": "a tokenizer of 65,537 ids: expected from 257",
    "train:": "--tokenizer train:: expected train:N, N being a number of ids such as 4096",
    "train:many": "--tokenizer train:many: expected train:N",
    "train:-300": "--tokenizer train:-300: expected train:N",
    "train:1e3": "--tokenizer train:1e3: expected train:N",
    "train:65536": "a tokenizer of 65,536 ids: the training text supports",
    "gpt4": "gpt4: expected gpt2, bytes, or a tokenizer.json, found no such file",
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_used_is_one_line_and_leaves_nothing(tmp_path, text, case):
    content, options, words = REFUSED[case]
    path = tmp_path / "my.json"
    if content is not None:
        path.write_bytes(content)
    finished = run_program("prepare_data.py", tmp_path / "data/out", "--text", text, "--tokenizer", path, *options)
    assert f"{path}: " in complaint(finished) and words in complaint(finished)
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("spec", NUMBERS)
def test_a_number_of_ids_that_cannot_be_is_one_line_and_leaves_nothing(call_program, tmp_path, text, spec):
    finished = call_program("prepare_data", tmp_path / "data/out", "--text", text, "--tokenizer", spec)
    assert NUMBERS[spec] in complaint(finished)
    assert not list((tmp_path / "data").iterdir())


def test_text_that_cannot_be_read_is_one_line_and_leaves_nothing_when_a_tokenizer_is_trained(call_program, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "a.txt").write_bytes(b"a\xff")
    finished = call_program(
        "prepare_data", tmp_path / "data/out", "--text", tmp_path / "a.txt", "--tokenizer", "train:300"
    )
    assert f"{tmp_path}/a.txt: expected UTF-8 text" in complaint(finished)
    assert not list((tmp_path / "data").iterdir())


def test_a_named_end_of_a_text_is_used(call_program, tmp_path, text):
    (tmp_path / "my.json").write_bytes(content_of(llama_library("[STOP]")))
    arguments = ("--tokenizer", tmp_path / "my.json", "--end-of-text", "[STOP]", "--validation", "20%")
    finished = call_program("prepare_data", tmp_path / "data/out", "--text", text, *arguments)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "data/out/data.json").read_text())["end_of_text"] == "[STOP]"
    assert folder_tokenizer(tmp_path / "data/out").end_token == "[STOP]"
    assert (tokens_of(tmp_path / "data/out", "validation") == 2).sum() > 3


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "train:300"])
def test_an_end_of_a_text_that_a_tokenizer_does_not_have_is_refused(tmp_path, text, kind):
    assert "</s>" in refusal(tmp_path / "data/out", text, tokenizer=kind, end_of_text="</s>", validation=0.2)
    assert not list((tmp_path / "data").iterdir())


def test_the_program_trains_a_tokenizer(tmp_path, text):
    arguments = ("--tokenizer", "train:300", "--validation", "20%")
    finished = run_program("prepare_data.py", tmp_path / "data/out", "--text", text, *arguments)
    assert finished.returncode == 0, finished.stderr
    made = load(tmp_path / "data/out")
    assert f"tokenizer tokenizer.json (sha256 {made.sha256}), seed 42" in finished.stdout
    described = run_program("prepare_data.py", "--describe", tmp_path / "data/out")
    assert described.returncode == 0 and "WARNING" not in described.stdout
    assert set(described.stdout.splitlines()[:2]) <= set(finished.stdout.splitlines())
