"""Finds duplicate documents.

Digests are on the disk: ten million take less than a gigabyte.
"""

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class SeenDocuments:
    """The digests of all documents so far, on the disk."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path)
        self._do("CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY, first INTEGER) WITHOUT ROWID")

    def add(self, digest: bytes, index: int) -> bool:
        """Return whether document `index` is the first with this digest.

        It still is when it is added again after a kill.
        """
        self._do("INSERT OR IGNORE INTO seen VALUES (?, ?)", digest, index)
        [first] = self._do("SELECT first FROM seen WHERE digest = ?", digest).fetchone()
        return first == index

    def commit(self) -> None:
        with _full_disk_as_elsewhere():
            self._database.commit()

    def close(self) -> None:
        self._database.close()

    def _do(self, command: str, *values: Any) -> sqlite3.Cursor:
        with _full_disk_as_elsewhere():
            return self._database.execute(command, values)


@contextmanager
def _full_disk_as_elsewhere() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
