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
    assert "0:00:09 steps (100.0%)" in watch.describe()


def test_no_time_at_all_is_described(wait):
    assert TimeBudget("starting").describe() == "time    0:00:00 since the start: 0:00:00 starting (0.0%)"


def test_the_parts_add_up_to_the_whole(wait):
    watch = TimeBudget("a")
    for what, seconds in {"b": 1.4, "c": 1.4, "d": 1.4, "e": 0.4}.items():
        wait(seconds)
        watch.switch(what)
    total, _, parts = watch.describe().removeprefix("time    ").partition(" since the start: ")
    assert total == "0:00:05"
    assert sum(int(part.split(":")[2][:2]) for part in parts.split(", ")) == 5
    assert sum(float(share) for share in re.findall(r"([\d.]+)%", parts)) == pytest.approx(100)
