"""Tokenizers from a `tokenizer.json`: the ids that `tokenizers` gives, whatever else the file says; or one line."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizers_everywhere import (
    BYTES,
    TEXTS,
    content_of,
    gpt2_library,
    llama_library,
    tokenizer_of,
    trained,
    unigram_library,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from outside_in.data.tokenizer import gpt2
from outside_in.data.tokenizer_files import JSONTokenizer, byte_alphabet, from_file, from_identity, load

END = "<|endoftext|>"
SPECIAL_TEXT = (END, "</s>", "<s>", "<unk>")  # of which the library makes tokens
TRAINED = Tokenizer.from_str(trained().file.decode())
KINDS = ("gpt2", "trained", "llama", "unigram")
ORDINARY = st.text(max_size=100).filter(lambda text: not any(special in text for special in SPECIAL_TEXT))

with_a_library = pytest.mark.parametrize("kind", KINDS)


def library_of(kind):
    makers = {"gpt2": gpt2_library, "trained": lambda: TRAINED, "llama": llama_library, "unigram": unigram_library}
    return makers[kind]()


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "tokenizer.json"
        path.write_bytes(content)
        return path

    return write


def changed(library, *path, to):
    """The content of a library's tokenizer.json with another value at a path."""
    form = json.loads(library.to_str())
    *outer, last = path
    part = form
    for key in outer:
        part = part[key]
    part[last] = to
    return json.dumps(form).encode()


def with_added(library, content, *, special, **options):
    form = json.loads(library.to_str())
    added = form["added_tokens"][0] | {"content": content, "special": special, "id": library.get_vocab_size()}
    return json.dumps(form | {"added_tokens": [*form["added_tokens"], added | options]}).encode()


# As the library has it


@with_a_library
def test_ids_and_text_are_those_of_the_library(kind):
    made, library = tokenizer_of(kind), library_of(kind)
    for text in TEXTS[:-1]:
        ids = library.encode(text, add_special_tokens=False).ids
        assert made.encode(text).tolist() == ids
        assert made.decode(ids) == library.decode(ids, skip_special_tokens=False)


@with_a_library
@settings(deadline=None, derandomize=True)
@given(ORDINARY)
def test_ids_and_text_of_any_text_are_those_of_the_library(kind, text):
    made, library = tokenizer_of(kind), library_of(kind)
    ids = library.encode(text, add_special_tokens=False).ids
    assert made.encode(text).tolist() == ids
    assert made.decode(ids) == library.decode(ids, skip_special_tokens=False)


@with_a_library
def test_every_id_stands_for_the_text_that_the_library_makes_of_it(kind):
    library = library_of(kind)
    made = JSONTokenizer(content_of(library), "x")
    assert made.vocab_size == library.get_vocab_size()
    a = library.encode("a", add_special_tokens=False).ids  # before which no space is left out
    in_text = {
        i: token for i, token in enumerate(made.token_bytes) if not token.decode(errors="replace").count("\ufffd")
    }
    assert len(in_text) > 128
    for i, token in in_text.items():
        expected = library.decode([*a, i, *a], skip_special_tokens=False)
        assert made.decode([*a, i, *a]) == expected and token.decode() in expected


@pytest.mark.parametrize("kind", ["llama", "unigram"])
def test_tokens_of_bytes_stand_for_these_bytes(kind):
    made, vocab = tokenizer_of(kind), library_of(kind).get_vocab()
    assert [made.token_bytes[vocab[token]] for token in BYTES] == [bytes([byte]) for byte in range(256)]
    assert made.token_bytes[vocab["\u2581hello"]] == b" hello"


def test_the_bytes_of_gpt2s_file_are_those_of_gpt2():
    assert JSONTokenizer(content_of(gpt2_library()), "x").token_bytes == gpt2().token_bytes


def test_the_alphabet_of_bytes_is_that_of_the_library():
    alphabet = byte_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    decoder = decoders.ByteLevel()
    assert all(decoder.decode([letter]) == chr(byte) for letter, byte in alphabet.items() if byte < 128)


# What else a file may say


BEGINNING = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])


