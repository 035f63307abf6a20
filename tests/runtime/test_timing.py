"""Where the time went: every second is booked once."""

import re
import time

import pytest

from outside_in.runtime.timing import TimeBudget


@pytest.fixture
def wait(monkeypatch):
    """Let seconds pass on the clock."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def pass_by(seconds):
        now[0] += seconds

    return pass_by


def test_every_second_is_booked_once_also_of_things_inside_each_other(wait):
    watch = TimeBudget("starting")
    wait(2)
    watch.switch("steps")
    wait(20)
    with watch.during("checkpoints"):
        wait(1)
        with watch.during("validation"):
            wait(14)
        wait(3)
    wait(60)
    expected = "0:01:20 steps (80.0%), 0:00:14 validation (14.0%), 0:00:04 checkpoints (4.0%), 0:00:02 starting (2.0%)"
    assert watch.describe() == watch.describe() == f"time    0:01:40 since the start: {expected}"


def test_time_goes_back_to_what_was_interrupted_also_after_an_error(wait):
    watch = TimeBudget("steps")
    with pytest.raises(OSError), watch.during("checkpoints"):
        raise OSError
    wait(9)
    assert watch.switch("compiling") == "steps"
    assert "9.0 s steps (100.0%)" in watch.describe()


def test_no_time_at_all_is_described(wait):
    assert TimeBudget("starting").describe() == "time    0.0 s since the start: 0.0 s starting (0.0%)"


@pytest.mark.parametrize(("longest", "total"), [(1.04, "5.2 s"), (61.4, "0:01:06")])
def test_the_parts_add_up_to_the_whole(wait, longest, total):
    watch = TimeBudget("a")
    for what, seconds in {"b": longest, "c": 1.04, "d": 1.04, "e": 1.04, "f": 1.04}.items():
        wait(seconds)
        watch.switch(what)
    whole, _, parts = watch.describe().removeprefix("time    ").partition(" since the start: ")
    assert whole == total
    found = [re.match(r"(?:0:0(\d):)?([\d.]+)", part) for part in (whole, *parts.split(", "))]
    seconds = [60 * int(match[1] or 0) + float(match[2]) for match in found]
    assert sum(seconds[1:]) == pytest.approx(seconds[0])
    assert sum(float(share) for share in re.findall(r"([\d.]+)%", parts)) == pytest.approx(100)
