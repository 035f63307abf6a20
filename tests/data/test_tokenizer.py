"""GPT-2's encoding: known ids, lossless round trips, and only the genuine vocabulary."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outside_in.data import tokenizer


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("Hello world", [15496, 995]),
        ("Every effort moves you", [6109, 3626, 6100, 345]),
        ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
        ("!", [0]),
        ("\n\n", [628]),
        (" don't", [836, 470]),
    ],
)
def test_text_has_the_ids_that_gpt2_gives_it(text, ids):
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=200))
def test_any_text_comes_back_from_its_ids(text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token_id < tokenizer.END_OF_TEXT for token_id in ids)


@pytest.mark.parametrize("text", ["<|endoftext|>", "one<|endoftext|>two"])
def test_a_special_token_in_text_is_ordinary_text(text):
    assert tokenizer.END_OF_TEXT not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_end_of_text_is_the_last_id():
    assert tokenizer.VOCAB_SIZE == tokenizer.gpt2_encoding().n_vocab == 50_257
    assert tokenizer.decode([tokenizer.END_OF_TEXT]) == "<|endoftext|>"
    assert tokenizer.END_OF_TEXT == tokenizer.VOCAB_SIZE - 1


def test_every_id_stands_for_bytes_of_its_own():
    encoding = tokenizer.gpt2_encoding()
    assert len({encoding.decode_single_token_bytes(i) for i in range(tokenizer.VOCAB_SIZE)}) == tokenizer.VOCAB_SIZE


def test_half_a_character_is_decoded_to_a_replacement():
    first, *_ = tokenizer.encode("\N{GRINNING FACE}")
    assert "\N{REPLACEMENT CHARACTER}" in tokenizer.decode([first])


@pytest.mark.parametrize("constant", ["VOCAB_BPE_SHA256", "ENCODER_JSON_SHA256"])
def test_a_vocabulary_with_another_checksum_is_refused(constant, monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizer, constant, "0" * 64)
    tokenizer.gpt2_encoding.cache_clear()
    with pytest.raises(ValueError, match="0" * 64) as caught:
        tokenizer.gpt2_encoding()
    assert "\n" not in str(caught.value)
