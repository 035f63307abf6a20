"""Token files: safetensors with one tensor `tokens`.

The format: https://github.com/huggingface/safetensors#format. A header may end in spaces, so a writer leaves room for
one and writes it last.
"""

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from outside_in.runtime.machine import memory_bytes
from outside_in.storage.safetensors_file import open_tensors

HEADER_BYTES = 128  # its length, 8 bytes, included
SLICE_TOKENS = 2**24  # looked at at once
TRAIN, VALIDATION = "train.safetensors", "validation.safetensors"  # in a folder of tokens
INTEGER_TYPES = ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


def open_tokens(path: Path) -> Any:
    """Return the tensor `tokens` of a file, unread.

    It has `get_shape()`, `get_dtype()` and `[start:stop]`.
    Raises ValueError when it is missing, not one-dimensional, or not of an integer type.
    """
    if not path.is_file():
        remedy = _misnamed(path) or "put a safetensors file with `tokens` there, or make one with prepare_data.py"
        raise ValueError(f"{path}: expected a token file, found nothing; {remedy}")
    file = open_tensors(path)
    names = list(file.keys())
    if "tokens" not in names:
        found = repr(", ".join(names[:5]))[1:-1][:200] or "none"  # a name may hold anything
        raise ValueError(f"{path}: expected a tensor named 'tokens', got {found}; rename it")
    tensor = file.get_slice("tokens")
    if len(tensor.get_shape()) != 1 or tensor.get_dtype() not in INTEGER_TYPES:
        raise ValueError(
            f"{path}: expected 'tokens' to be one-dimensional integers, "
            f"got shape {str(tuple(tensor.get_shape()))[:100]} of {tensor.get_dtype()}; flatten and cast it"
        )
    return tensor


def find_validation(folder: Path) -> Path | None:
    """Return a folder's token file for validation; None without one.

    Raises ValueError when it has another name: it would not be used, and nobody would notice.
    """
    path = folder / VALIDATION
    if path.is_file():
        return path
    if hint := _misnamed(path):
        raise ValueError(f"{path}: expected the tokens for validation there; {hint}, or set val_tokens to 0")
    return None


def _misnamed(path: Path) -> str:
    """Return what to do with a file that seems meant for the missing one; "" without any."""
    others = sorted(other.name for other in path.parent.iterdir()) if path.parent.is_dir() else []
    for name in others:
        if not name.startswith(path.name[:3]):  # val.safetensors, valid.npy; train.bin, training.safetensors
            continue
        if name.endswith(".safetensors"):
            return f"rename {name} to {path.name}"
        if name.endswith((".bin", ".npy")):  # of nanoGPT: bare uint16; of NumPy
            read = f"np.fromfile({name!r}, np.uint16)" if name.endswith(".bin") else f"np.load({name!r})"
            return f"convert {name} with safetensors.numpy.save_file({{'tokens': {read}}}, {path.name!r})"
    return ""


def count_tokens(path: Path) -> int:
    """Return the number of tokens in a file, from its header."""
    return open_tokens(path).get_shape()[0]


def read_tokens(path: Path, vocab_size: int, start: int = 0, count: int | None = None) -> np.ndarray:
    """Read `count` tokens from `start` on; None: all that follow.

    Returns token ids, (count,), each below `vocab_size`, of the file's integer type.
    Raises ValueError as `open_tokens` does, and when the file is too short, does not fit into memory, or has an id that
    is out of range (JAX would clamp it silently).
    """
    tensor = open_tokens(path)
    available = tensor.get_shape()[0]
    stop = available if count is None else start + count
    if stop > available or start >= available:
        raise ValueError(
            f"{path}: expected at least {max(start + 1, stop):,} tokens, got {available:,}; use fewer tokens"
        )
    if (stop - start) * int(tensor.get_dtype()[1:]) // 8 > memory_bytes():  # U16: 16 bits
        raise ValueError(f"{path}: {stop - start:,} tokens do not fit into this machine's memory; use fewer tokens")
    ids = tensor[start:stop]
    _check_ids(path, ids, vocab_size, start)
    return ids


