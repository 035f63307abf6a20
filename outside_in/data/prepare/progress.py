"""The options of a preparation, and its progress."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outside_in.data.prepare.description import MAX_BYTES, SPLITS
from outside_in.data.prepare.documents import File, ReadOptions
from outside_in.data.prepare.encode import Source
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
    special_tokens: bool = False
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
    all_read: bool = False


def pinned(source: Source, progress_file: Path) -> Source:
    """Return a source at the saved revision, else at the newest."""
    if isinstance(source, File):
        return source
    try:
        saved = read_json(progress_file, MAX_BYTES)["command"]["sources"]
        versions = {each["name"]: each["version"] for each in saved}
    except (ValueError, KeyError, TypeError):
        versions = {}
    return source.at(versions[source.name]) if source.name in versions else source.at(source.newest_revision())


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    if old["sources"] != new["sources"]:
        return "sources (or they have changed since)"
    if old.get("tokenizer") != new["tokenizer"] and old["options"].get("tokenizer") == new["options"]["tokenizer"]:
        return "tokenizer (its file has changed since)"
    changed = [key for key in new["options"] if old["options"].get(key) != new["options"][key]]
    return f"options ({', '.join(changed)})"
