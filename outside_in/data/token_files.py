"""A token file, written from front to end: safetensors with one tensor `tokens`, whose header comes last.

The format: https://github.com/huggingface/safetensors#format. A header may end in spaces, so room for it is left.
"""

import json
import os
from contextlib import closing
from pathlib import Path

import numpy as np

from outside_in.data.tokenizer import END_OF_TEXT

HEADER_BYTES = 128  # its length, 8 bytes, included
SLICE_TOKENS = 2**24


class TokenWriter:
    """Appends tokens, uint16, to a file that becomes a token file by `finish`."""

    def __init__(self, path: Path, num_tokens: int = 0) -> None:
        """Open a new file, or one that a writer has left behind, of which `num_tokens` are kept."""
        self.path, self.num_tokens = path, num_tokens
        if num_tokens and (not path.exists() or path.stat().st_size < HEADER_BYTES + 2 * num_tokens):
            raise ValueError(f"{path}: expected {num_tokens:,} tokens, got fewer; start anew with --overwrite")
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(HEADER_BYTES + 2 * num_tokens)
        self._file.seek(0, os.SEEK_END)

    def append(self, tokens: np.ndarray) -> None:
        self._file.write(tokens.astype("<u2", copy=False).data)
        self.num_tokens += len(tokens)

    def sync(self) -> None:
        """See to it that what was appended outlives the machine's power."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Write the header; from now on it is a token file."""
        tensor = {"dtype": "U16", "shape": [self.num_tokens], "data_offsets": [0, 2 * self.num_tokens]}
        header = json.dumps({"tokens": tensor}).encode().ljust(HEADER_BYTES - 8)
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)
        self.sync()
        self.close()

    def close(self) -> None:
        self._file.close()


def written_tokens(path: Path) -> np.ndarray:
    """Map the tokens of a file that a writer has made, finished or not, (num_tokens,); nothing is read yet."""
    return (
        np.memmap(path, "<u2", "r", offset=HEADER_BYTES) if path.stat().st_size > HEADER_BYTES else np.zeros(0, "<u2")
    )


def shuffle_documents(path: Path, shuffled: Path, seed: int) -> None:
    """Write the documents of a token file in a seeded order into another one; in memory is only where they begin."""
    tokens = written_tokens(path)
    starts = range(0, len(tokens), SLICE_TOKENS)
    ends = [start + np.flatnonzero(tokens[start : start + SLICE_TOKENS] == END_OF_TEXT) + 1 for start in starts]
    borders = np.concatenate([np.zeros(1, int), *ends])
    shuffled.unlink(missing_ok=True)
    with closing(TokenWriter(shuffled)) as writer:
        for document in np.random.default_rng(seed).permutation(len(borders) - 1):
            writer.append(tokens[borders[document] : borders[document + 1]])
        writer.finish()
