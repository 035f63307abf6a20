"""Progress: a bar on a terminal; in a file a line now and then."""

import sys
import time
from typing import Any

from tqdm import tqdm

from outside_in.runtime.log import log

SECONDS_BETWEEN_LINES = 60


class Progress(tqdm):
    """A bar of `tqdm` on a terminal. Elsewhere it logs a line each minute, which can be searched for."""

    is_bar: bool | None = None  # None: if standard error is a terminal

    def __init__(self, *args: Any, **options: Any) -> None:
        if self.is_bar is None:
            self.is_bar = sys.stderr.isatty()
        self._line_at = time.monotonic()
        super().__init__(*args, dynamic_ncols=True, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        if self.is_bar:
            return super().display(msg, pos)
        if time.monotonic() - self._line_at >= SECONDS_BETWEEN_LINES:
            self._line_at = float("inf")  # the log refreshes this, too
            done, total = (tqdm.format_sizeof(x) if self.unit_scale else f"{x:,}" for x in (self.n, self.total or 0))
            of_total = f" of {total}" if self.total else ""
            log.info(f"{self.unit} {done}{of_total}{': ' if self.postfix else ''}{self.postfix or ''}")
            self._line_at = time.monotonic()
        return None

    def clear(self, nolock: bool = False) -> None:
        if self.is_bar:
            super().clear(nolock)

    def close(self) -> None:
        self.leave = self.leave and self.is_bar
        super().close()
