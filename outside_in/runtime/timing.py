"""Where the time of a run goes, by its main thread's activities."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta


class TimeBudget:
    """Books every second, from its creation, for one activity."""

    def __init__(self, what: str) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._what, self._since = what, time.monotonic()

    def switch(self, what: str) -> str:
        """Book the time from now on for `what`; return the activity before."""
        before, now = self._what, time.monotonic()
        self._seconds[before] += now - self._since
        self._what, self._since = what, now
        return before

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Book the time of the block for `what`."""
        before = self.switch(what)
        try:
            yield
        finally:
            self.switch(before)

    def describe(self) -> str:
        """Return one line, longest activity first."""
        self.switch(self._what)
        total = max(sum(self._seconds.values()), 1e-9)
        shares = (
            f"{timedelta(seconds=round(seconds))} {what} ({seconds / total:.1%})"
            for what, seconds in sorted(self._seconds.items(), key=lambda item: -item[1])
        )
        return f"time    {', '.join(shares)}"