def map_tokens(path: Path, vocab_size: int, start: int, count: int) -> np.ndarray:
    """Map `count` tokens from `start` on into memory; see `read_tokens`."""
    if (available := count_tokens(path)) < start + count:
        raise ValueError(f"{path}: expected at least {start + count:,} tokens, got {available:,}; use fewer tokens")
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        tensor = json.loads(file.read(header_bytes))["tokens"]
    kind = np.dtype({"U": "<u", "I": "<i"}[tensor["dtype"][0]] + str(int(tensor["dtype"][1:]) // 8))
    offset = 8 + header_bytes + tensor["data_offsets"][0] + start * kind.itemsize
    ids = np.memmap(path, kind, "r", offset, (count,))
    for first in range(0, count, SLICE_TOKENS):
        _check_ids(path, ids[first : first + SLICE_TOKENS], vocab_size, start + first)
    return ids


def token_slices(path: Path, vocab_size: int, size: int, overlap: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """Yield slices of `size` tokens, and where each starts.

    Each has the first `overlap` tokens of the next one too. Ids are below `vocab_size`, of the file's integer type.
    """
    tensor = open_tokens(path)
    num_tokens = tensor.get_shape()[0]
    for start in range(0, num_tokens, size):
        ids = tensor[start : min(start + size + overlap, num_tokens)]
        _check_ids(path, ids, vocab_size, start)
        yield start, ids


def _check_ids(path: Path, ids: np.ndarray, vocab_size: int, start: int) -> None:
    if ids.size == 0 or (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
        return
    bad = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
    raise ValueError(
        f"{path}: token {start + bad:,} is id {ids[bad]}, expected ids from 0 to {vocab_size - 1}; "
        "tokenize for this vocabulary or raise vocab_size"
    )


def entropy(counts: np.ndarray) -> float:
    """Return the entropy of counts, (V,), in nats."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float((shares * np.log(1 / shares)).sum())


class TokenWriter:
    """Appends tokens, uint16, to a new token file, complete after `finish`."""

    def __init__(self, path: Path, num_tokens: int = 0) -> None:
        """Open a new file, or an unfinished one, keeping its first `num_tokens`."""
        self.path, self.num_tokens = path, num_tokens
        if num_tokens and (not path.exists() or path.stat().st_size < HEADER_BYTES + 2 * num_tokens):
            raise ValueError(f"{path}: expected {num_tokens:,} tokens, got fewer; start over with --overwrite")
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(HEADER_BYTES + 2 * num_tokens)
        self._file.seek(0, os.SEEK_END)

    def append(self, tokens: np.ndarray) -> None:
        self._file.write(tokens.astype("<u2", copy=False).data)
        self.num_tokens += len(tokens)

    def fsync(self) -> None:
        """Wait until the appended tokens are safe on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Write the header, which makes it a token file, and close it."""
        tensor = {"dtype": "U16", "shape": [self.num_tokens], "data_offsets": [0, 2 * self.num_tokens]}
        header = json.dumps({"tokens": tensor}).encode().ljust(HEADER_BYTES - 8)
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)
        self.fsync()
        self.close()

    def close(self) -> None:
        self._file.close()


def written_tokens(path: Path) -> np.ndarray:
    """Map the tokens of a writer's file, finished or not, (num_tokens,)."""
    return (
        np.memmap(path, "<u2", "r", offset=HEADER_BYTES) if path.stat().st_size > HEADER_BYTES else np.zeros(0, "<u2")
    )


def find_last_document(tokens: np.ndarray, end_of_text: int) -> int:
    """Return where the last document starts."""
    for stop in range(len(tokens) - 1, 0, -SLICE_TOKENS):
        start = max(0, stop - SLICE_TOKENS)
        ends = np.flatnonzero(tokens[start:stop] == end_of_text)
        if len(ends):
            return start + int(ends[-1]) + 1
    return 0


def shuffle_documents(path: Path, shuffled: Path, seed: int, end_of_text: int) -> None:
    """Write a token file's documents to another file, in a seeded order.

    Only the documents' positions are in memory.
    """
    tokens = written_tokens(path)
    starts = range(0, len(tokens), SLICE_TOKENS)
    ends = [start + np.flatnonzero(tokens[start : start + SLICE_TOKENS] == end_of_text) + 1 for start in starts]
    borders = np.unique(np.concatenate([[0], *ends, [len(tokens)]]))  # the last may be unfinished
    shuffled.unlink(missing_ok=True)
    with closing(TokenWriter(shuffled)) as writer:
        for document in np.random.default_rng(seed).permutation(len(borders) - 1):
            writer.append(tokens[borders[document] : borders[document + 1]])
        writer.finish()
