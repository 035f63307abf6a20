"""The built-in datasets: every token, and the prose in Python's standard library, with any of three tokenizers."""

import ast
import platform
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from outside_in.data.tokenizer import GPT2_VOCAB_SIZE, Tokenizer
from outside_in.data.tokenizer_files import load
from outside_in.data.train_tokenizer import check_vocab_size, train_tokenizer

SHUFFLE_SEED = 42
EVERY_TOKEN_TOKENS = 20 * GPT2_VOCAB_SIZE  # about a million
VALIDATION_SHARE = 0.05  # of documents; beside so many permutations
NOT_PROSE = {"site-packages", "test", "tests", "idle_test", "lib2to3", "turtledemo"}
TRAINED = "bpe-"  # before the number of ids
NAME = re.compile(r"builtin/(every-token|python-docs)(?:/(bytes|bpe-[1-9][0-9]*))?")
FORMS = "builtin/every-token, builtin/python-docs, also with /bytes, or builtin/python-docs/bpe-N"

Splits = dict[str, np.ndarray]


@dataclass(frozen=True)
class Builtin:
    """A built-in dataset, by its name: what the tokens are, and of which tokenizer."""

    name: str
    tokens: str  # every-token or python-docs
    tokenizer: str  # gpt2, bytes, or bpe-N: trained on the training documents

    @property
    def vocab_size(self) -> int:
        is_trained = self.tokenizer.startswith(TRAINED)
        return int(self.tokenizer.removeprefix(TRAINED)) if is_trained else load(self.tokenizer).vocab_size

    @property
    def version(self) -> str:
        """Return what the tokens depend on."""
        return f"v1-python-{platform.python_version()}" if self.tokens == "python-docs" else "v1"

    def make(self) -> tuple[Splits, Tokenizer]:
        """Make the token ids of `train` and `validation`, each (num_tokens,), uint16, and their tokenizer."""
        if self.tokens == "every-token":
            made = load(self.tokenizer)
            return every_token(made.vocab_size), made
        splits = documents()
        is_trained = self.tokenizer.startswith(TRAINED)
        made = train_tokenizer(splits["train"], self.vocab_size) if is_trained else load(self.tokenizer)
        return {split: tokenized(texts, made) for split, texts in splits.items()}, made


def find_builtin(name: str) -> Builtin | None:
    """Return the built-in dataset of a name; None for other names.

    Raises ValueError when there is no such built-in one.
    """
    if not name.startswith("builtin/"):
        return None
    match = NAME.fullmatch(name)
    if match is None or (match[1] == "every-token" and match[2] not in (None, "bytes")):
        raise ValueError(f"dataset: no built-in data named {name[:100]!r}; use one of {FORMS}")
    kind = match[2] or "gpt2"
    if kind.startswith(TRAINED):
        check_vocab_size(int(kind.removeprefix(TRAINED)[:9]))
    return Builtin(name, match[1], kind)


def every_token(vocab_size: int = GPT2_VOCAB_SIZE) -> Splits:
    """Make seeded permutations of all token ids, for A-to-A runs.

    Returns `train` and `validation`, each (num_tokens,), uint16.
    """
    rng = np.random.default_rng(SHUFFLE_SEED)
    count = EVERY_TOKEN_TOKENS // vocab_size
    held_out = round(count * VALIDATION_SHARE)
    permutations = [rng.permutation(vocab_size).astype(np.uint16) for _ in range(held_out + count)]
    return {"train": np.concatenate(permutations[held_out:]), "validation": np.concatenate(permutations[:held_out])}


def documents() -> dict[str, list[str]]:
    """Collect the documentation of the running Python's standard library.

    That is two million characters of English: language-reference topics and docstrings, whitespace collapsed, each
    once, shuffled by a fixed seed. 5% of them are for validation. The text differs from one Python version to the next.
    """
    texts = list(dict.fromkeys(" ".join(text.split()) for text in _documentation()))  # each once
    random.Random(SHUFFLE_SEED).shuffle(texts)
    held_out = round(len(texts) * VALIDATION_SHARE)
    return {"train": texts[held_out:], "validation": texts[:held_out]}


def tokenized(texts: list[str], made: Tokenizer) -> np.ndarray:
    """Encode texts, each followed by the end of a text; returns (num_tokens,), uint16."""
    end = np.array([made.end_of_text], np.uint16)
    return np.concatenate([part for text in texts for part in (made.encode(text), end)])


def _documentation() -> Iterator[str]:
    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if NOT_PROSE.isdisjoint(path.relative_to(library).parts):
            yield from _docstrings(path)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template, not a module
        return
    for node in ast.walk(tree):
        has_docstring = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if has_docstring and (text := ast.get_docstring(node)):
            yield text
