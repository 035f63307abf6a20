"""Trains a byte-level BPE, as GPT-2's is, with Hugging Face's `tokenizers`."""

from collections.abc import Iterable

from tiktoken_ext.openai_public import ENDOFTEXT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from outside_in.data.tokenizer import MAX_VOCAB_SIZE, TOKENIZER_FILE, whole
from outside_in.data.tokenizer_files import JSONTokenizer

MIN_VOCAB_SIZE = 257  # the bytes and the end of a text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> JSONTokenizer:
    """Train a byte-level BPE of `vocab_size` ids; the first one is `<|endoftext|>`.

    Raises ValueError when the texts support fewer ids.
    """
    check_vocab_size(vocab_size)
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[ENDOFTEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(map(whole, texts), trainer)
    if (found := library.get_vocab_size()) < vocab_size:
        raise ValueError(f"a tokenizer of {vocab_size:,} ids: the training text supports {found:,}; ask for fewer ids")
    return JSONTokenizer(library.to_str(pretty=True).encode(), TOKENIZER_FILE)


def check_vocab_size(vocab_size: int) -> None:
    """Raise ValueError when no tokenizer of so many ids can be trained."""
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"a tokenizer of {vocab_size:,} ids: expected from {MIN_VOCAB_SIZE} (the bytes and the end of a text) to "
            f"{MAX_VOCAB_SIZE:,}"
        )
