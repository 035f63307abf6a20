"""Where the time of a run goes: seconds by what its main thread is busy with, or waits for."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta


class TimeBudget:
    """Books every second for one thing, from its making on; a thing inside another one interrupts that."""

    def __init__(self, what: str) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._what, self._since = what, time.monotonic()

    def switch(self, what: str) -> str:
        """Book the time until now, and from now on for `what`; return what it was booked for."""
        before, now = self._what, time.monotonic()
        self._seconds[before] += now - self._since
        self._what, self._since = what, now
        return before

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        before = self.switch(what)
        try:
            yield
        finally:
            self.switch(before)

    def describe(self) -> str:
        """Return one line, what took longest first."""
        self.switch(self._what)
        total = max(sum(self._seconds.values()), 1e-9)
        shares = (
            f"{timedelta(seconds=round(seconds))} {what} ({seconds / total:.1%})"
            for what, seconds in sorted(self._seconds.items(), key=lambda item: -item[1])
        )
        return f"time    {', '.join(shares)}"
