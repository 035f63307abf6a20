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
        self.started = self._since

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
        """Return one line, longest activity first, whose parts add up."""
        self.switch(self._what)
        total = sum(self._seconds.values())
        unit, show = (1, _clock) if total >= 60 else (10, lambda tenths: f"{tenths / 10:.1f} s")
        parts, so_far = [], 0.0
        for what, seconds in sorted(self._seconds.items(), key=lambda item: -item[1]):
            before, so_far = so_far, so_far + seconds
            shown = round(unit * so_far) - round(unit * before)  # rounded where it begins and ends: nothing is lost
            share = round(1000 * so_far / total) - round(1000 * before / total) if total else 0
            parts.append(f"{show(shown)} {what} ({share / 10:.1f}%)")
        return f"time    {show(round(unit * total))} since the start: {', '.join(parts)}"


def _clock(seconds: int) -> str:
    return str(timedelta(seconds=seconds))
