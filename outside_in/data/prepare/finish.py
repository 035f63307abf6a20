"""The end of a preparation: what is held out, what `data.json` says, and what the user should know."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from outside_in.data.prepare.description import SPLITS, describe_split
from outside_in.data.prepare.documents import NAMED, File
from outside_in.data.prepare.files import with_windows_line_ends
from outside_in.data.prepare.leakage import find_leakage
from outside_in.data.prepare.split import start_of_held_out
from outside_in.data.token_files import TokenWriter, written_tokens
from outside_in.runtime.log import log
from outside_in.storage.text import counted

if TYPE_CHECKING:
    from outside_in.data.prepare.pipeline import Preparation


def hold_out_the_end(preparation: "Preparation") -> None:
    """Move the last training tokens to validation, where no document fell; of a single document, always its end."""
    writers, documents = preparation.writers, sum(s["documents"] for s in preparation.progress.per_source)
    if len(writers) == 1 or preparation.num_for_validation or not documents:
        return
    if documents == 1 and not writers["train"].num_tokens:  # chance has put all of it into validation
        _move(preparation, "validation", "train", 0)
    if writers["validation"].num_tokens:
        return
    writers["train"].fsync()
    tokens = written_tokens(writers["train"].path)
    start = start_of_held_out(tokens, documents, preparation.options, preparation.tokenizer)
    if start is None:
        return
    what = "one document, whose end is" if documents == 1 else "few documents, of which the last is"
    log.info(f"{what} for validation: {counted(len(tokens) - start, 'token')} of {len(tokens):,}")
    _move(preparation, "train", "validation", start)


def _move(preparation: "Preparation", split: str, other: str, start: int) -> None:
    """Move the tokens of a split from `start` on to the other one."""
    writer = preparation.writers[split]
    writer.fsync()
    preparation.writers[other].append(written_tokens(writer.path)[start:])
    writer.num_tokens = start
    preparation.save_progress()  # before tokens are cut off: a kill loses none
    writer.close()
    preparation.writers[split] = TokenWriter(writer.path, start)


def lacking(preparation: "Preparation", split: str) -> str:
    """Return the complaint about a split without documents."""
    progress = preparation.progress
    count = sum(source["documents"] for source in progress.per_source)
    if preparation.num_for_validation or not count:
        dropped = f"{progress.empty:,} empty, {progress.bad:,} bad, {progress.duplicates:,} duplicates"
        return f"{preparation.out}: expected documents for {split}, got none ({dropped}); give it other text"
    remedy = f"--validation {min(50, -(-300 // count))}%, split the text with --separator, or use --validation 0"
    if split == "train":
        remedy = f"another --seed, or a smaller --validation than {preparation.options.validation:.2%}"
    return f"{preparation.out}: none of {counted(count, 'document')} is in {split}; use {remedy}"


def record(preparation: "Preparation", show: Callable[[int], None]) -> dict[str, Any]:
    """Return what `data.json` says, and tell the user of what may not be as meant."""
    options, progress, tokenizer = preparation.options, preparation.progress, preparation.tokenizer
    paths = {split: preparation.folder / f"{split}.safetensors" for split in preparation.splits}
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(lambda source: source.sha256(), preparation.sources))
    counts = progress.per_source  # a limit may have left the last sources out
    total = sum(source["tokens"] for source in counts)
    sources = [
        {"name": source.name, "revision": source.revision, "size_bytes": source.size_bytes, "sha256": sha256}
        | ({"split": SPLITS[i < preparation.num_for_validation]} if preparation.num_for_validation else {})
        | count
        | {"share": count["tokens"] / total}
        for i, (source, sha256, count) in enumerate(zip(preparation.sources, hashes, counts))
    ]
    _tell_of_same_files(sources)
    if options.reading.separator:
        _tell_of_separator(preparation)
    if progress.ends_in_text and options.special_tokens is None:
        log.info(
            f"notice: {tokenizer.end_token!r} is in the text {counted(progress.ends_in_text, 'time')}, as ordinary "
            "text; --special-tokens reads it as the token that ends a text, --no-special-tokens leaves it so "
            "without a notice"
        )
    return {
        "format": 1,
        "sources": sources,
        "splits": {split: describe_split(path, tokenizer) for split, path in paths.items()},
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "end_of_text": tokenizer.end_token,
        "seed": options.seed,
        "options": asdict(options),
        "duplicates_dropped": progress.duplicates if options.deduplicate else None,
        "empty_dropped": progress.empty,
        "bad_dropped": progress.bad,
        "first_bad": progress.first_bad,
        "left_out": preparation.left_out,
        "leakage": find_leakage(*paths.values(), progress=show) if len(paths) == 2 else None,
    }


def _tell_of_same_files(sources: list[dict[str, Any]]) -> None:
    """Warn of files with the same content."""
    first: dict[str, str] = {}
    same = []
    for source in sources:
        if source["sha256"] and (known := first.setdefault(source["sha256"], source["name"])) != source["name"]:
            same.append(f"{source['name']} is the same as {known}")
    if same:
        what = f"{counted(len(same), 'file')} with the content of another"
        log.warning(f"{what}: {_some(same)}; leave one out, or use --deduplicate")


def _tell_of_separator(preparation: "Preparation") -> None:
    """Warn of a separator that occurs nowhere, or not in the form of a file's line ends."""
    reading, counts = preparation.options.reading, preparation.progress.per_source
    separator = reading.separator or ""
    windows = with_windows_line_ends(separator)
    texts = [separator.encode()] + ([windows.encode()] if windows else [])
    plain, without, other = 0, 0, []
    for source, count in zip(preparation.sources, counts):
        if not isinstance(source, File) or source.format(reading).kind != "text":
            continue
        plain += 1
        if count["documents"] <= 1:
            found, *found_windows = source.contains(texts)
            without += not found
            if not found and any(found_windows):
                other.append(source.name)
    if other:
        log.warning(
            f"--separator {separator!r} occurs nowhere in {_some(other)}, but {windows!r} does: these have Windows "
            f"line ends (CRLF); use --separator {windows!r}, or convert them with dos2unix"
        )
    elif not plain:
        log.warning(f"--separator {separator!r} has split nothing: it is for plain text, and there is none")
    elif without == plain:
        log.warning(
            f"--separator {separator!r} occurs nowhere in {counted(plain, 'file')} of plain text; look at what "
            r"separates the documents (in a file with Windows line ends, CRLF, \n is \r\n)"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED:,} more" if len(names) > NAMED else "")
