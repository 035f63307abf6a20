"""Leakage: how much of validation occurs word for word in training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from outside_in.data.token_files import open_tokens, token_slices
from outside_in.data.tokenizer import MAX_VOCAB_SIZE

SLICE_TOKENS = 2**15  # read at once: few enough that their hashes, 8 bytes each, stay in a core's cache
LEAKAGE_LENGTH = 32  # tokens: too long to recur by chance, short enough to show a copied paragraph
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, made odd: Knuth's multiplicative hashing

Progress = Callable[[int], object]


def show_nothing(tokens: int) -> None: ...


def find_leakage(
    train_path: Path, validation_path: Path, *, length: int = LEAKAGE_LENGTH, progress: Progress = show_nothing
) -> dict[str, Any]:
    """Count the validation sequences that occur anywhere in the training tokens.

    Validation is cut into sequences of `length` tokens, one after the other; a shorter rest is left out. Training is
    searched at every token. Matches are found by 64-bit hashes, then compared token by token. If two different
    sequences of validation share a hash (odds of one in a million with six million of them), the first stands for both.
    Memory: about 80 bytes for each sequence of validation, whatever the size of training.

    `progress` is called with the number of training tokens searched so far.
    Returns `sequence_length`, `sequences`, how many of them were `found`, and their `share`.
    Raises ValueError as `describe_split` does.
    """
    hashes = _sequence_hashes(validation_path, length)
    known, first, repeats = np.unique(hashes, return_index=True, return_counts=True)  # each (distinct hashes,)
    found = np.zeros(known.size, bool)
    table = _bit_table(known)
    validation, num_tokens = open_tokens(validation_path), open_tokens(train_path).get_shape()[0]
    for start, ids in token_slices(train_path, MAX_VOCAB_SIZE, SLICE_TOKENS, length - 1):
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


def _window_hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """Hash every run of `length` consecutive tokens.

    Each hash mixes those of the two halves, which may overlap. Takes ids, (n,), and returns (n - length + 1,), uint64;
    none when there are fewer tokens.
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
    """Hash a token file cut into sequences: (num_tokens // length,), uint64."""
    whole = max(1, SLICE_TOKENS // length) * length
    hashes = [_window_hashes(ids, length)[::length].copy() for _, ids in token_slices(path, MAX_VOCAB_SIZE, whole)]
    return np.concatenate([np.array([], np.uint64), *hashes])


def _bit_table(hashes: np.ndarray) -> np.ndarray:
    """Return a table, uint8, with one bit set for every hash. At least 63 of 64 bits are not set."""
    table = np.zeros(2 ** max(1, (8 * hashes.size).bit_length()), np.uint8)
    np.bitwise_or.at(table, _slots(table, hashes), _bits(hashes))
    return table


def _places_in(table: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Return the indices of hashes whose bits are set in a table.

    Those are the hashes it was made of, and few others.
    """
    places = np.flatnonzero(table[_slots(table, hashes)])
    few = hashes[places]
    return places[table[_slots(table, few)] & _bits(few) != 0]


def _slots(table: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    return (hashes >> (65 - table.size.bit_length())).view(np.int64)  # the upper log2(table.size) bits


def _bits(hashes: np.ndarray) -> np.ndarray:
    return np.left_shift(np.uint8(1), (hashes & 7).astype(np.uint8))