@pytest.mark.parametrize(
    "part",
    [
        {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {
                "strategy": {"Fixed": 100},
                "direction": "Left",
                "pad_to_multiple_of": 8,
                "pad_id": 7,
                "pad_type_id": 0,
                "pad_token": "!",
            }
        },
        {"post_processor": json.loads(BEGINNING.__getstate__())},
    ],
    ids=lambda part: next(iter(part)),
)
def test_what_a_file_adds_to_or_takes_from_a_text_changes_nothing(part):
    library = Tokenizer.from_str(content_of(TRAINED, **part).decode())
    made, text = from_file(content_of(library), "x"), TEXTS[2]
    assert library.encode(text).ids != trained().encode(text).tolist()
    assert made.encode(text).tolist() == trained().encode(text).tolist()
    assert made.decode(made.encode(text)) == text


def test_the_same_text_always_has_the_same_ids():
    made = from_file(changed(TRAINED, "model", "dropout", to=0.9), "x")
    assert {tuple(made.encode("Every effort moves you").tolist()) for _ in range(20)} == {
        tuple(trained().encode("Every effort moves you").tolist())
    }


@pytest.mark.parametrize("special", [True, False])
def test_the_end_of_a_text_is_ordinary_text_whether_the_file_calls_it_special_or_not(special):
    made = from_file(changed(TRAINED, "added_tokens", 0, "special", to=special), "x")
    assert made.end_of_text not in made.encode(f"a{END}b")
    assert made.decode(made.encode(f"a{END}b")) == f"a{END}b"
    assert made.end_of_text in made.encode(f"a{END}b", special=True)


def test_added_tokens_that_are_not_special_are_tokens_of_the_text():
    made = from_file(with_added(TRAINED, "effort moves", special=False), "x")
    assert 300 in made.encode("Every effort moves you")
    assert made.token_bytes[300] == b"effort moves"
    assert made.decode(made.encode("Every effort moves you")) == "Every effort moves you"


CUT = {
    "gpt2": lambda: content_of(gpt2_library()),
    "trained": lambda: trained().file,
    "added token": lambda: with_added(TRAINED, "effort moves", special=False),
    "added token that takes spaces": lambda: with_added(TRAINED, "effort", special=False, rstrip=True),
    "llama": lambda: content_of(llama_library()),
    "unigram": lambda: content_of(unigram_library()),
}


@pytest.mark.parametrize("kind", CUT)
def test_text_that_may_be_cut_before_spaces_has_the_same_tokens_when_it_is(kind):
    made = JSONTokenizer(CUT[kind](), "x")
    whole = made.encode("Every effort moves you").tolist()
    parts = [i for part in ("Every", " effort", " moves", " you") for i in made.encode(part).tolist()]
    assert not made.cuts_before_spaces or parts == whole
    assert made.cuts_before_spaces or kind not in ("gpt2", "trained")


# GPT-2's vocabulary in a file


def gpt2_changed(*path, to):
    return lambda: changed(gpt2_library(), *path, to=to)


SAME_AS_GPT2 = {
    "alone": lambda: content_of(gpt2_library()),
    "with a special token": lambda: with_added(gpt2_library(), "<|pad|>", special=True),
    "with a post-processor": gpt2_changed("post_processor", to=json.loads(processors.ByteLevel().__getstate__())),
}
OTHER_THAN_GPT2 = {
    "added token": lambda: with_added(gpt2_library(), "parrot", special=False),
    "no merges": gpt2_changed("model", "merges", to=[]),
    "fewer merges": gpt2_changed("model", "merges", to=[["\u0120", "p"]]),
    "first space": gpt2_changed("pre_tokenizer", "add_prefix_space", to=True),
    "no words": gpt2_changed("pre_tokenizer", "use_regex", to=False),
    "lower case": gpt2_changed("normalizer", to={"type": "Lowercase"}),
}


@pytest.mark.parametrize("kind", SAME_AS_GPT2)
def test_a_file_of_gpt2s_vocabulary_is_gpt2(write, kind):
    path = write(SAME_AS_GPT2[kind]())
    assert load(path) is gpt2()
    assert kind != "alone" or load(path, END) is gpt2()


