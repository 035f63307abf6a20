"""The training loop."""

import math
import time
import zlib
from typing import NamedTuple

import jax

import checkpointing
from outside_in.data.loader import Batch, place_batch
from outside_in.diagnostics import memory
from outside_in.diagnostics.rejections import record_rejection
from outside_in.norms_by_layer import norms_record
from outside_in.overrides import as_arguments, train_line
from outside_in.reports.flops import mfu
from outside_in.runtime import processes
from outside_in.runtime.devices import device_kind
from outside_in.runtime.log import log
from outside_in.runtime.progress import Progress
from outside_in.runtime.signals import StopRequest
from outside_in.storage.metrics import finite
from outside_in.storage.records import Record
from outside_in.train_step import Compiled, StepReport, compile_train_step, mean_loss_of_calls, steps_ahead
from outside_in.training.checkpoint_writer import CheckpointWriter
from outside_in.training.metrics_copies import MetricsCopies
from outside_in.training.monitor import StepMonitor
from outside_in.training.state import TrainState, write_metrics_if_possible


class StartedStep(NamedTuple):
    """A global step whose reports are still on the device."""

    global_step: int
    reports: list[StepReport]
    data_crc32: int


def train(state: TrainState, stop: StopRequest, monitor: StepMonitor) -> None:
    """Train to the end, or until a stop is asked for.

    The last step is saved either way. Raises RuntimeError, with everything saved, when too many updates in a row were
    rejected or a check failed.
    """
    total, seed_key = state.total_steps, jax.random.key(state.config.seed)
    batch, checksum = next_batch(state)
    step = compile_step(state, batch[0], seed_key)
    in_flight: list[StartedStep] = []
    is_stuck, finding = False, None
    with (
        MetricsCopies(state) as copies,
        CheckpointWriter(state, lambda: bool(stop)) as writer,
        Progress(
            total=total,
            initial=state.global_step,
            unit="step",
            disable=not processes.is_main_process(),
        ) as bar,
    ):
        if state.needs_validation:
            writer.save(is_milestone=True)
        while state.global_step < total and not stop and not is_stuck:
            if finding := monitor.before_step(batch, seed_key):
                break
            agreed = processes.start_all_max(stop.pending_signal())  # known when the step before has ended
            reports = [step(state.model, state.optimizer, part, seed_key) for part in batch]
            state.global_step += 1
            in_flight.append(StartedStep(state.global_step, reports, checksum))
            if state.global_step < total:
                with state.time_budget.during("preparing data"):  # while the device works on this step
                    batch, checksum = next_batch(state)
            monitor.after_step(reports)
            is_due, is_wanted = state.is_at_milestone, stop.take_save_request()
            is_wanted |= state.global_step == 1 and state.config.checkpoint_first_step
            while len(in_flight) > (0 if is_due or is_wanted else steps_ahead()):
                is_stuck |= finish_step(state, in_flight.pop(0), bar, copies)
            stop.apply(agreed())
            if is_due or is_wanted:
                writer.save(is_milestone=is_due)
            writer.poll()
            write_metrics_if_possible(state)
            copies.flush()
        for started in in_flight:
            is_stuck |= finish_step(state, started, bar, copies)
        writer.finish(is_milestone=state.is_at_milestone, prune=not (is_stuck or finding))
        copies.flush()
    if finding:
        raise RuntimeError(finding + (f"; saved at step {state.global_step:,}" if state.global_step else ""))
    if is_stuck:
        raise RuntimeError(advice_when_stuck(state))


def next_batch(state: TrainState) -> tuple[list[Batch], int]:
    """Put the batches of the coming global step on the devices.

    There is one for each compiled call. Also returns the CRC-32 of this process's tokens.
    """
    calls = state.train_stream.calls(state.global_step, state.config.calls_per_step)
    checksum = 0
    for batch in calls:
        checksum = zlib.crc32(batch.targets.tobytes(), zlib.crc32(batch.inputs.tobytes(), checksum))
    return [place_batch(batch, state.mesh) for batch in calls], checksum


