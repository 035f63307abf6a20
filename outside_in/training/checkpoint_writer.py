"""Writes checkpoints in the background, after validation and sampling.

At a checkpoint the loop waits for validation, for the sample and for the copy to host memory. A thread does the rest,
one checkpoint at a time. A failed write is a warning, and the next one is tried when it is due, until it is clear that
the failure stays.
"""

import contextlib
import errno
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Self

import numpy as np

import checkpointing
from outside_in.data.loader import TokenStream
from outside_in.data.tokenizer import bits_per_byte
from outside_in.inference.evaluation import compile_for, mean_loss
from outside_in.inference.generation import Sampling, generate, likeliest_outputs
from outside_in.runtime import processes
from outside_in.runtime.devices import peak_memory_bytes
from outside_in.runtime.log import log
from outside_in.storage import samples
from outside_in.storage.checkpoint_folder import beats
from outside_in.storage.metrics import finite
from outside_in.storage.text import counted
from outside_in.train_step import Compiled
from outside_in.training import pictures
from outside_in.training.state import TrainState
from outside_in.weights import on_one_device

SAMPLES, SAMPLE_BYTES, MAX_SAMPLE_TOKENS = 3, 120, 120  # of text, about
SAMPLING, SAMPLE_SEED = Sampling(temperature=0.7), 0
PERMANENT_ERRNOS = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR}  # trying again will not help
MAX_FAILURES = 3  # in a row, before training stops
RETRY_SECONDS = 1.0  # seconds between attempts to save the last step, which has no next interval


class CheckpointWriter:
    """Saves a run's checkpoints; on exit, waits for the last write.

    `stop` says whether the user wants to leave: then validation is interrupted, and made up for on resume. OSError
    means that training cannot be saved any more.
    """

    def __init__(self, state: TrainState, stop: Callable[[], bool]) -> None:
        self._state, self._stop = state, stop
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._step = 0  # of the checkpoint that is being, or was last, written
        self._validated_step = 0
        self._eval_step: Compiled | None = None  # compiled when it is needed first
        self._failures = 0  # in a row
        self._error: OSError | None = None  # the last one

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def save(self, *, is_milestone: bool, prune: bool = True) -> None:
        """Start a checkpoint of the present step. A milestone also validates, samples, and may become the best one."""
        state = self._state
        self._wait()
        self._step = state.global_step
        with self._pause():
            try:
                is_validated = is_milestone and self._validate_and_sample()
                state.needs_validation = state.is_at_milestone and not is_validated
                with processes.propagate_errors():
                    state.metrics.write(durable=True)
                    meta = describe_period(state, is_validated) if processes.is_main_process() else {}
                write = self._snapshot(meta, prune)
            except OSError as error:
                self._failed(error)
                return
            self._pending = self._thread.submit(write)

    def poll(self) -> None:
        """Check whether a write has ended, without waiting. Several processes do that later, together."""
        if self._pending and self._pending.done() and not processes.is_distributed():
            self._wait()

    def finish(self, *, is_milestone: bool, prune: bool = True) -> None:
        """Save the present step, durably; try a few times."""
        state = self._state
        for attempt in range(MAX_FAILURES):
            self._wait(raising=False)
            if state.saved_step == state.global_step:
                return
            if attempt:
                time.sleep(RETRY_SECONDS)
            self.save(is_milestone=is_milestone and not self._stop(), prune=prune)
        self._wait()
        if state.saved_step != state.global_step:
            raise OSError(self._error_message())

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        """Book the time of the block for checkpoints."""
        state, started = self._state, time.monotonic()
        try:
            with state.time_budget.during("checkpoints"):
                yield
        finally:
            state.last_collected = time.monotonic()
            state.paused += state.last_collected - started
            state.seconds_paused += state.last_collected - started

    def _validate_and_sample(self) -> bool:
        """Validate and sample, once a step; False when interrupted by a stop."""
        state = self._state
        if self._validated_step == state.global_step:
            return True
        if self._stop() or (state.val_stream and not self._validate(state.val_stream)):
            return False
        with state.time_budget.during("samples"):
            texts = sample(state)
        with processes.propagate_errors():
            if texts:  # in the main process alone
                samples.append(state.run.samples, state.global_step, texts)
            for text in texts:
                log.info(f"sample: {samples.one_line(text)}")
        self._validated_step = state.global_step
        return True

    def _validate(self, stream: TokenStream) -> bool:
        state = self._state
        if self._eval_step is None:
            with state.time_budget.during("compiling"):
                self._eval_step = compile_for(state.model, stream, state.mesh)
        with state.time_budget.during("validation"):
            loss = mean_loss(state.model, stream, self._stop, self._eval_step, state.mesh)
        if loss is None:
            return False
        with processes.propagate_errors():
            if state.records:  # only the main process keeps those of before
                state.metrics.amend("val_loss", finite(loss))
        return True

    def _snapshot(self, meta: dict[str, Any], prune: bool) -> Callable[[], None]:
        """Copy what a checkpoint needs; return the function that writes it."""
        state, run = self._state, self._state.run
        copy = checkpointing.snapshot(run.checkpoints, state.model, state.optimizer, state.global_step)
        model_json, files, records = state.model_config.model_dump_json(), state.files, state.records.copy()

        def write() -> None:
            if not processes.is_main_process():
                return
            started = time.monotonic()
            checkpoint = checkpointing.save(run.checkpoints, copy, meta, model_json, files)
            try:
                log_checkpoint(meta, state.bytes_per_token, checkpoint, time.monotonic() - started)
                checkpointing.repair_links_and_prune(run.checkpoints, state.config.keep_checkpoints if prune else None)
                pictures.draw_charts(state, records)
                pictures.write_page(state, records)
            except Exception as error:  # none of this is worth the training
                log.warning(f"the checkpoint is saved, but pruning or drawing charts failed: {error}")

        return write

    def _wait(self, *, raising: bool = True) -> None:
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            with self._pause(), processes.propagate_errors():
                pending.result()
        except OSError as error:
            self._failed(error, raising=raising)
        else:
            self._state.saved_step, self._failures = self._step, 0

    def _failed(self, error: OSError, *, raising: bool = True) -> None:
        self._failures += 1
        self._error = error
        if raising and (error.errno in PERMANENT_ERRNOS or self._failures >= MAX_FAILURES):
            raise OSError(self._error_message()) from error
        is_last = self._state.global_step == self._state.total_steps or self._stop()
        due = "training continues, and the next checkpoint is tried when it is due"
        log.warning(f"step {self._step:,} could not be saved ({error}); {'trying again' if is_last else due}")

    def _error_message(self) -> str:
        return (
            f"step {self._step:,} could not be saved ({self._error}); fix that and type the same line: "
            f"training resumes from step {self._state.saved_step:,}"
        )


