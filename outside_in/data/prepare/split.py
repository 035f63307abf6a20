"""Which text is for validation: documents by their content, or the end of a few."""

import hashlib

import numpy as np

from outside_in.data.prepare.progress import Options
from outside_in.data.token_files import find_last_document
from outside_in.data.tokenizer import Tokenizer

TRAIN = "train:"  # before the number of ids, of a tokenizer to be trained


def split_of(digest: bytes, options: Options) -> str:
    """Return a document's split, by its text and the seed alone.

    So equal documents stay together, whatever else comes and in which order.
    """
    place = hashlib.blake2b(digest, digest_size=8, salt=options.seed.to_bytes(8, "little")).digest()
    return "validation" if int.from_bytes(place, "little") < options.validation * 2**64 else "train"


def start_of_held_out(tokens: np.ndarray, documents: int, options: Options, tokenizer: Tokenizer) -> int | None:
    """Return where the end of the training tokens starts that is held out when no document fell into validation.

    Of several documents that is the last one, of a single one as large a share as is asked for: of its tokens, or of
    its text if the tokenizer was trained on the rest. None when the share is less than one document, or when a limit
    has cut off documents that the tokenizer was trained on.
    """
    is_trained = options.tokenizer.startswith(TRAIN)
    if is_trained and options.limit_tokens:
        return None
    if documents == 1 and is_trained:
        ends = np.cumsum(tokenizer.bytes_per_id[tokens])
        return int(np.searchsorted(ends, training_bytes(int(ends[-1]), options), side="right"))
    if documents == 1:
        return len(tokens) - round(len(tokens) * options.validation)
    return find_last_document(tokens, tokenizer.end_of_text) if round(documents * options.validation) else None


def training_bytes(num_bytes: int, options: Options) -> int:
    """Return how many bytes of a single document's text are not held out."""
    return num_bytes - round(num_bytes * options.validation)
