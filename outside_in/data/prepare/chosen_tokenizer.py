"""The tokenizer of a preparation: one that exists, or one trained on the training documents."""

import math
from collections.abc import Callable, Iterator, Sequence

from tiktoken_ext.openai_public import ENDOFTEXT

from outside_in.data.prepare.documents import Source
from outside_in.data.prepare.encode import digest_of
from outside_in.data.prepare.progress import Options
from outside_in.data.prepare.rows import Bad
from outside_in.data.prepare.split import TRAIN, split_of, training_bytes
from outside_in.data.tokenizer import Tokenizer, whole
from outside_in.data.tokenizer_files import load
from outside_in.data.train_tokenizer import check_vocab_size, train_tokenizer
from outside_in.runtime.log import log

MAX_CHARACTERS = 2**29  # of text that a tokenizer is trained on
CHARACTERS_PER_TOKEN = 10  # with --limit-tokens


def chosen_tokenizer(options: Options) -> Tokenizer | None:
    """Return the tokenizer that the options name; None if it is to be trained. Raises ValueError without one."""
    if not options.tokenizer.startswith(TRAIN):
        return load(options.tokenizer, options.end_of_text)
    check_vocab_size(_ids_to_train(options))
    if options.end_of_text not in (None, ENDOFTEXT):
        raise ValueError(
            f"--end-of-text {options.end_of_text}: a tokenizer that is trained ends a text with {ENDOFTEXT}"
        )
    return None


def _ids_to_train(options: Options) -> int:
    count = options.tokenizer.removeprefix(TRAIN)
    if not count.isdecimal():
        raise ValueError(f"--tokenizer {options.tokenizer}: expected {TRAIN}N, N being a number of ids such as 4096")
    return int(count)


def trained_tokenizer(
    sources: list[Source], options: Options, should_stop: Callable[[], bool], held_out: Sequence[Source] = ()
) -> Tokenizer:
    """Train a tokenizer on the training documents.

    Raises ValueError when their text supports fewer ids, and InterruptedError when it should stop.
    """
    vocab_size = _ids_to_train(options)
    log.info(f"training a tokenizer of {vocab_size:,} ids on the training documents")
    return train_tokenizer(training_texts(sources, options, should_stop, held_out), vocab_size)


def training_texts(
    sources: list[Source], options: Options, should_stop: Callable[[], bool], held_out: Sequence[Source] = ()
) -> Iterator[str]:
    """Yield the text that a tokenizer is trained on: that of the training documents, up to `MAX_CHARACTERS`.

    Without duplicates, it has no document of `held_out` either, validation text of its own.
    Raises InterruptedError when it should stop.
    """
    most = min(MAX_CHARACTERS, CHARACTERS_PER_TOKEN * (options.limit_tokens or math.inf))
    documents = characters = 0
    any_validation, last, only = not options.validation, "", ""  # the last document may be held out
    seen: set[bytes] = set()
    if options.deduplicate:
        texts = (text for source in held_out for text, _ in source.documents(options.reading, 0))
        seen.update(digest_of(text) for text in texts if isinstance(text, str))
    for source in sources:
        for text, _ in source.documents(options.reading, 0):
            if should_stop():
                raise InterruptedError
            if not text or isinstance(text, Bad):
                continue
            digest = digest_of(text)
            if options.deduplicate:
                if digest in seen:
                    continue
                seen.add(digest)
            documents += 1
            if split_of(digest, options) == "validation":
                any_validation, only = True, text
                continue
            yield from pieces(last, options)
            last = text
            characters += len(text)
            if characters > most:
                return
    if documents == 1:  # of a single one, only the end is held out, wherever chance has put it
        parts = pieces(last or only, options)
        rest = training_bytes(sum(len(piece.encode()) for piece in parts), options)
        for piece in parts:
            content = piece.encode()[:rest]
            rest -= len(content)
            yield content.decode(errors="ignore")
    elif any_validation or not round(documents * options.validation):
        yield from pieces(last, options)


def pieces(text: str, options: Options) -> list[str]:
    """Return a text as it is tokenized: between the ends of texts in it, if they count as such."""
    return whole(text).split(ENDOFTEXT) if options.special_tokens else [whole(text)]
