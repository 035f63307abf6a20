"""The training loop: what it shows."""

import re
from functools import partial

import pytest

import loop


@pytest.fixture
def train(call_program):
    return partial(call_program, "train")


@pytest.mark.parametrize(
    ("kind", "line", "shown"),
    [
        ("NVIDIA H200", r"peak    494\.5 TFLOP/s in float32, by https:", r"tokens/s, MFU \d+\.\d%\]"),
        ("cpu", r"peak    not known for this device \(cpu\)", r"tokens/s\]"),
    ],
)
def test_the_progress_bar_shows_speed_and_mfu_where_the_peak_is_known(train, make_run, monkeypatch, kind, line, shown):
    monkeypatch.setattr(loop, "device_kind", lambda: kind)
    finished = train(make_run())
    assert re.search(line, finished.stdout)
    assert re.search(rf"loss \d\.\d{{4}}, [\d,]+ {shown}", finished.stderr.splitlines()[-1])
