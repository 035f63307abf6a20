"""Files and folders that are on the disk for good, and whole or not there at all."""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

SYSTEM_ERROR = re.compile(r"os[ _]error(?: |_code=')(\d+)")  # as safetensors and TensorStore report it


def fsync(path: Path) -> None:
    """Wait until a file's content, or what a folder lists, outlives the machine's power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Wait until every file and folder below is on the disk, the folder itself last."""
    inside: Iterable[Path] = sorted(folder.rglob("*"), reverse=True)  # children before their folder
    for path in [*inside, folder]:
        fsync(path)


@contextlib.contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into, which takes the name `folder` when the block has ended well; else it is removed.

    Raises OSError when that name is taken meanwhile.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder.parent))
    try:
        staging.chmod(0o755)
        yield staging
        fsync_tree(staging)
        if folder.exists():  # a rename would replace an empty folder
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
        staging.rename(folder)
        fsync(folder.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_bytes(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Replace a file by one of this content; a reader sees the old one or the new one, whole.

    With `durable` it outlives the machine's power from now on. Raises OSError, and leaves the old one, when it fails.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        if durable:
            fsync(temporary)
    if durable:
        fsync(path.parent)


def write_text(path: Path, content: str, *, durable: bool = False) -> None:
    write_bytes(path, content.encode(), durable=durable)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name to write to, which replaces `path` when the block has ended well; else what is there is removed."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def append_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Append the whole text to a file, or nothing of it and raise OSError."""
    content = text.encode()
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            if durable:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Raise OSError for what native code of safetensors and TensorStore says of the disk."""
    try:
        yield
    except Exception as error:
        if match := SYSTEM_ERROR.search(str(error)):
            code = int(match[1])
            raise OSError(code, os.strerror(code), str(path)) from error
        raise