@pytest.mark.parametrize("kind", OTHER_THAN_GPT2)
def test_a_file_in_which_text_has_other_ids_than_gpt2s_is_not_gpt2(kind):
    content, text = OTHER_THAN_GPT2[kind](), "A parrot\n\nmoves"
    ids = Tokenizer.from_str(content.decode()).encode(text, add_special_tokens=False).ids
    assert ids != gpt2().encode(text).tolist()
    made = from_file(content, "x")
    assert made is not gpt2()
    assert made.encode(text).tolist() == ids


# What a name means


def test_a_name_a_file_and_its_folder_are_tokenizers(write):
    path = write(trained().file)
    for spec in (path, str(path), path.parent, str(path.parent)):
        assert load(spec).identity == trained().identity
        assert load(spec).file == trained().file
    assert load("gpt2") is gpt2()
    assert load("bytes").name == "bytes" and load("bytes", END).identity == load("bytes").identity


def test_the_identity_of_a_file_is_its_content(write):
    content = content_of(TRAINED)
    assert load(write(content)).sha256 == hashlib.sha256(content).hexdigest() != trained().sha256


@pytest.mark.parametrize("end", [END, "<|end_of_text|>", "</s>", "<eos>", "[EOS]"])
def test_usual_ends_of_a_text_are_found(write, end):
    made = load(write(content_of(llama_library(end))))
    assert made.end_token == end and made.end_of_text == 2


def test_another_end_of_a_text_can_be_named(write):
    path = write(content_of(llama_library("[STOP]")))
    made = load(path, "[STOP]")
    assert (made.end_token, made.end_of_text) == ("[STOP]", 2)
    assert 2 not in made.encode("a[STOP]") and 2 in made.encode("a[STOP]", special=True)
    assert load(path, "<s>").end_of_text == 1


# Refusals