def describe_period(state: TrainState, is_milestone: bool) -> dict[str, Any]:
    """Return a checkpoint's meta.

    It has losses, gradient norms and the like of the period since the last milestone, and whether it is the best.
    """
    newest, last = state.global_step - state.period_start, state.records.last
    is_within = state.records.column("global_step", newest) > state.period_start  # steps may lack from the file
    columns = [state.records.column(name, newest)[is_within] for name in ("loss", "gradient_norm", "clipped")]
    losses, norms, clipped = (column[~np.isnan(column)].tolist() for column in columns)
    meta = {
        "global_step": state.global_step,
        "learning_rate": last["learning_rate"],
        "steps_averaged": len(losses),
        "min_train_loss": min(losses, default=None),
        "max_train_loss": max(losses, default=None),
        "avg_train_loss": statistics.fmean(losses) if losses else None,
        "val_loss": last.get("val_loss"),
        "bytes_per_token": state.bytes_per_token,
        "tokens_seen": last["tokens_seen"],
        "seconds_trained": round(state.seconds, 1),
        "seconds_paused": round(state.seconds_paused, 1),
        "max_grad_norm": max(norms, default=None),
        "avg_grad_norm": statistics.fmean(norms) if norms else None,
        "clipped_fraction": statistics.fmean(clipped),
        "rejected_updates": last["rejected_updates"],
        "is_milestone": is_milestone,
        "peak_memory_bytes": peak_memory_bytes(),
        "events": state.events,
        "sequences_per_step": state.sequences_per_step,
        **state.snapshot,
    }
    before = checkpointing.find_checkpoints(state.run.checkpoints)
    meta["is_best"] = is_milestone and beats(meta, state.measure, before)
    return meta


def sample(state: TrainState) -> list[str]:
    """Complete the sample prompt a few times, always with the same seed; or repeat it, if that is the objective.

    Returns none when the tokenizer is unknown, and in all but the main process.
    """
    tokenizer = state.tokenizer
    if tokenizer is None:
        return []
    model = state.model if state.mesh.devices.size == 1 else on_one_device(state.model)
    if model is None:
        return []
    prompt = state.config.sample_prompt
    prompt_ids = tokenizer.encode(prompt).tolist()
    if state.config.objective == "a-to-a":
        return [f"{prompt} → {tokenizer.decode(likeliest_outputs(model, prompt_ids, tokenizer.vocab_size))}"]
    num_tokens = min(MAX_SAMPLE_TOKENS, round(SAMPLE_BYTES / (state.bytes_per_token or 1)))
    end = tokenizer.end_of_text
    sampling = replace(SAMPLING, vocab_size=tokenizer.vocab_size)
    completions = generate(model, prompt_ids, num_tokens, SAMPLES, sampling=sampling, seed=SAMPLE_SEED, stop_id=end)
    return [prompt + "".join(tokenizer.decode_stream([ids], end)) for ids in completions.tolist()]


def log_checkpoint(
    meta: dict[str, Any], bytes_per_token: float | None, checkpoint: checkpointing.Checkpoint, seconds: float
) -> None:
    parts = []
    if meta["avg_train_loss"] is not None:
        of = f"mean of {counted(meta['steps_averaged'], 'step')}, lowest {meta['min_train_loss']:.4f}"
        parts.append(f"training loss {meta['avg_train_loss']:.4f} ({of})")
    if meta["val_loss"] is not None:
        bits = f" ({bits_per_byte(meta['val_loss'], bytes_per_token):.3f} bits per byte)" if bytes_per_token else ""
        parts.append(f"validation loss {meta['val_loss']:.4f}{bits}")
    best = ", the best so far" if meta["is_best"] else ""
    log.info(f"step {meta['global_step']:,}: {', '.join(parts)}{best}; written in {seconds:.1f} s: {checkpoint.path}")
