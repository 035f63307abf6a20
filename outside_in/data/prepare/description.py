"""What is in a folder of token files: counts, validation text that was trained on, where the tokens come from.

Counted from the token files, and compared with what `data.json` says of them. Files may be larger than memory.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from outside_in.data import tokenizer
from outside_in.storage.safetensors_file import open_tensors
from outside_in.storage.strict_json import read_json

DESCRIPTION = "data.json"
LARGEST_BYTES = 2**28  # of data.json: there may be a hundred thousand sources
SPLITS = ("train", "validation")
INTEGER_TYPES = ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
SLICE_TOKENS = 2**15  # read at once: few enough that their hashes, 8 bytes each, stay in a core's cache
LEAKAGE_LENGTH = 32  # tokens: too long to recur by chance, short enough to show a copied paragraph
SAMPLE_TOKENS = 60
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, made odd: Knuth's multiplicative hashing
SOURCE_FACTS = {
    "documents": "{:,} documents",
    "tokens": "{:,} tokens",
    "share": "{:.1%} of all tokens",
    "revision": "revision {:.64}",
    "size_bytes": "{:,} bytes",
    "sha256": "sha256 {:.64}",
}

Progress = Callable[[int], object]


def _show_nothing(tokens: int) -> None: ...


def describe(folder: Path, *, progress: Progress = _show_nothing) -> tuple[dict[str, Any], list[str]]:
    """Count what is in a folder of token files, and say it, beside what `data.json` says of their origin.

    `progress` is that of `leakage`, which takes most of the time.

    Returns `{"splits": {"train": …, "validation": …}, "leakage": …}` with the facts of `describe_split` and `leakage`,
    validation left out and leakage None where there is no validation file; and the lines to print, with a `WARNING`
    for every number that `data.json` has otherwise.
    Raises ValueError when a token file (see `describe_split`) or `data.json` is not what it should be.
    """
    recorded = _read_recorded(folder / DESCRIPTION) if (folder / DESCRIPTION).exists() else {}
    train, validation = paths = [folder / f"{split}.safetensors" for split in SPLITS]
    splits = {path.stem: describe_split(path) for path in paths if path == train or path.exists()}
    leaked = leakage(train, validation, progress=progress) if "validation" in splits else None
    facts = {"splits": splits, "leakage": leaked}
    return facts, [*lines(recorded | facts), *_differences(recorded, facts), f"sample {_sample(train)!r}"]


def lines(description: dict[str, Any]) -> list[str]:
    """Say what `data.json` says (or `describe` has counted, where there is none), one fact a line."""
    leaked, dropped = description["leakage"], description.get("duplicates_dropped")
    facts = [
        *(_split_line(split, counts) for split, counts in description["splits"].items()),
        _leakage_line(leaked) if leaked else "leakage unknown: there is no validation file",
    ]
    if "format" not in description:
        return [*facts, f"no {DESCRIPTION}: it is not known where these tokens come from"]
    return [
        *facts,
        *(f"source {_printable(source['name'])}: {_source_facts(source)}" for source in description["sources"]),
        f"tokenizer {_printable(description['tokenizer'])}, seed {_printable(description['seed'])}",
        f"options {', '.join(_option_texts(description['options'])) or 'none'}",
        "duplicates not looked for" if dropped is None else f"duplicates dropped: {dropped:,}",
    ]


def describe_split(path: Path) -> dict[str, Any]:
    """Count the tokens and documents of a token file.

    Returns `tokens`; `documents`, each ended by `<|endoftext|>` or by the end of the file; `longest_document` in
    tokens, without its `<|endoftext|>`; and `unigram_entropy` in nats: the loss of a model that knows nothing but how
    often each token occurs.
    Raises ValueError when there is no one-dimensional integer tensor `tokens`, or an id that GPT-2 does not have.
    """
    tokens = longest = 0
    last_end = -1  # index of the last <|endoftext|>
    counts = np.zeros(tokenizer.VOCAB_SIZE, np.int64)
    for start, ids in _slices(path):
        counts += np.bincount(ids, minlength=counts.size)
        tokens += ids.size
        ends = np.concatenate([[last_end], start + np.flatnonzero(ids == tokenizer.END_OF_TEXT)])
        longest = max(longest, int(np.diff(ends).max(initial=1)) - 1)
        last_end = int(ends[-1])
    unfinished = tokens - 1 - last_end  # tokens of a last document without an end
    seen = counts[counts > 0]
    return {
        "tokens": tokens,
        "documents": int(counts[tokenizer.END_OF_TEXT]) + (unfinished > 0),
        "longest_document": max(longest, unfinished),
        "unigram_entropy": float((seen / tokens * np.log(tokens / seen)).sum()) if tokens else 0.0,
    }


def leakage(
    train_path: Path, validation_path: Path, *, length: int = LEAKAGE_LENGTH, progress: Progress = _show_nothing
) -> dict[str, Any]:
    """Count the validation text that occurs, word for word, anywhere in the training text.

    Validation is cut into sequences of `length` tokens, one after the other; a shorter rest is left out. Training is
    searched at every token. Matches are found by 64-bit hashes, then compared token by token; only where two different
    sequences of validation share a hash (odds of one in a million with six million of them) does the first stand for
    both. Memory: about 80 bytes for each sequence of validation, whatever the size of training.

    `progress` is told how many training tokens have been searched.
    Returns `sequence_length`, `sequences`, how many of them were `found`, and their `share`.
    Raises ValueError as `describe_split` does.
    """
    hashes = _sequence_hashes(validation_path, length)
    known, first, repeats = np.unique(hashes, return_index=True, return_counts=True)  # each (distinct hashes,)
    found = np.zeros(known.size, bool)
    table = _bit_table(known)
    validation, num_tokens = _open_tokens(validation_path), _open_tokens(train_path).get_shape()[0]
    for start, ids in _slices(train_path, overlap=length - 1):
        hashes = _window_hashes(ids, length)
        places = _places_in(table, hashes)
        index = np.searchsorted(known[:-1], hashes[places])  # without the last: no index is beyond it
        hits = np.flatnonzero(~found[index])
        hits = hits[known[index[hits]] == hashes[places[hits]]]
        for place, i in zip(places[hits].tolist(), index[hits].tolist()):
            if not found[i]:
                begin = int(first[i]) * length
                found[i] = np.array_equal(ids[place : place + length], validation[begin : begin + length])
        progress(min(start + SLICE_TOKENS, num_tokens))
    sequences, num_found = int(repeats.sum()), int(repeats[found].sum())
    return {
        "sequence_length": length,
        "sequences": sequences,
        "found": num_found,
        "share": num_found / max(1, sequences),
    }


def recorded_leakage(folder: Path) -> float | None:
    """Return the share of validation that `data.json` says is in training; None where it does not say so."""
    try:
        share = _read_recorded(folder / DESCRIPTION)["leakage"]["share"]
    except (ValueError, KeyError, TypeError):  # training does not depend on this file
        return None
    return float(share) if isinstance(share, int | float) and 0 <= share <= 1 else None


# Token files


def _open_tokens(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: expected a token file, found nothing; put a safetensors file with `tokens` there")
    file = open_tensors(path)
    names = list(file.keys())
    if "tokens" not in names:
        raise ValueError(
            f"{path}: expected a tensor named 'tokens', got {_printable(', '.join(names[:5])) or 'none'}; rename it"
        )
    tensor = file.get_slice("tokens")
    shape, dtype = tensor.get_shape(), tensor.get_dtype()
    if len(shape) != 1 or dtype not in INTEGER_TYPES:
        raise ValueError(
            f"{path}: expected 'tokens' to be one-dimensional integers, "
            f"got shape {str(tuple(shape))[:100]} of {dtype}; flatten and cast it"
        )
    return tensor


def _slices(path: Path, size: int | None = None, overlap: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """Read a token file in slices of `size` tokens (None: SLICE_TOKENS), each with `overlap` tokens of the next one.

    Yields where a slice starts, and its ids, each below the size of the vocabulary, of the file's integer type.
    """
    tensor, size = _open_tokens(path), size or SLICE_TOKENS
    num_tokens = tensor.get_shape()[0]
    for start in range(0, num_tokens, size):
        ids = tensor[start : min(start + size + overlap, num_tokens)]
        if int(ids.min()) < 0 or int(ids.max()) >= tokenizer.VOCAB_SIZE:
            bad = int(np.flatnonzero((ids < 0) | (ids >= tokenizer.VOCAB_SIZE))[0])
            raise ValueError(
                f"{path}: token {start + bad:,} is id {ids[bad]}, expected ids from 0 to {tokenizer.VOCAB_SIZE - 1}; "
                "tokenize with GPT-2's encoding"
            )
        yield start, ids


def _sample(path: Path) -> str:
    """Decode the first tokens of the first document that is not empty."""
    _, ids = next(_slices(path), (0, np.array([], np.uint16)))
    started = itertools.dropwhile(lambda token: token == tokenizer.END_OF_TEXT, ids.tolist())
    document = itertools.takewhile(lambda token: token != tokenizer.END_OF_TEXT, started)
    return tokenizer.decode(list(itertools.islice(document, SAMPLE_TOKENS)))


# Windows of tokens


def _window_hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """Hash every run of `length` consecutive tokens, as a mix of the hashes of its two halves (which may overlap).

    Takes ids, (n,), and returns (n - length + 1,), uint64; none when there are fewer tokens.
    """
    hashes, width = ids.astype(np.uint64), 1
    while width < length:
        step = min(width, length - width)
        left, right = hashes[:-step], hashes[step:]
        hashes = left * MULTIPLIER
        hashes += right
        hashes ^= hashes >> 32
        width += step
    return hashes


def _sequence_hashes(path: Path, length: int) -> np.ndarray:
    """Hash a token file cut into sequences of `length`: (num_tokens // length,), uint64."""
    whole = max(1, SLICE_TOKENS // length) * length
    hashes = [_window_hashes(ids, length)[::length].copy() for _, ids in _slices(path, whole)]
    return np.concatenate([np.array([], np.uint64), *hashes])


def _bit_table(hashes: np.ndarray) -> np.ndarray:
    """Make a table, uint8, with one bit set for every hash, and 63 of 64 or more not set."""
    table = np.zeros(2 ** max(1, (8 * hashes.size).bit_length()), np.uint8)
    np.bitwise_or.at(table, _slots(table, hashes), _bits(hashes))
    return table


def _places_in(table: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Return where the hashes are whose bits are set in a table: those that it was made of, and few others."""
    places = np.flatnonzero(table[_slots(table, hashes)])
    few = hashes[places]
    return places[table[_slots(table, few)] & _bits(few) != 0]


def _slots(table: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    return (hashes >> (65 - table.size.bit_length())).view(np.int64)  # the upper log2(table.size) bits


def _bits(hashes: np.ndarray) -> np.ndarray:
    return np.left_shift(np.uint8(1), (hashes & 7).astype(np.uint8))


# What data.json says


def _read_recorded(path: Path) -> dict[str, Any]:
    recorded = read_json(path, LARGEST_BYTES)
    if recorded.get("format") != 1:
        raise ValueError(f"{path}: expected format 1, got {_printable(recorded.get('format'))}; prepare the data again")
    try:
        lines(recorded)  # says all that is in it
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__} {_printable(error)}"
        raise ValueError(
            f"{path}: expected what prepare_data.py writes, got another form ({reason}); prepare the data again"
        ) from None
    return recorded


def _source_facts(source: dict[str, Any]) -> str:
    known = {name: source[name] for name in SOURCE_FACTS if source.get(name) is not None}
    return ", ".join(_printable(SOURCE_FACTS[name].format(value)) for name, value in known.items())


def _option_texts(options: dict[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _option_texts(value)
        else:
            yield _printable(f"{name}={value}")


def _differences(recorded: dict[str, Any], facts: dict[str, Any]) -> Iterator[str]:
    """Warn of every number in `data.json` that the token files have otherwise, or that they do not have."""
    said, counted = (content.get("splits", {}) | {"leakage": content.get("leakage")} for content in (recorded, facts))
    for part in (*SPLITS, "leakage"):
        if said.get(part) and not counted.get(part):
            yield f"WARNING {DESCRIPTION}: has numbers of {part}, but there is no validation file"
        for name, value in (counted.get(part) or {}).items():
            if not _same((said.get(part) or {}).get(name, value), value):
                yield (
                    f"WARNING {DESCRIPTION}: {part} has {name} {_number(said[part][name])}, the token files have "
                    f"{_number(value)}; they are not those that were prepared"
                )


def _same(recorded: Any, value: float) -> bool:
    both_floats = isinstance(recorded, float) and isinstance(value, float)
    return recorded == value or (both_floats and math.isclose(recorded, value, rel_tol=1e-6))


# Lines


def _split_line(split: str, counts: dict[str, Any]) -> str:
    return (
        f"{split}: {counts['tokens']:,} tokens in {counts['documents']:,} documents, "
        f"mean length {counts['tokens'] / max(1, counts['documents']):,.1f}, longest {counts['longest_document']:,}, "
        f"unigram entropy {counts['unigram_entropy']:.3f} nats"
    )


def _leakage_line(leaked: dict[str, Any]) -> str:
    return (
        f"leakage {leaked['found']:,} of {leaked['sequences']:,} validation sequences of {leaked['sequence_length']} "
        f"tokens ({leaked['share']:.1%}) occur in the training tokens"
    )


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.6g}"
    return f"{value:,}" if isinstance(value, int) else _printable(value)


def _printable(value: Any) -> str:
    """Show what a file says, which may be anything, in part of a line."""
    return repr(str(value))[1:-1][:200]