def refusal(spec, end_of_text=None):
    with pytest.raises(ValueError) as caught:
        load(spec, end_of_text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def words_library(model):
    library = Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens([END])
    return library


def byte_level(vocab):
    library = Tokenizer(models.BPE(vocab, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel()
    library.add_special_tokens([END])
    return library


def byte_level_words(kind):
    """A model of whole words on text as bytes: it has all of these, and makes none of them of other words."""
    vocab = json.loads(trained().file)["model"]["vocab"] | {"[UNK]": 300}
    form = {"type": kind, "vocab": vocab, "unk_token": "[UNK]"}
    form |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100} if kind == "WordPiece" else {}
    return content_of(TRAINED, model=form)


WORDS = {"[UNK]": 0, "a": 1, END: 2}
NO_FILE = "expected a tokenizer.json of Hugging Face's tokenizers"
NOT_EVERY_TEXT = "it cannot encode every text; use another"
WITHOUT_A_BYTE = content_of(llama_library()).replace(b'"<0x41>"', b'"<41>"')


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", NO_FILE),
        (b"[", NO_FILE),
        (b"\xff\xfe{", NO_FILE),
        (b"[" * 100_000, NO_FILE),
        (b"[]", NO_FILE),
        (b'{"model": "gpt2"}', NO_FILE),
        (json.dumps({"vocab": {"a": 0}, "merges": []}).encode(), NO_FILE),
        (content_of(words_library(models.WordPiece(WORDS, unk_token="[UNK]"))), NOT_EVERY_TEXT),
        (content_of(words_library(models.WordLevel(WORDS, unk_token="[UNK]"))), NOT_EVERY_TEXT),
        (content_of(words_library(models.BPE(WORDS, [], unk_token="[UNK]"))), NOT_EVERY_TEXT),
        (byte_level_words("WordPiece"), NOT_EVERY_TEXT),
        (byte_level_words("WordLevel"), NOT_EVERY_TEXT),
        (changed(TRAINED, "model", "end_of_word_suffix", to="</w>"), NOT_EVERY_TEXT),
        (changed(TRAINED, "pre_tokenizer", to=None), NOT_EVERY_TEXT),
        (
            content_of(byte_level({END: 0, "a": 1, "b": 2})),
            "lacks 254 of the 256 bytes, so it cannot encode every text",
        ),
        (WITHOUT_A_BYTE, "lacks 1 of the 256 bytes, so it cannot encode every text"),
        (content_of(unigram_library(unk_id=None)), NOT_EVERY_TEXT),
        (changed(TRAINED, "model", "vocab", "far", to=65_536), "at most 65,536 ids, which uint16 holds"),
        (changed(TRAINED, "model", "vocab", "far", to=2**32 - 1), "got id 4,294,967,295"),
        (content_of(llama_library("[STOP]")), "has no end-of-text token such as"),
    ],
    ids=[
        "empty",
        "not JSON",
        "not UTF-8",
        "deep",
        "a list",
        "no tokenizer",
        "old vocabulary",
        "WordPiece",
        "WordLevel",
        "characters",
        "WordPiece of bytes",
        "WordLevel of bytes",
        "suffix of words",
        "text is not made bytes",
        "few bytes",
        "no byte 0x41",
        "nothing for unknown text",
        "id 65,536",
        "largest id",
        "no end",
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_that_names_it(write, content, words):
    path = write(content)
    told = refusal(path)
    assert told.startswith(f"{path}: ") and words in told


@pytest.mark.parametrize(
    "content",
    [
        changed(TRAINED, "model", "continuing_subword_prefix", to="##"),
        content_of(TRAINED, normalizer={"type": "Precompiled", "precompiled_charsmap": ""}),
    ],
    ids=["prefix", "map of characters"],
)
def test_a_file_that_makes_the_library_panic_is_one_line_that_names_it(write, content):
    path = write(content)
    assert refusal(path).startswith(f"{path}: {NO_FILE}")


def test_an_id_of_65535_can_be_used(write):
    made = load(write(changed(TRAINED, "model", "vocab", "far", to=65_535)))
    assert made.vocab_size == 65_536 and made.token_bytes[65_535] == b"far" and made.token_bytes[65_534] == b""
    assert made.decode(made.encode("so far")) == "so far"


def test_what_is_not_there_is_one_line(tmp_path):
    assert (
        refusal(tmp_path / "x.json")
        == f"{tmp_path}/x.json: expected gpt2, bytes, or a tokenizer.json, found no such file"
    )
    assert refusal(tmp_path).startswith(f"{tmp_path}/tokenizer.json: expected gpt2, bytes, or a tokenizer.json")
    assert refusal("gpt3").startswith("gpt3: expected gpt2, bytes, or a tokenizer.json")


def test_a_file_that_is_too_large_is_not_read(write, monkeypatch):
    monkeypatch.setattr("outside_in.data.tokenizer_files.MAX_FILE_BYTES", 2**20)
    assert "expected at most 1 MiB, got a larger file" in refusal(write(b" " * (2**20 + 1)))


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_a_built_in_tokenizer_has_its_own_end_of_a_text(name):
    assert refusal(name, "</s>") == f"{name}: ends a text with {END}, not </s>"


def test_a_named_end_of_a_text_must_be_there(write):
    path = write(trained().file)
    assert refusal(path, "</s>") == f"{path}: has no token '</s>'"


# By identity


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "trained", "llama"])
def test_a_tokenizer_is_found_by_its_identity(write, tmp_path, kind):
    made = tokenizer_of(kind)
    if made.file:
        write(made.file)
    found = from_identity(made.identity, tmp_path, "source")
    assert found.identity == made.identity and found.token_bytes == made.token_bytes


@pytest.mark.parametrize("kind", ["trained", "gpt2", "bytes"])
@pytest.mark.parametrize(
    "changes", [{"name": "spm"}, {"name": None}, {"sha256": "0" * 64}, {"end_of_text": "</s>"}], ids=str
)
def test_a_tokenizer_of_another_identity_is_refused(write, tmp_path, kind, changes):
    made = tokenizer_of(kind)
    write(trained().file)
    with pytest.raises(ValueError) as caught:
        from_identity(made.identity | changes, tmp_path, "source")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_whose_file_is_another_is_refused_by_both_names(write, tmp_path):
    write(trained(299).file)
    with pytest.raises(ValueError, match=f"^{tmp_path}/tokenizer.json: expected the tokenizer of source") as caught:
        from_identity(trained().identity, tmp_path, "source")
    assert "(299 ids" in str(caught.value) and trained().sha256[:8] in str(caught.value)


def test_a_tokenizer_whose_file_is_missing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path}/tokenizer.json: .* found no such file"):
        from_identity(trained().identity, tmp_path, "source")
