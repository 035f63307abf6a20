"""A tokenizer trained on text: as many ids as asked for, the bytes among them, and the same each time."""

import hashlib

import pytest
from test_tokenizers_everywhere import PROSE, TEXTS

from outside_in.data.tokenizer_files import from_file, load
from outside_in.data.train_tokenizer import check_vocab_size, train_tokenizer


@pytest.mark.parametrize("vocab_size", [257, 300, 1000])
def test_it_has_as_many_ids_as_asked_for(vocab_size):
    made = train_tokenizer(PROSE, vocab_size)
    assert made.vocab_size == len(set(made.token_bytes)) == vocab_size
    assert (made.name, made.end_of_text, made.end_token) == ("tokenizer.json", 0, "<|endoftext|>")
    assert made.sha256 == hashlib.sha256(made.file).hexdigest()


def test_more_ids_make_fewer_tokens():
    counts = [len(train_tokenizer(PROSE, vocab_size).encode(PROSE[0])) for vocab_size in (257, 300, 1000)]
    assert counts[0] == len(PROSE[0].encode()) > counts[1] > counts[2]


def test_frequent_words_become_tokens_without_crossing_a_space():
    made = train_tokenizer(["to be or not to be, that is the question " * 20], 281)
    assert {b" question", b" that", b"to"} <= set(made.token_bytes)
    assert all(b" " not in token[1:] for token in made.token_bytes)


def test_the_same_texts_make_the_same_file_however_they_come():
    files = {train_tokenizer(texts, 400).file for texts in (PROSE, iter(PROSE), tuple(PROSE))}
    assert len(files) == 1
    assert train_tokenizer(PROSE[:-1], 400).file not in files


def test_its_file_is_itself(tmp_path):
    made = train_tokenizer(PROSE, 300)
    (tmp_path / "tokenizer.json").write_bytes(made.file)
    for again in (load(tmp_path), from_file(made.file, "x")):
        assert (again.identity, again.file, again.token_bytes) == (made.identity, made.file, made.token_bytes)
        assert all(again.encode(text).tolist() == made.encode(text).tolist() for text in TEXTS)


def test_a_text_that_utf8_cannot_hold_is_trained_on_as_it_is_encoded():
    with_half, whole = (train_tokenizer([f"word{character} " * 50], 262) for character in ("\ud83d", "\ufffd"))
    assert with_half.file == whole.file
    assert [with_half.token_bytes[i] for i in with_half.encode("word\ud83d")] == [b"word", "\ufffd".encode()]


@pytest.mark.parametrize("vocab_size", [-1, 0, 2, 256, 65_537, 10**9])
def test_a_number_of_ids_that_cannot_be_is_refused(vocab_size):
    for refused in (check_vocab_size, lambda count: train_tokenizer(PROSE, count)):
        with pytest.raises(ValueError, match=f"{vocab_size:,} ids: expected from 257 .* to 65,536") as caught:
            refused(vocab_size)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("vocab_size", [257, 65_536])
def test_the_smallest_and_the_largest_number_of_ids_can_be(vocab_size):
    check_vocab_size(vocab_size)


@pytest.mark.parametrize(("texts", "found"), [([], 257), (["abc"], 259), (["ab ab"], 259)])
def test_more_ids_than_the_text_supports_are_refused(texts, found):
    with pytest.raises(ValueError, match=f"of 300 ids: the training text supports {found}; ask for fewer ids"):
        train_tokenizer(texts, 300)
    assert train_tokenizer(texts, found).vocab_size == found


@pytest.mark.parametrize("error", [InterruptedError("stop"), ValueError("a.txt: not UTF-8")], ids=repr)
def test_an_error_of_the_texts_ends_the_training(error):
    def texts():
        yield PROSE[0]
        raise error

    with pytest.raises(type(error), match=str(error)):
        train_tokenizer(texts(), 300)
