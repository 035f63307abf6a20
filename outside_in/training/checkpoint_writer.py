"""Checkpoints of a run in progress: measured and copied at once, written while training goes on.

At a checkpoint the loop waits for validation, for the sample and for the copy to host memory; a thread does the rest,
one checkpoint at a time. A write that fails is a warning and the next one is tried when it is due, until it is clear
that the failure stays.
"""

import contextlib
import errno
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import jax
from flax import nnx

import checkpointing
from model import GPTModel
from outside_in.data import tokenizer
from outside_in.inference.evaluation import compile_for, mean_loss
from outside_in.inference.generation import generate
from outside_in.reports import charts
from outside_in.runtime import processes
from outside_in.storage import metrics, samples
from outside_in.train_step import Compiled
from outside_in.training.state import Training, at_milestone, period_start, write_metrics
from outside_in.weights import host_arrays

SAMPLE_TOKENS = 20
LASTING = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR}  # trying again will not help
MOST_FAILURES = 3  # in a row, before training stops
PAUSE = 1.0  # seconds between attempts to save the last step, which has no next interval
SHOWN_LOSSES = {"loss": "avg_train_loss", "lowest": "min_train_loss", "validation": "val_loss"}


class Saver:
    """Saves a run's checkpoints; a context manager that waits for the last write, whatever happens.

    `stop` says whether the user wants to leave: then validation is broken off, and made up for on resume. What there
    is to say to the user comes back as lines. OSError means that training cannot be saved any more.
    """

    def __init__(self, training: Training, stop: Callable[[], bool]) -> None:
        self._training, self._stop = training, stop
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[list[str]] | None = None
        self._step = 0  # of the checkpoint that is being, or was last, written
        self._measured_step = 0
        self._eval_step: Compiled | None = None  # compiled when it is needed first
        self._failures = 0  # in a row
        self._error: OSError | None = None  # the last one

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown()

    def save(self, *, is_milestone: bool, prune: bool = True) -> list[str]:
        """Start a checkpoint of the present step; a milestone also validates, samples, and may become the best one."""
        training = self._training
        lines = self._wait()
        self._step = training.global_step
        with self._pause():
            try:
                if is_milestone:
                    is_milestone, sample_lines = self._measure()
                    lines += sample_lines
                training.lacks_milestone = at_milestone(training) and not is_milestone
                with processes.together():
                    write_metrics(training, durable=True)
                    meta = describe_period(training, is_milestone) if processes.is_first() else {}
                job = self._job(meta, prune)
            except OSError as error:
                return lines + self._failed(error)
            self._pending = self._writer.submit(job)
        return lines

    def news(self) -> list[str]:
        """Look whether a write has ended meanwhile, without waiting; of several processes all look later, together."""
        is_done = self._pending and self._pending.done() and not processes.are_several()
        return self._wait() if is_done else []

    def finish(self, *, is_milestone: bool, prune: bool = True) -> list[str]:
        """Have the present step on the disk before returning; tries a few times."""
        training, lines = self._training, []
        for attempt in range(MOST_FAILURES):
            lines += self._wait(raising=False)
            if training.saved_step == training.global_step:
                return lines
            if attempt:
                time.sleep(PAUSE)
            lines += self.save(is_milestone=is_milestone and not self._stop(), prune=prune)
        lines += self._wait()
        if training.saved_step != training.global_step:
            raise OSError(self._last_words())
        return lines

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        """Book the time of the block as waiting for checkpoints, which is no part of the next step."""
        training, started = self._training, time.monotonic()
        try:
            with training.stopwatch.during("checkpoints"):
                yield
        finally:
            training.last_collected = time.monotonic()
            training.paused += training.last_collected - started
            training.seconds_paused += training.last_collected - started

    def _measure(self) -> tuple[bool, list[str]]:
        """Validate and sample, once a step; False when the user wants to leave before that is done."""
        training = self._training
        record = training.records[-1] if training.records else {}  # only the first process keeps those of before
        if self._measured_step == training.global_step:
            return True, []
        if self._stop():
            return False, []
        if training.val_stream:
            if self._eval_step is None:
                with training.stopwatch.during("compiling"):
                    self._eval_step = compile_for(training.model, training.val_stream, training.mesh)
            with training.stopwatch.during("validation"):
                loss = mean_loss(training.model, training.val_stream, self._stop, self._eval_step, training.mesh)
            if loss is None:
                return False, []
            record["val_loss"] = metrics.finite(loss)
            with processes.together():
                if processes.is_first() and training.num_written == len(training.records):  # made up for on resume
                    metrics.rewrite(training.run.metrics, training.records)
        with training.stopwatch.during("samples"):
            text = sample(training)
        with processes.together():
            if text:
                samples.append(training.run.samples, training.global_step, text)
        self._measured_step = training.global_step
        return True, [f"sample: {text}"] if text else []

    def _job(self, meta: dict[str, Any], prune: bool) -> Callable[[], list[str]]:
        """Copy what a checkpoint needs, and return the work that is left for the thread."""
        training, run = self._training, self._training.run
        state = checkpointing.copy_to_host(training.model, training.optimizer)
        staged = checkpointing.stage(run.checkpoints, training.optimizer, training.global_step)
        model_json, records = training.model_config.model_dump_json(), list(training.records)

        def write() -> list[str]:
            if not processes.is_first():
                return []
            started = time.monotonic()
            checkpoint = checkpointing.save(run.checkpoints, state, meta, model_json, staged)
            lines = [_describe(meta, checkpoint, time.monotonic() - started)]
            try:
                checkpointing.settle(run.checkpoints, training.config.keep_checkpoints if prune else None)
                draw_charts(training, records)
            except Exception as error:  # none of this is worth the training
                lines.append(f"WARNING the checkpoint is good, but then: {error}")
            return lines

        return write

    def _wait(self, *, raising: bool = True) -> list[str]:
        if self._pending is None:
            return []
        pending, self._pending = self._pending, None
        try:
            with self._pause(), processes.together():
                lines = pending.result()
        except OSError as error:
            return self._failed(error, raising=raising)
        self._training.saved_step, self._failures = self._step, 0
        return lines

    def _failed(self, error: OSError, *, raising: bool = True) -> list[str]:
        self._failures += 1
        self._error = error
        if raising and (error.errno in LASTING or self._failures >= MOST_FAILURES):
            raise OSError(self._last_words()) from error
        is_last = self._training.global_step == self._training.total_steps or self._stop()
        due = "training goes on, the next one is tried when it is due"
        return [f"WARNING step {self._step:,} could not be saved ({error}); {'trying again' if is_last else due}"]

    def _last_words(self) -> str:
        return (
            f"step {self._step:,} could not be saved ({self._error}); mend that and type the same line: "
            f"training goes on from step {self._training.saved_step:,}"
        )


