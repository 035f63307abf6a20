"""Atomic and durable writes of files and folders."""

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
    """Wait until a file's content or a folder's listing is durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Wait until everything in a folder is durable, itself last."""
    inside: Iterable[Path] = sorted(folder.rglob("*"), reverse=True)  # children before their folder
    for path in [*inside, folder]:
        fsync(path)


@contextlib.contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into, renamed to `folder` at the end.

    If the block fails, it is removed. Raises OSError when the name has been taken meanwhile.
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
    """Replace a file atomically.

    A reader sees the old or the new content. With `durable`, waits for the disk. Raises OSError, and leaves the old
    file, when it fails.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        if durable:
            fsync(temporary)
    if durable:
        fsync(path.parent)


def write_text(path: Path, content: str, *, durable: bool = False) -> None:
    """Replace a file by text, in UTF-8, as `write_bytes` does."""
    write_bytes(path, content.encode(), durable=durable)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces `path` at the end. If the block fails, it is removed."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def append_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Append all of the text, or raise OSError and append nothing."""
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


def replace_end(path: Path, start: int, text: str) -> None:
    """Replace what stands from byte `start` on, by one write. After an OSError the file is as it was."""
    content = text.encode()
    with path.open("r+b", buffering=0) as file:
        file.seek(start)
        old = file.read()
        file.seek(start)
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.seek(start)
            file.write(old)
            raise
        finally:
            file.truncate()


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Raise OSError for the disk errors of safetensors and TensorStore."""
    try:
        yield
    except Exception as error:
        if match := SYSTEM_ERROR.search(str(error)):
            code = int(match[1])
            raise OSError(code, os.strerror(code), str(path)) from error
        raise
