"""Documents to tokens: in batches, on all cores, in order."""

import hashlib
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import numpy as np

from outside_in.data.prepare.documents import File, HubDataset, ReadOptions
from outside_in.data.tokenizer import Tokenizer

Source = File | HubDataset

BATCH_CHARACTERS = 2**17  # of documents that are tokenized together
PIECE_CHARACTERS = 2**20  # of a long document, whose pieces are tokenized on several cores
DIGEST_BYTES = 16
BORDER = re.compile(r"\S \S")


@dataclass
class Batch:
    """Documents that are being tokenized: their digests, and their tokens in pieces."""

    source: int
    bytes_read: int  # of the source, after them
    characters: int
    digests: list[bytes]
    pieces: list[Future[list[np.ndarray]]]  # of several documents, or several of one

    def documents(self) -> Iterator[tuple[bytes, np.ndarray]]:
        done = [future.result() for future in self.pieces]
        arrays = done[0] if len(done) == 1 else [np.concatenate(list(chain.from_iterable(done)))]
        return zip(self.digests, arrays, strict=True)


def batches(
    sources: list[Source],
    reading: ReadOptions,
    pool: ThreadPoolExecutor,
    tokenizer: Tokenizer,
    *,
    first: int,
    skip: int,
    special_tokens: bool,
) -> Iterator[Batch]:
    """Submit documents to a pool, and yield them in batches.

    The first `skip` documents of source number `first`, and the sources before it, are left out.
    """

    def submit(source: int, bytes_read: int, texts: list[str]) -> Batch:
        whole = len(texts) > 1 or not tokenizer.cuts_before_spaces
        pieces = [texts] if whole else [[piece] for piece in cut(texts[0])]
        last = len(pieces) - 1
        futures = [pool.submit(tokenize, part, j == last) for j, part in enumerate(pieces)]
        return Batch(source, bytes_read, sum(map(len, texts)), [digest_of(text) for text in texts], futures)

    def tokenize(texts: list[str], is_end: bool) -> list[np.ndarray]:
        """Encode texts, each followed by the end of a text if `is_end`."""
        arrays = [tokenizer.encode(text, special=special_tokens) for text in texts]
        return [np.append(array, np.uint16(tokenizer.end_of_text)) for array in arrays] if is_end else arrays

    for i in range(first, len(sources)):
        texts: list[str] = []
        characters = bytes_read = 0
        for text, bytes_read in sources[i].documents(reading, skip if i == first else 0):
            if len(text) > PIECE_CHARACTERS:
                if texts:
                    yield submit(i, bytes_read, texts)
                yield submit(i, bytes_read, [text])
                texts, characters = [], 0
                continue
            texts.append(text)
            characters += len(text) + 100  # for very short ones
            if characters > BATCH_CHARACTERS:
                yield submit(i, bytes_read, texts)
                texts, characters = [], 0
        if texts:
            yield submit(i, bytes_read, texts)


def ahead(batches: Iterator[Batch], workers: int) -> Iterator[Batch]:
    """Yield batches while later ones are being tokenized.

    A few pieces for each worker are in memory, of bounded size in all.
    """
    waiting: deque[Batch] = deque()
    for batch in batches:
        waiting.append(batch)
        while (
            sum(len(each.pieces) for each in waiting) > 2 * workers
            or sum(each.characters for each in waiting) > 2 * workers * PIECE_CHARACTERS
        ):
            yield waiting.popleft()
    yield from waiting


def digest_of(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def cut(text: str) -> list[str]:
    """Cut a long text into pieces of about `PIECE_CHARACTERS`.

    Each cut is before a space between two characters that are not spaces. GPT-2's pattern begins a new piece there, so
    the tokens stay the same (`Tokenizer.cuts_before_spaces`).
    """
    pieces, start = [], 0
    while len(text) - start > PIECE_CHARACTERS:
        end = start + PIECE_CHARACTERS
        while end < len(text) and not BORDER.match(text, end - 1):
            end += 1
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]
