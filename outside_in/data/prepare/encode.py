"""Documents to tokens: in batches, on all cores, in order."""

import hashlib
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from outside_in.data.prepare.documents import Source
from outside_in.data.prepare.rows import Bad, Document, ReadOptions
from outside_in.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 2**17  # of documents that are tokenized together
PIECE_CHARACTERS = 2**20  # of a long document, whose pieces are tokenized on several cores
DIGEST_BYTES = 16
BORDER = re.compile(r"\S \S")
EMPTY = Bad("an empty document")
NOTHING = np.zeros(0, np.uint16)


class Encoded(NamedTuple):
    """A document's digest and tokens; or why it is left out."""

    digest: bytes
    tokens: np.ndarray
    ends_in_text: int  # how often it has the text of the token that ends a text
    dropped: Bad | None


@dataclass
class Batch:
    """Documents that are being tokenized: what is known of them, and their tokens in pieces."""

    source: int
    bytes_read: int  # of the source, after them
    characters: int
    facts: list[tuple[bytes, int, Bad | None]]  # as in `Encoded`
    pieces: list[Future[list[np.ndarray]]]  # of several documents, or several of one

    def documents(self) -> Iterator[Encoded]:
        done = [future.result() for future in self.pieces]
        arrays = iter(done[0] if len(done) == 1 else [np.concatenate(list(chain.from_iterable(done)))])
        for digest, ends_in_text, dropped in self.facts:
            yield Encoded(digest, NOTHING if dropped else next(arrays), ends_in_text, dropped)


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

    def submit(source: int, bytes_read: int, documents: list[Document]) -> Batch:
        texts = [document for document in documents if document and not isinstance(document, Bad)]
        whole = len(texts) != 1 or not tokenizer.cuts_before_spaces
        pieces = [texts] if whole else [[piece] for piece in cut(texts[0])]
        last = len(pieces) - 1
        futures = [pool.submit(tokenize, part, j == last) for j, part in enumerate(pieces)]
        return Batch(source, bytes_read, sum(map(len, texts)), list(map(facts_of, documents)), futures)

    def facts_of(document: Document) -> tuple[bytes, int, Bad | None]:
        if isinstance(document, Bad):
            return b"", 0, document
        return digest_of(document), document.count(tokenizer.end_token), None if document else EMPTY

    def tokenize(texts: list[str], is_end: bool) -> list[np.ndarray]:
        """Encode texts, each followed by the end of a text if `is_end`."""
        arrays = [tokenizer.encode(text, special=special_tokens) for text in texts]
        return [np.append(array, np.uint16(tokenizer.end_of_text)) for array in arrays] if is_end else arrays

    for i in range(first, len(sources)):
        documents: list[Document] = []
        characters = bytes_read = 0
        for document, bytes_read in sources[i].documents(reading, skip if i == first else 0):
            size = 0 if isinstance(document, Bad) else len(document)
            if size > PIECE_CHARACTERS:
                if documents:
                    yield submit(i, bytes_read, documents)
                yield submit(i, bytes_read, [document])
                documents, characters = [], 0
                continue
            documents.append(document)
            characters += size + 100  # for very short ones
            if characters > BATCH_CHARACTERS:
                yield submit(i, bytes_read, documents)
                documents, characters = [], 0
        if documents:
            yield submit(i, bytes_read, documents)


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
        border = BORDER.search(text, start + PIECE_CHARACTERS - 1)
        end = border.start() + 1 if border else len(text)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]
