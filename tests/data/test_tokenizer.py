"""Tokenizers: known ids, lossless round trips, streams, bytes; and of GPT-2's only the genuine vocabulary."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizers_everywhere import KINDS, TEXTS, streamed, tokenizer_of, trained

from outside_in.data import tokenizer
from outside_in.data.tokenizer import assumed, check_same, gpt2

SPACE = "\u2581"  # in SentencePiece's form a space, so it does not come back
ANY_TEXT = st.text(max_size=200).map(lambda text: text.replace(SPACE, "_"))
SURROGATES = st.text(st.sampled_from(["\ud800", "\ud83d", "\udc00", "\ude00", "a", " ", "é", "\ufeff"]), max_size=12)
KNOWN = [
    ("gpt2", "", []),
    ("gpt2", "Hello world", [15496, 995]),
    ("gpt2", "Every effort moves you", [6109, 3626, 6100, 345]),
    ("gpt2", "Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
    ("gpt2", "!", [0]),
    ("gpt2", "\n\n", [628]),
    ("gpt2", " don't", [836, 470]),
    ("bytes", "", []),
    ("bytes", "Aé\0", [65, 195, 169, 0]),
    ("bytes", "🦜", [240, 159, 166, 156]),
]

of_every_kind = pytest.mark.parametrize("kind", KINDS)
of_every_kind_and_unigram = pytest.mark.parametrize("kind", [*KINDS, "unigram"])


@pytest.mark.parametrize(("kind", "text", "ids"), KNOWN)
def test_text_has_known_ids(kind, text, ids):
    found = tokenizer_of(kind).encode(text)
    assert found.dtype == np.uint16 and found.tolist() == ids
    assert tokenizer_of(kind).decode(ids) == text


@of_every_kind
def test_text_of_many_scripts_comes_back_from_its_ids(kind):
    made = tokenizer_of(kind)
    for text in TEXTS:
        ids = made.encode(text)
        assert ids.dtype == np.uint16
        assert made.decode(ids) == made.decode(ids.tolist()) == streamed(made, ids.tolist()) == text


@of_every_kind
@settings(deadline=None, derandomize=True)
@given(ANY_TEXT)
def test_any_text_comes_back_from_its_ids(kind, text):
    made = tokenizer_of(kind)
    ids = made.encode(text).tolist()
    assert made.decode(ids) == streamed(made, ids) == text
    assert all(0 <= i < made.vocab_size and i != made.end_of_text for i in ids)


def replaced(text):
    """What UTF-8 can hold of a text: pairs of surrogates are one character."""
    joined = re.sub(
        "[\ud800-\udbff][\udc00-\udfff]", lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text
    )
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", joined)


@of_every_kind_and_unigram
@settings(deadline=None, derandomize=True)
@given(SURROGATES)
def test_half_of_a_surrogate_pair_becomes_the_replacement_character(kind, text):
    made = tokenizer_of(kind)
    assert made.encode(text).tolist() == made.encode(replaced(text)).tolist()


@of_every_kind
def test_a_character_of_several_tokens_appears_with_its_last_one(kind):
    made, text = tokenizer_of(kind), "🦜👩‍👩‍👧‍👦三"
    ids = made.encode(text).tolist()
    parts = list(made.decode_stream([[i] for i in ids]))
    assert "" in parts[:-1]  # where a character has only begun
    assert "".join(parts).strip() == text


@of_every_kind
def test_a_character_that_a_stream_leaves_incomplete_becomes_the_replacement_character(kind):
    made = tokenizer_of(kind)
    ids = made.encode("a🦜").tolist()[:-1]
    assert streamed(made, ids) == made.decode(ids) == "a\N{REPLACEMENT CHARACTER}"


@of_every_kind
def test_a_stream_leaves_out_the_end_and_what_follows_it(kind):
    made = tokenizer_of(kind)
    a, b = made.encode("a").tolist(), made.encode("b").tolist()
    parts = [a, [*a, made.end_of_text, *b]]
    assert "".join(made.decode_stream(parts, made.end_of_text)).replace(" ", "") == "aa"
    assert made.end_token in "".join(made.decode_stream(parts))


@of_every_kind_and_unigram
def test_the_end_of_a_text_is_ordinary_text_unless_it_is_asked_for(kind):
    made = tokenizer_of(kind)
    for text in (made.end_token, f"one{made.end_token}two", f"{made.end_token} {made.end_token}"):
        assert made.end_of_text not in made.encode(text)
        found = made.decode(made.encode(text))
        assert found == text or (kind == "unigram" and found.replace(" ", "") == text.replace(" ", ""))


@of_every_kind_and_unigram
def test_the_end_of_a_text_is_its_token_if_it_is_asked_for(kind):
    made = tokenizer_of(kind)
    end, one, two = made.end_of_text, made.encode("one").tolist(), made.encode("two").tolist()
    text = f"one{made.end_token}{made.end_token}two"
    assert made.encode(text, special=True).tolist() == [*one, end, end, *two]
    assert made.encode(made.end_token, special=True).tolist() == [end]
    assert made.encode("one", special=True).tolist() == one
    assert made.decode([end]) == made.end_token


@of_every_kind
def test_counted_bytes_are_those_of_the_text_as_utf8(kind):
    made = tokenizer_of(kind)
    for text in TEXTS:
        ids = made.encode(text)
        assert made.count_bytes(ids) == len(text.encode())
        assert made.count_bytes(np.append(ids, made.end_of_text)) == len(text.encode())


@of_every_kind
def test_ids_that_a_tokenizer_lacks_become_the_replacement_character(kind):
    made = tokenizer_of(kind)
    beyond = [*made.encode("a").tolist(), made.vocab_size, 65_535, *made.encode("b").tolist()]
    assert made.decode(beyond).replace(" ", "") == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize(
    ("kind", "vocab_size", "end"), [("gpt2", 50_257, 50_256), ("bytes", 257, 256), ("trained", 300, 0)]
)
def test_the_end_of_a_text_is_one_of_the_ids(kind, vocab_size, end):
    made = tokenizer_of(kind)
    assert (made.vocab_size, made.end_of_text, made.end_token) == (vocab_size, end, "<|endoftext|>")


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "trained"])
def test_every_id_stands_for_bytes_of_its_own(kind):
    made = tokenizer_of(kind)
    assert len(set(made.token_bytes)) == made.vocab_size
    assert all(made.decode_bytes([i]) == token for i, token in enumerate(made.token_bytes))
    assert {token for token in made.token_bytes if len(token) == 1} == {bytes([byte]) for byte in range(256)}


def test_tokenizers_are_told_apart_by_name_content_and_end():
    identities = [tokenizer_of(kind).identity for kind in (*KINDS, "unigram")] + [trained(299).identity]
    assert len({tuple(identity.values()) for identity in identities}) == len(identities)
    assert all(identity.keys() == {"name", "sha256", "end_of_text"} for identity in identities)
    assert tokenizer_of("gpt2").identity["sha256"] == tokenizer.VOCAB_BPE_SHA256


def test_a_model_and_data_of_two_tokenizers_do_not_fit():
    check_same(trained(), tokenizer_of("trained"), "model", "data")
    check_same(None, trained(), "model", "data")
    check_same(trained(), None, "model", "data")
    with pytest.raises(ValueError, match=r"^model: was trained with the tokenizer tokenizer.json \(300 ids") as caught:
        check_same(trained(), trained(299), "model", "data")
    assert "data has tokens of tokenizer.json (299 ids" in str(caught.value)


@pytest.mark.parametrize(
    ("vocab_size", "expected"), [(257, None), (50_256, None), (50_257, gpt2), (50_304, gpt2), (51_281, None)]
)
def test_a_vocabulary_of_gpt2s_size_is_taken_for_gpt2s(vocab_size, expected):
    assert assumed(vocab_size) is (expected and expected())


@pytest.mark.parametrize("constant", ["VOCAB_BPE_SHA256", "ENCODER_JSON_SHA256"])
def test_a_vocabulary_with_another_checksum_is_refused(constant, monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizer, constant, "0" * 64)
    tokenizer.gpt2_encoding.cache_clear()
    with pytest.raises(ValueError, match="0" * 64) as caught:
        tokenizer.gpt2_encoding()
    assert "\n" not in str(caught.value)
