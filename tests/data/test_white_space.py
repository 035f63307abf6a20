"""White space of any length and kind has the tokens that Hugging Face's `tokenizers` gives it."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from outside_in.data import tokenizer
from outside_in.data.prepare import encode
from outside_in.data.tokenizer import cut_in_white_space, gpt2, vocabulary_files

WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
WHITE_SPACE += "\u2028\u2029\u202f\u205f\u3000"  # all of Unicode's
OTHERS = ["a", "word", "'s", "12", "!", "é", "三", "\x1c", "\x1f", "\u180e", "\u200b", "\x00", "<|endoftext|>"]


@pytest.fixture(scope="module")
def reference():
    library = Tokenizer(models.BPE.from_file(*map(str, vocabulary_files())))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return lambda text: library.encode(text).ids


def test_more_than_a_million_spaces_between_two_words():
    assert len(gpt2().encode("Start." + " " * 1_300_000 + "End.")) == 1_300_003


@pytest.mark.parametrize("run", [" ", "\n", " \n\t", WHITE_SPACE, "\u3000"], ids=ascii)
@pytest.mark.parametrize("form", ["a{}b", "{}!", "x{}", "a{0}b{0}c"])
def test_a_run_that_tiktoken_gives_up_on_has_the_tokens_of_the_reference(reference, run, form):
    text = form.format((run * 1_000_100)[:1_000_100])
    assert gpt2().encode(text).tolist() == reference(text)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(st.text(WHITE_SPACE, max_size=20), st.sampled_from([" ", "\n", "  ", *OTHERS])), max_size=12))
def test_a_cut_in_white_space_changes_no_token(reference, parts):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        short = re.compile(tokenizer.LONG_WHITE_SPACE.pattern.replace("1000,", "2,"))
        patch.setattr(tokenizer, "LONG_WHITE_SPACE", short)
        pieces = cut_in_white_space(text)
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in gpt2().encode(piece).tolist()] == reference(text)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text(WHITE_SPACE, max_size=20), st.sampled_from([" ", "\n", "  ", *OTHERS])), max_size=30))
def test_the_pieces_of_a_long_document_have_its_tokens(reference, parts):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "PIECE_CHARACTERS", 7)
        pieces = encode.cut(text)
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in gpt2().encode(piece).tolist()] == reference(text)