def describe_period(training: Training, is_milestone: bool) -> dict[str, Any]:
    """Return a checkpoint's meta: losses and gradient norms since the milestone before it, and what it is."""
    period = [record for record in training.records if record["global_step"] > period_start(training)]
    losses = [record["loss"] for record in period if record["loss"] is not None]
    norms = [record["gradient_norm"] for record in period if record["gradient_norm"] is not None]
    meta = {
        "global_step": training.global_step,
        "learning_rate": period[-1]["learning_rate"],
        "min_train_loss": min(losses, default=None),
        "max_train_loss": max(losses, default=None),
        "avg_train_loss": statistics.fmean(losses) if losses else None,
        "val_loss": period[-1].get("val_loss"),
        "tokens_seen": period[-1]["tokens_seen"],
        "seconds_trained": round(training.seconds, 1),
        "seconds_paused": round(training.seconds_paused, 1),
        "max_grad_norm": max(norms, default=None),
        "avg_grad_norm": statistics.fmean(norms) if norms else None,
        "clipped_fraction": statistics.fmean(record["clipped"] for record in period),
        "rejected_updates": period[-1]["rejected_updates"],
        "is_milestone": is_milestone,
        "sequences_per_step": training.sequences_per_step,
        **training.snapshot,
    }
    measure = "val_loss" if training.val_stream else "avg_train_loss"
    best = [c.meta for c in checkpointing.find_checkpoints(training.run.checkpoints) if c.is_best][-1:]
    on_same_data = [other for other in best if other.get("data") == training.snapshot["data"]]
    to_beat = on_same_data[0].get(measure) if on_same_data else None
    score = meta[measure]
    meta["is_best"] = is_milestone and score is not None and not (isinstance(to_beat, float) and to_beat <= score)
    return meta


def sample(training: Training) -> str | None:
    """Complete the sample prompt greedily; None when the model's vocabulary is not GPT-2's."""
    if not tokenizer.is_gpt2(training.model_config.vocab_size):
        return None
    prompt = training.config.sample_prompt
    model = training.model if training.mesh.devices.size == 1 else on_one_device(training.model)
    if model is None:
        return None
    [completion] = generate(model, tokenizer.encode(prompt), SAMPLE_TOKENS)
    return prompt + tokenizer.decode(completion.tolist())


def on_one_device(model: GPTModel) -> GPTModel | None:
    """Return a copy of a model on the first process's first device alone; to be called by all processes."""
    graph, state = nnx.split(model)
    arrays = host_arrays(state)
    if not processes.is_first():
        return None
    paths = [path for path, _ in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(zip(paths, jax.device_put(list(arrays.values())), strict=True)))


def draw_charts(training: Training, records: list[metrics.Record]) -> None:
    run, config, title = training.run, training.config, training.run.path.name
    charts.draw_loss(
        run.loss_chart, records, interval=config.checkpoint_interval, title=title, landmarks=training.landmarks
    )
    charts.draw_learning_rate(run.learning_rate_chart, records, title=title)
    charts.draw_gradient_norm(run.gradient_norm_chart, records, clipping_max_norm=config.clipping_max_norm, title=title)


def _describe(meta: dict[str, Any], checkpoint: checkpointing.Checkpoint, seconds: float) -> str:
    losses = ", ".join(f"{name} {meta[key]:.4f}" for name, key in SHOWN_LOSSES.items() if meta[key] is not None)
    best = ", the best so far" if meta["is_best"] else ""
    return f"step {meta['global_step']:,}: {losses}{best}; written in {seconds:.1f} s: {checkpoint.path}"
