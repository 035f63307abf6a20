"""What is in a folder of token files: counts, leakage, sources.

Counted from the token files, which may be larger than memory, and compared with `data.json`.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from outside_in.data.prepare import leakage
from outside_in.data.prepare.leakage import Progress, find_leakage, show_nothing
from outside_in.data.token_files import entropy, token_slices
from outside_in.data.tokenizer import Tokenizer, gpt2
from outside_in.data.tokenizer_files import DESCRIPTION, folder_tokenizer
from outside_in.data.tokenizer_files import MAX_DESCRIPTION_BYTES as MAX_BYTES
from outside_in.storage.strict_json import read_json
from outside_in.storage.text import counted

SPLITS = ("train", "validation")
SAMPLE_TOKENS = 60
MAX_SOURCE_LINES = 10  # more would push the summary off the screen
MAX_REASONS = 12
SOURCE_FACTS = {
    "split": "for {:.64}",
    "documents": "{:,} documents",
    "tokens": "{:,} tokens",
    "share": "{:.1%} of all tokens",
    "revision": "revision {:.64}",
    "size_bytes": "{:,} bytes",
    "sha256": "sha256 {:.64}",
}


def describe(folder: Path, *, progress: Progress = show_nothing) -> tuple[dict[str, Any], list[str]]:
    """Count what is in a folder of token files, and describe it.

    Returns `{"splits": {"train": …, "validation": …}, "leakage": …}` with the facts of `describe_split` and
    `find_leakage` (no validation and leakage None where there is no validation file); and the lines to print, which
    include `data.json`'s, and a `WARNING` for every number in which it differs.
    `progress` is that of `find_leakage`, which takes most of the time.
    Raises ValueError when a token file (see `describe_split`) or `data.json` is malformed.
    """
    recorded = _read_recorded(folder / DESCRIPTION) if (folder / DESCRIPTION).exists() else {}
    made_with = folder_tokenizer(folder) or gpt2()
    train, validation = paths = [folder / f"{split}.safetensors" for split in SPLITS]
    splits = {path.stem: describe_split(path, made_with) for path in paths if path == train or path.exists()}
    leaked = find_leakage(train, validation, progress=progress) if "validation" in splits else None
    facts = {"splits": splits, "leakage": leaked}
    return facts, [*lines(recorded | facts), *_differences(recorded, facts), f"sample {_sample(train, made_with)!r}"]


def lines(description: dict[str, Any]) -> list[str]:
    """Return the lines that describe `data.json`, or what `describe` counted."""
    leaked, dropped = description["leakage"], description.get("duplicates_dropped")
    facts = [
        *(_split_line(split, counts) for split, counts in description["splits"].items()),
        _leakage_line(leaked) if leaked else "leakage unknown: there is no validation file",
    ]
    if "format" not in description:
        return [*facts, f"no {DESCRIPTION}: it is not known where these tokens come from"]
    return [
        *facts,
        *_source_lines(description["sources"]),
        f"tokenizer {_printable(description['tokenizer'])}{_sha256(description)}, "
        f"seed {_printable(description['seed'])}",
        f"options {', '.join(_option_texts(description['options'])) or 'none'}",
        "duplicates: not checked" if dropped is None else f"duplicates dropped: {dropped:,}",
        *_dropped_lines(description),
    ]


def describe_split(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Count the tokens and documents of a token file.

    Returns `tokens`; `documents`, each ended by the end of a text or of the file; `longest_document` in
    tokens, without its end; `bytes` of text; and `unigram_entropy` in nats, the loss of a model that knows only how
    often each token occurs.
    Raises ValueError when there is no one-dimensional integer tensor `tokens`, or an id that the tokenizer lacks.
    """
    tokens = longest = num_bytes = 0
    last_end = -1  # index of the last end of a text
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for start, ids in token_slices(path, tokenizer.vocab_size, leakage.SLICE_TOKENS):
        counts += np.bincount(ids, minlength=counts.size)
        tokens += ids.size
        num_bytes += tokenizer.count_bytes(ids, is_start=last_end == start - 1)
        ends = np.concatenate([[last_end], start + np.flatnonzero(ids == tokenizer.end_of_text)])
        longest = max(longest, int(np.diff(ends).max(initial=1)) - 1)
        last_end = int(ends[-1])
    unfinished = tokens - 1 - last_end  # tokens of a last document without an end
    return {
        "tokens": tokens,
        "documents": int(counts[tokenizer.end_of_text]) + (unfinished > 0),
        "longest_document": max(longest, unfinished),
        "bytes": num_bytes,
        "unigram_entropy": entropy(counts),
    }


def recorded_leakage(folder: Path) -> float | None:
    """Return the share of validation that occurs in training, from `data.json`.

    Returns None when it has no such number.
    """
    try:
        share = _read_recorded(folder / DESCRIPTION)["leakage"]["share"]
    except (ValueError, KeyError, TypeError):  # training does not depend on this file
        return None
    return float(share) if isinstance(share, int | float) and 0 <= share <= 1 else None


