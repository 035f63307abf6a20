"""The built-in datasets: every token, and the prose in Python's standard library."""

import ast
import platform
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from outside_in.data import tokenizer

SHUFFLE_SEED = 42
PERMUTATIONS = 20  # about a million tokens
VALIDATION_SHARE = 0.05
NOT_PROSE = {"site-packages", "test", "tests", "idle_test", "lib2to3", "turtledemo"}


def every_token() -> dict[str, np.ndarray]:
    """Make seeded permutations of all GPT-2 token ids, for A-to-A runs.

    Returns `train` and `validation`, each (num_tokens,), uint16.
    """
    rng = np.random.default_rng(SHUFFLE_SEED)
    permutations = [rng.permutation(tokenizer.VOCAB_SIZE).astype(np.uint16) for _ in range(PERMUTATIONS + 1)]
    return {"train": np.concatenate(permutations[1:]), "validation": permutations[0]}


def python_docs() -> dict[str, np.ndarray]:
    """Tokenize the documentation of the running Python's standard library.

    That is half a million tokens of English: language-reference topics and docstrings, whitespace collapsed, each once,
    shuffled by a fixed seed, each followed by `<|endoftext|>`. 5% of them are for validation. The text differs from one
    Python version to the next.

    Returns `train` and `validation`, each (num_tokens,), uint16.
    """
    documents = list(dict.fromkeys(" ".join(text.split()) for text in _documentation()))  # each once
    random.Random(SHUFFLE_SEED).shuffle(documents)
    tokens = [np.array([*tokenizer.encode(text), tokenizer.END_OF_TEXT], np.uint16) for text in documents]
    held_out = round(len(tokens) * VALIDATION_SHARE)
    return {"train": np.concatenate(tokens[held_out:]), "validation": np.concatenate(tokens[:held_out])}


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


# Each name maps to its maker and to what its tokens depend on.
BUILTIN = {
    "builtin/every-token": (every_token, "v1"),
    "builtin/python-docs": (python_docs, f"v1-python-{platform.python_version()}"),
}
