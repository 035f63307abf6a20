"""What a run says when it ends or stops."""

import math
import shlex
import statistics
from datetime import timedelta

import numpy as np

import checkpointing
from outside_in.data.tokenizer import bits_per_byte
from outside_in.reports.flops import mfu
from outside_in.runtime.devices import device_kind
from outside_in.storage.text import counted
from outside_in.training.state import TrainState


def describe_end(state: TrainState, *, is_finished: bool) -> list[str]:
    """Return lines: tokens, speed, losses, where the time went, the best checkpoint, what to type next."""
    if not state.records:
        return [state.time_budget.describe()]
    last = state.records.last
    lines = [
        f"trained {last['tokens_seen']:,} tokens in {state.global_step:,} of {counted(state.total_steps, 'step')}; "
        f"{timedelta(seconds=round(state.seconds))} in all",
        _speed(state),
        _losses(state),
        state.time_budget.describe(),
    ]
    found = checkpointing.find_checkpoints(state.run.checkpoints)
    if best := checkpointing.find_best(found):
        measure = "validation" if best.meta.get("val_loss") is not None else "training"
        lines.append(f"best    step {best.global_step:,}, {measure} loss {best.loss:.4f}: {best.path}")
    return lines + (next_lines(state) if is_finished else [])


def _speed(state: TrainState) -> str:
    """Return the speed of steps alone, which is that of the middle one, and of everything."""
    alone = state.tokens_per_step / max(float(np.median(state.records.column("seconds"))), 1e-9)
    share = mfu(alone / state.mesh.devices.size, state.model_config, device_kind(), state.config.precision)
    overall = state.records.last["tokens_seen"] / state.seconds
    of_peak = f", MFU {share:.1%}" if share else ""
    return f"speed   {alone:,.0f} tokens/s{of_peak} in steps alone; {overall:,.0f} tokens/s with all else"


def _losses(state: TrainState) -> str:
    newest = state.records.column("loss", state.global_step - state.period_start)
    losses = newest[~np.isnan(newest)].tolist()
    parts = [f"training {statistics.fmean(losses):.4f} (mean of {counted(len(losses), 'step')})"] if losses else []
    if (validation := state.records.last.get("val_loss")) is not None:
        bits = (
            f", {bits_per_byte(validation, state.bytes_per_token):.3f} bits per byte" if state.bytes_per_token else ""
        )
        parts.append(f"validation {validation:.4f} (perplexity {math.exp(min(validation, 700)):,.4g}{bits})")
    return f"loss    {'; '.join(parts) or 'never finite'}"


def next_lines(state: TrainState) -> list[str]:
    """Return what makes sense to type next."""
    run = shlex.quote(str(state.run.path))
    if state.config.objective == "a-to-a":
        programs = {"test_a_to_a.py": "repeats a poem"}
    else:
        programs = {"test_generation.py": "completes text", "evaluate.py": "judges it"}
    return [f"next    uv run {program} {run}  # {what}" for program, what in programs.items()]
