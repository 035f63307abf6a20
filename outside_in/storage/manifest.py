"""`manifest.json`: size and SHA-256 of every other file of a folder."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from outside_in.storage.strict_json import read_json

MANIFEST_FILE = "manifest.json"


def write(folder: Path) -> None:
    """Write the manifest of a folder that is otherwise complete."""
    described = {file: _describe(folder / file) for file in _files(folder)}
    (folder / MANIFEST_FILE).write_text(json.dumps(described, indent=2) + "\n")


def check(folder: Path, required: Iterable[str] = ()) -> None:
    """Compare every file that the manifest lists with it. Raises ValueError that names the first bad file.

    The manifest must list the `required` ones. Plain files that it does not list, as operating systems leave them, do
    not count; links and devices do.
    """
    try:
        found = set(_files(folder))
        described = read_json(folder / MANIFEST_FILE)
        expected = {file: (entry["size"], entry["sha256"]) for file, entry in described.items()}
    except (OSError, RecursionError) as error:
        raise ValueError(f"{folder}: cannot be listed ({type(error).__name__})") from error
    except (KeyError, TypeError):
        raise ValueError(
            f"{folder / MANIFEST_FILE}: expected size and sha256 of every file, got something else"
        ) from None
    for file in found | expected.keys():
        if not file.isprintable() or len(file) > 1000:
            raise ValueError(f"{folder}: expected printable file names, got {file[:100]!r}")
    if lacking := sorted(set(required) - expected.keys()):
        raise ValueError(f"{folder / MANIFEST_FILE}: does not list {lacking[0]}")
    for file in sorted(found):
        if (folder / file).is_symlink() or not (folder / file).is_file():  # reading a pipe would wait for its writer
            raise ValueError(f"{folder / file}: is a link or a device, expected a plain file")
    if missing := sorted(expected.keys() - found):  # what lies elsewhere is not there either
        raise ValueError(f"{folder / missing[0]}: missing")
    for file, (size, digest) in expected.items():
        try:
            is_whole = (folder / file).stat().st_size == size and _describe(folder / file)["sha256"] == digest
        except OSError as error:
            raise ValueError(f"{folder / file}: unreadable ({error.strerror})") from error
        if not is_whole:
            raise ValueError(f"{folder / file}: content differs from the manifest")


def check_alone(path: Path) -> None:
    """Compare one file with the manifest beside it, if any. Raises ValueError when they differ."""
    described = path.with_name(MANIFEST_FILE)
    if described.exists() and read_json(described).get(path.name) != _describe(path):
        raise ValueError(f"{path}: content differs from the manifest; use an earlier checkpoint")


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
