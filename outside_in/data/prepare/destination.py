"""The folder to create: its name, the disk's space, its lock."""

import fcntl
import shutil
from pathlib import Path
from typing import TextIO

from outside_in.data.prepare.compression import named_compression
from outside_in.data.prepare.description import DESCRIPTION, SPLITS
from outside_in.data.prepare.documents import Source
from outside_in.data.prepare.formats import PARQUET, suffix_of
from outside_in.data.tokenizer import TOKENIZER_FILE

PREPARING = ".preparing-"  # before the name of a folder that is not complete
PROGRESS_FILE, LOCK = "progress.json", "lock"
BYTES_PER_TOKEN = 4.5  # of English
COMPRESSION = 3.0


def check_place(out: Path, overwrite: bool) -> None:
    """Raise ValueError unless a folder of token files may be created here.

    Only a folder of token files is ever replaced.
    """
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise ValueError(f"{out}: expected a new name or a folder, got a file or a link; use another name")
    known = {f"{split}.safetensors" for split in SPLITS} | {DESCRIPTION, TOKENIZER_FILE, PROGRESS_FILE, LOCK}
    if others := sorted({path.name for path in out.iterdir()} - known):
        raise ValueError(f"{out}: already exists and holds other files, such as {others[0]!r}; use another name")
    if not overwrite:
        raise ValueError(f"{out}: already exists; use --overwrite, or another name")


def check_space(out: Path, sources: list[Source], limit_tokens: int | None, copies: int) -> None:
    """Raise ValueError when the disk clearly has too little space."""
    text_bytes = sum(
        (source.size_bytes or 0) * (COMPRESSION if _is_compressed(source.name) else 1) for source in sources
    )
    tokens = min(text_bytes / BYTES_PER_TOKEN, limit_tokens or float("inf"))
    needed = 2 * tokens * copies
    parent = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ValueError(
            f"{out}: expected about {needed / 2**30:.2f} GiB of free disk space, got {free / 2**30:.2f} GiB; "
            "free some, use another disk, or use --limit-tokens"
        )


def unfinished_folders(out: Path) -> list[Path]:
    """List the hidden folders of other preparations beside this one that no process works on."""
    others = []
    for folder in sorted(out.absolute().parent.glob(f"{PREPARING}*")):
        if folder.name != f"{PREPARING}{out.name}" and (folder / LOCK).is_file():
            try:
                lock(folder / LOCK, folder).close()
            except (OSError, ValueError):
                continue
            others.append(folder)
    return others


def _is_compressed(name: str) -> bool:
    return named_compression(name) is not None or suffix_of(name) in PARQUET


def lock(path: Path, out: Path) -> TextIO:
    """Lock a file for this process. Raises ValueError, naming `out`, when another process holds it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{out}: is being prepared by another process; wait for it or stop it") from None
    return file
