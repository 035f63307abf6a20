"""Files and folders that are on the disk for good, and whole or not there at all."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's content, or what a folder lists, outlives the machine's power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until every file and folder below is on the disk, the folder itself last."""
    inside: Iterable[Path] = sorted(folder.rglob("*"), reverse=True)  # children before their folder
    for path in [*inside, folder]:
        sync(path)


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into, which takes the name `folder` when the block has ended well; else it is removed.

    Raises OSError when that name is taken meanwhile.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder.parent))
    try:
        staging.chmod(0o755)
        yield staging
        sync_tree(staging)
        if folder.exists():  # a rename would replace an empty folder
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
        staging.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