def _sample(path: Path, tokenizer: Tokenizer) -> str:
    """Decode the start of the first document that is not empty."""
    _, ids = next(token_slices(path, tokenizer.vocab_size, leakage.SLICE_TOKENS), (0, np.array([], np.uint16)))
    started = itertools.dropwhile(lambda token: token == tokenizer.end_of_text, ids.tolist())
    document = itertools.takewhile(lambda token: token != tokenizer.end_of_text, started)
    return tokenizer.decode(list(itertools.islice(document, SAMPLE_TOKENS)))


# What data.json says


def _sha256(description: dict[str, Any]) -> str:
    digest = description.get("tokenizer_sha256")
    return f" (sha256 {_printable(digest)[:64]})" if digest else ""


def _read_recorded(path: Path) -> dict[str, Any]:
    recorded = read_json(path, MAX_BYTES)
    if recorded.get("format") != 1:
        raise ValueError(f"{path}: expected format 1, got {_printable(recorded.get('format'))}; prepare the data again")
    try:
        lines(recorded)  # says all that is in it
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__} {_printable(error)}"
        raise ValueError(
            f"{path}: expected what prepare_data.py writes, got another form ({reason}); prepare the data again"
        ) from None
    return recorded


def _source_lines(sources: list[dict[str, Any]]) -> list[str]:
    if len(sources) > MAX_SOURCE_LINES:
        size = sum(source.get("size_bytes") or 0 for source in sources)
        return [f"sources: {len(sources):,}, {size:,} bytes, listed in {DESCRIPTION}"]
    return [f"source {_printable(source['name'])}: {_source_facts(source)}" for source in sources]


def _dropped_lines(description: dict[str, Any]) -> Iterator[str]:
    """Yield what was left out: documents, and files."""
    if empty := description.get("empty_dropped"):
        yield f"empty documents dropped: {empty:,}"
    if bad := description.get("bad_dropped"):
        yield f"bad documents dropped: {bad:,}, the first: {_printable(description.get('first_bad'))}"
    if left_out := description.get("left_out"):
        yield f"left out: {listed_counts(left_out)}"


def listed_counts(counts: Mapping[str, int]) -> str:
    """Return in words how much was left out, by suffix or reason, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    texts = [f"{count:,} {_printable(what)}" for what, count in ordered[:MAX_REASONS]]
    rest = sum(count for _, count in ordered[MAX_REASONS:])
    return ", ".join([*texts, f"{rest:,} others"] if rest else texts)


def _source_facts(source: dict[str, Any]) -> str:
    known = {name: source[name] for name in SOURCE_FACTS if source.get(name) is not None}
    texts = {name: _printable(SOURCE_FACTS[name].format(value)) for name, value in known.items()}
    if known.get("documents") == 1:
        texts["documents"] = "1 document"
    return ", ".join(texts.values())


def _option_texts(options: dict[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _option_texts(value)
        else:
            yield _printable(f"{name}={value}")


def _differences(recorded: dict[str, Any], facts: dict[str, Any]) -> Iterator[str]:
    """Yield a warning for every number of `data.json` that is wrong."""
    old, new = (content.get("splits", {}) | {"leakage": content.get("leakage")} for content in (recorded, facts))
    for part in (*SPLITS, "leakage"):
        if old.get(part) and not new.get(part):
            yield f"WARNING {DESCRIPTION}: has numbers of {part}, but there is no validation file"
        for name, value in (new.get(part) or {}).items():
            if not _same((old.get(part) or {}).get(name, value), value):
                yield (
                    f"WARNING {DESCRIPTION}: {part} has {name} {_format(old[part][name])}, the token files have "
                    f"{_format(value)}; they are not those that were prepared"
                )


def _same(recorded: Any, value: float) -> bool:
    both_floats = isinstance(recorded, float) and isinstance(value, float)
    return recorded == value or (both_floats and math.isclose(recorded, value, rel_tol=1e-6))


# Lines


def _split_line(split: str, counts: dict[str, Any]) -> str:
    return (
        f"{split}: {counts['tokens']:,} tokens in {counted(counts['documents'], 'document')}, "
        f"mean length {counts['tokens'] / max(1, counts['documents']):,.1f}, longest {counts['longest_document']:,}, "
        f"{_bytes_per_token(counts)}"
        f"unigram entropy {counts['unigram_entropy']:.3f} nats"
    )


def _bytes_per_token(counts: dict[str, Any]) -> str:
    return f"{counts['bytes'] / max(1, counts['tokens']):.2f} bytes a token, " if "bytes" in counts else ""


def _leakage_line(leaked: dict[str, Any]) -> str:
    return (
        f"leakage {leaked['found']:,} of {leaked['sequences']:,} validation sequences of {leaked['sequence_length']} "
        f"tokens ({leaked['share']:.1%}) occur in the training tokens"
    )


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.6g}"
    return f"{value:,}" if isinstance(value, int) else _printable(value)


def _printable(value: Any) -> str:
    """Return a short printable form of any value."""
    return repr(str(value))[1:-1][:200]
