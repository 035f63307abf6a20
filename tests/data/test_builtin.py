"""The token sets that need no download."""

import platform

import numpy as np
import pytest

from outside_in.data import builtin
from outside_in.data.builtin import find_builtin
from outside_in.data.token_files import entropy
from outside_in.data.tokenizer import GPT2_VOCAB_SIZE, gpt2

END = gpt2().end_of_text


@pytest.fixture(scope="module")
def every_token():
    splits, tokenizer = find_builtin("builtin/every-token").make()
    assert tokenizer is gpt2()
    return splits


@pytest.fixture(scope="module")
def python_docs():  # takes about 15 seconds
    splits, tokenizer = find_builtin("builtin/python-docs").make()
    assert tokenizer is gpt2()
    return splits


def documents(tokens):
    """The documents that end-of-text tokens part, as tuples of ids."""
    return [tuple(part[:-1]) for part in np.split(tokens, np.flatnonzero(tokens == END) + 1)[:-1]]


@pytest.mark.parametrize("make", ["every_token", "python_docs"])
def test_the_splits_are_flat_uint16_and_within_the_vocabulary(make, request):
    splits = request.getfixturevalue(make)
    assert sorted(splits) == ["train", "validation"]
    for tokens in splits.values():
        assert (tokens.dtype, tokens.ndim) == (np.uint16, 1)
        assert tokens.max() < GPT2_VOCAB_SIZE


def test_every_token_is_whole_permutations_no_two_alike(every_token):
    permutations = np.concatenate([every_token["train"], every_token["validation"]]).reshape(-1, GPT2_VOCAB_SIZE)
    assert len(permutations) == 20 + 1
    assert (np.sort(permutations) == np.arange(GPT2_VOCAB_SIZE)).all()
    assert len(np.unique(permutations[:, :10], axis=0)) == len(permutations)


def test_every_token_is_the_same_each_time(every_token):
    again = builtin.every_token()
    assert all((again[split] == every_token[split]).all() for split in every_token)


def test_every_document_ends_with_the_end_of_text_and_has_a_text(python_docs):
    for tokens in python_docs.values():
        assert tokens[-1] == END
        assert tokens[0] != END
    lengths = [len(document) for split in python_docs.values() for document in documents(split)]
    assert sum(lengths) + len(lengths) == sum(tokens.size for tokens in python_docs.values())


def test_no_document_comes_twice(python_docs):
    train, validation = documents(python_docs["train"]), documents(python_docs["validation"])
    assert len({*train, *validation}) == len(train) + len(validation)


def test_five_percent_of_the_documents_are_for_validation(python_docs):
    train, validation = (len(documents(python_docs[split])) for split in ("train", "validation"))
    assert validation == round(0.05 * (train + validation))


def test_the_documents_are_english_with_its_whitespace_collapsed(python_docs):
    texts = [gpt2().decode(document) for document in documents(python_docs["validation"])]
    assert all(text == " ".join(text.split()) for text in texts)
    assert sum(" the " in text for text in texts) > len(texts) / 10


def test_the_documents_are_as_many_and_as_rich_as_the_design_says(python_docs):
    assert python_docs["train"].size > 400_000
    assert 6.5 < entropy(np.bincount(python_docs["train"])) < 7.3


def test_the_documents_are_shuffled(python_docs):
    """In file order, documents of one module, and so of one length class, would stand together."""
    lengths = np.array([len(document) for document in documents(python_docs["train"])])
    halves = [np.log1p(half).mean() for half in np.array_split(lengths, 2)]
    assert abs(halves[0] - halves[1]) < 0.1


def test_python_docs_are_kept_apart_by_python_version():
    for name in ("python-docs", "python-docs/bytes", "python-docs/bpe-300", "every-token", "every-token/bytes"):
        version = find_builtin(f"builtin/{name}").version
        assert version and (platform.python_version() in version) == name.startswith("python-docs")


@pytest.mark.parametrize("text", ["def broken(:\n", "\0", "# no docstring\nx = 1\n"])
def test_a_file_without_docstrings_gives_none(text, tmp_path):
    (tmp_path / "module.py").write_text(text)
    assert list(builtin._docstrings(tmp_path / "module.py")) == []


def test_the_docstrings_of_modules_classes_and_functions_are_found(tmp_path):
    (tmp_path / "module.py").write_text(
        '"""Of the module."""\nclass A:\n    """Of the class."""\n    async def f(self):\n        "Of the method \\d"\n'
    )
    assert list(builtin._docstrings(tmp_path / "module.py")) == [
        "Of the module.",
        "Of the class.",
        r"Of the method \d",
    ]
