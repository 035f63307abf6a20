"""The options of a preparation, and its progress."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from outside_in.data.prepare.description import MAX_BYTES, SPLITS
from outside_in.data.prepare.documents import File, ReadOptions, Source
from outside_in.data.tokenizer import Tokenizer
from outside_in.storage.strict_json import read_json


@dataclass(frozen=True)
class Options:
    """The options that decide, with the sources, which tokens come out."""

    reading: ReadOptions
    tokenizer: str = "gpt2"  # or bytes, a path, train:N
    end_of_text: str | None = None  # a token; None: the tokenizer's own
    validation: float = 0.01  # share of documents
    limit_tokens: int | None = None
    shuffle: bool = False
    deduplicate: bool = False
    special_tokens: bool | None = None  # None: not asked for, so a notice tells of such text
    seed: int = 42


@dataclass
class Progress:
    """What is on the disk, and which documents come next."""

    command: dict[str, Any]
    source: int = 0  # the one that is being read
    documents_of_source: int = 0  # that are done
    documents: int = 0  # that are done, of all sources, dropped ones included
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    per_source: list[dict[str, int]] = field(default_factory=list)
    duplicates: int = 0
    empty: int = 0  # documents
    bad: int = 0  # documents
    first_bad: str | None = None
    ends_in_text: int = 0  # how often the token that ends a text is in the text of documents
    all_read: bool = False


def command_of(options: Options, sources: list[Source], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return what must be the same for a preparation to be resumed.

    `skip_bad` is not in it: without it, an error stops before the first bad document.
    """
    reading = {name: value for name, value in asdict(options.reading).items() if name != "skip_bad"}
    same = asdict(options) | {"reading": reading, "special_tokens": bool(options.special_tokens)}
    return {
        "options": same,
        "sources": [{"name": source.name, "version": source.version} for source in sources],
        "tokenizer": tokenizer and tokenizer.identity,
    }


def pinned(sources: list[Source], progress_file: Path) -> list[Source]:
    """Return the sources, those of the Hub at the saved revision, else at the newest: one for each dataset."""
    try:
        saved = read_json(progress_file, MAX_BYTES)["command"]["sources"]
        versions = {each["name"]: each["version"] for each in saved}
    except (ValueError, KeyError, TypeError):
        versions = {}
    newest: dict[str, str | None] = {}
    pinned: list[Source] = []
    for source in sources:
        if isinstance(source, File):
            pinned.append(source)
        elif source.name in versions:
            pinned.append(source.at(versions[source.name]))
        else:
            if source.dataset not in newest:
                newest[source.dataset] = source.newest_revision()
            pinned.append(source.at(newest[source.dataset]))
    return pinned


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    if old["sources"] != new["sources"]:
        return "sources (or they have changed since)"
    if old.get("tokenizer") != new["tokenizer"] and old["options"].get("tokenizer") == new["options"]["tokenizer"]:
        return "tokenizer (its file has changed since)"
    changed = [key for key in new["options"] if old["options"].get(key) != new["options"][key]]
    changed += ["validation text"] if old.get("validation") != new["validation"] else []
    return f"options ({', '.join(changed)})"
