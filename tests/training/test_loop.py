"""The training loop: what it shows, and that nothing moves between host and device behind its back."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import pytest
from helpers import tiny_model_config

from outside_in import train_step
from outside_in.runtime import progress
from outside_in.storage.run_directory import RunDirectory
from outside_in.training import loop, run


@pytest.fixture
def train(call_program):
    return partial(call_program, "train")


@pytest.mark.parametrize(
    ("kind", "line", "shown"),
    [
        ("NVIDIA H200", r"peak    494\.5 TFLOP/s in float32, by https:", r"tokens/s, MFU \d+\.\d%\]"),
        ("cpu", r"compiling the training step", r"tokens/s\]"),
    ],
)
def test_the_progress_bar_shows_speed_and_mfu_where_the_peak_is_known(train, make_run, monkeypatch, kind, line, shown):
    for module in (loop, run):
        monkeypatch.setattr(module, "device_kind", lambda: kind)
    monkeypatch.setattr(progress.Progress, "is_bar", True)
    finished = train(make_run())
    assert re.search(line, finished.stdout) and ("peak" in finished.stdout) == (kind != "cpu")
    assert re.search(rf"loss of this step \d\.\d{{4}}, [\d,]+ {shown}", finished.stderr.splitlines()[-1])


def test_in_a_file_progress_is_a_line_now_and_then(train, make_run, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    finished = train(make_run())
    assert re.search(r"step \d+ of 12: loss of this step \d\.\d{4}, [\d,]+ tokens/s\n", finished.stdout)
    assert "\r" not in finished.stdout + finished.stderr and "step/s" not in finished.stderr
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1000)
    assert not re.search(r"step \d+ of 12:", train(make_run("other")).stdout)


@pytest.mark.parametrize(("per_call", "ahead"), [(1, 1), (4, 1), (4, 0)])
def test_nothing_moves_between_host_and_device_unasked(train, make_run, monkeypatch, per_call, ahead):
    """From the second step to the end of the run, only explicit `device_put` and `device_get` are allowed.

    On the CPU the guard sees what goes to the device, not what comes back.
    """
    call, calls = train_step.Compiled.__call__, 0
    monkeypatch.setattr(loop, "steps_ahead", lambda: ahead)

    def call_under_guard(compiled, *arguments):
        nonlocal calls
        calls += compiled._name == "training step"
        if calls == 2 * 4 // per_call:
            jax.config.update("jax_transfer_guard", "disallow")
        return call(compiled, *arguments)

    monkeypatch.setattr(train_step.Compiled, "__call__", call_under_guard)
    try:
        finished = train(make_run(train={"microbatches_per_call": per_call}))
    finally:
        jax.config.update("jax_transfer_guard", "allow")
    assert finished.returncode == 0, finished.stderr
    assert calls == 12 * 4 // per_call


def test_the_advice_after_rejections_has_the_overrides_of_the_run(tmp_path):
    snapshot = {"overrides": {"sample_prompt": "a b", "epochs": 2}}
    state = SimpleNamespace(run=RunDirectory(tmp_path), model_config=tiny_model_config(), snapshot=snapshot)
    assert loop.way_back(state).endswith(f"start again: uv run train.py {tmp_path} 'sample_prompt=a b' epochs=2")