def compile_step(state: TrainState, batch: Batch, seed_key: jax.Array) -> Compiled:
    """Compile the training step. Raises ValueError, with what would fit, when the device has too little memory."""
    log.info("compiling the training step")
    state.time_budget.switch("compiling")
    step = compile_train_step(state.model, state.optimizer, batch, seed_key, state.config, state.mesh)
    memory.check(step, state.model_config, state.config)
    state.time_budget.switch("steps")
    state.last_collected = time.monotonic()  # what came before is no part of the first step
    return step


def finish_step(state: TrainState, started: StartedStep, bar: Progress, copies: MetricsCopies) -> bool:
    """Wait for a step, record and show it. Returns whether too many updates in a row were rejected."""
    reports = jax.device_get(started.reports)
    loss = mean_loss_of_calls(reports)
    state.metrics.append(record := make_record(state, started, reports[-1], loss))
    copies.add(record)
    if record["rejected"]:
        path, step = state.run.rejected(started.global_step), started.global_step
        positions_KB = state.config.start_train_token + state.train_stream.positions(step - 1)
        record_rejection(path, step, [report.diagnostics for report in reports], state.model, positions_KB)
    speed = state.tokens_per_second
    share = mfu(speed / state.mesh.devices.size, state.model_config, device_kind(), state.config.precision)
    shown_share = f", MFU {share:.1%}" if share else ""
    bar.set_postfix_str(f"loss of this step {loss:.4f}, {speed:,.0f} tokens/s{shown_share}", refresh=False)
    bar.update()
    return record["consecutive_rejections"] >= state.config.max_consecutive_rejections


def make_record(state: TrainState, started: StartedStep, report: StepReport, loss: float) -> Record:
    """Return the line of `metrics.jsonl` of a step that has just ended, from the report of its last call."""
    now, update = time.monotonic(), report.update
    record: Record = {
        "global_step": started.global_step,
        **{name: value.item() for name, value in update._asdict().items()},
        "loss": finite(loss),
        "gradient_norm": finite(update.gradient_norm.item()),
        "tokens_seen": started.global_step * state.tokens_per_step,
        "data_crc32": started.data_crc32,  # of the tokens trained on: what two runs must share to be the same
        "seconds": round(now - state.last_collected, 4),
    }
    if report.layer_norms is not None and started.global_step % (state.config.layer_norms_interval or 1) == 0:
        record |= norms_record(state.model, report.layer_norms)
    if state.paused:
        record["checkpoint_seconds"] = round(state.paused, 4)
        state.paused = 0.0
    state.last_collected = now
    return record


def advice_when_stuck(state: TrainState) -> str:
    """Return an error message: why training ended, and what to type."""
    path = state.run.rejected(state.global_step)
    where = f" (see {path})" if path.exists() else ""
    return (
        f"{state.config.max_consecutive_rejections} updates in a row were rejected: their gradients, or gradient "
        f"norms, were not finite{where}; saved at step {state.global_step:,} with the last good parameters; "
        + way_back(state)
    )


def way_back(state: TrainState) -> str:
    """Return what to type after too many rejections."""
    run, uniform = state.run, math.log(state.model_config.vocab_size)
    start = train_line(run.path, as_arguments(state.snapshot.get("overrides", {})))
    again = f"lower learning_rate, move {run.checkpoints} away, and start again: {start}"
    best = checkpointing.find_best(checkpointing.find_checkpoints(run.checkpoints))
    if best is None:
        return f"there is no best checkpoint to go back to: {again}"
    loss = best.meta.get(state.measure)
    if loss is not None and loss > uniform:  # None: whether there is validation has changed since
        of_step = f"the best checkpoint, of step {best.global_step:,}, is no better than a uniform guess"
        return f"{of_step} (loss {loss:.4f} against {uniform:.4f}), so it has diverged too: {again}"
    return f"lower learning_rate, or check the data, and go back: {start} --from best --accept-changes"
