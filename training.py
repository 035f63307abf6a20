"""A run in progress: what training changes, and what happens to it at a step and at a checkpoint."""

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx

import charts
import checkpointing
import metrics
import samples
import tokenizer
from config import ModelConfig, TrainConfig, tokens_per_global_step
from data import Batch, TokenStream
from evaluation import mean_loss
from generation import generate
from model import GPTModel
from run_directory import RunDirectory

SAMPLE_TOKENS = 20
RECENT = 20  # steps over which tokens per second is taken
SHOWN_LOSSES = {"loss": "avg_train_loss", "lowest": "min_train_loss", "validation": "val_loss"}
Report = dict[str, Any]  # of one compiled call, on the device


@dataclass
class Training:
    """A run in progress: its configs, what training changes, and the tokens that it consumes."""

    run: RunDirectory
    model_config: ModelConfig
    config: TrainConfig
    total_steps: int
    model: GPTModel
    optimizer: nnx.Optimizer
    train_stream: TokenStream
    val_stream: TokenStream | None
    snapshot: dict[str, Any]  # what a checkpoint remembers of configs, data and versions
    landmarks: dict[str, float]  # losses to compare with, in nats
    global_step: int = 0
    saved_step: int = 0
    seconds_before: float = 0.0  # trained by earlier processes
    started: float = field(default_factory=time.monotonic)
    records: list[metrics.Record] = field(default_factory=list)

    num_written: int = 0  # of the records, how many are in metrics.jsonl
    last_collected: float = field(default_factory=time.monotonic)

    @property
    def tokens_per_step(self) -> int:
        return tokens_per_global_step(self.model_config, self.config)

    def unwritten(self) -> list[metrics.Record]:
        """Hand out the records that are not in the file yet, once."""
        first, self.num_written = self.num_written, len(self.records)
        return self.records[first:]


def cut_after(training: Training, global_step: int) -> None:
    training.records = metrics.cut_after(training.run.metrics, global_step)
    training.num_written = len(training.records)
    samples.cut_after(training.run.samples, global_step)


def next_milestone(training: Training) -> int:
    """Return the first multiple of `checkpoint_interval` after the newest checkpoint."""
    interval = training.config.checkpoint_interval
    return (training.saved_step // interval + 1) * interval


def place_batch(training: Training) -> list[Batch]:
    """Put the arrays of the coming global step on the device, a batch per compiled call."""
    return jax.device_put(training.train_stream.calls(training.global_step, training.config.calls_per_step))


def mean_of_calls(reports: list[Report]) -> float:
    return float(np.mean([report["loss"] for report in reports], dtype=np.float64))


def collect(training: Training, step: int, reports: list[Report]) -> metrics.Record:
    """Wait for a step's reports and add its record."""
    host_reports = jax.device_get(reports)
    now = time.monotonic()
    record: metrics.Record = {
        "global_step": step,
        **{name: value.item() for name, value in host_reports[-1].items()},
        "loss": metrics.finite(mean_of_calls(host_reports)),
        "gradient_norm": metrics.finite(host_reports[-1]["gradient_norm"].item()),
        "tokens_seen": step * training.tokens_per_step,
        "seconds": round(now - training.last_collected, 4),
    }
    training.last_collected = now
    training.records.append(record)
    return record


def tokens_per_second(training: Training) -> float:
    """Return the speed of the latest steps."""
    return training.tokens_per_step / max(statistics.median(r["seconds"] for r in training.records[-RECENT:]), 1e-9)


def save_checkpoint(training: Training, *, is_milestone: bool, prune: bool = True) -> list[str]:
    """Commit a checkpoint; a milestone also validates, samples, and may become the best one.

    Returns what there is to say of it, a line each.
    """
    started = time.monotonic()
    run, record, lines = training.run, training.records[-1], []
    if is_milestone and training.val_stream:
        record["val_loss"] = metrics.finite(mean_loss(training.model, training.val_stream))
    metrics.append(run.metrics, training.unwritten(), durable=True)
    if is_milestone and (text := sample(training)):
        samples.append(run.samples, training.global_step, text)
        lines.append(f"sample: {text}")
    meta = describe_period(training, is_milestone)
    checkpoint = commit(training, meta)
    training.saved_step = training.global_step
    if prune:
        checkpointing.prune(run.checkpoints, training.config.keep_checkpoints)
    draw_charts(training)
    losses = ", ".join(f"{name} {meta[key]:.4f}" for name, key in SHOWN_LOSSES.items() if meta[key] is not None)
    best = ", the best so far" if meta["is_best"] else ""
    seconds = time.monotonic() - started
    lines.append(f"step {training.global_step:,}: {losses}{best}; {seconds:.1f} s for {checkpoint.path}")
    training.last_collected = time.monotonic()  # the pause is no part of the next step
    return lines


def commit(training: Training, meta: dict[str, Any]) -> checkpointing.Checkpoint:
    state = checkpointing.copy_to_host(training.model, training.optimizer)
    return checkpointing.save(training.run.checkpoints, state, meta, training.model_config.model_dump_json())


def describe_period(training: Training, is_milestone: bool) -> dict[str, Any]:
    """Return a checkpoint's meta: the losses and gradient norms since the previous checkpoint, and what it is."""
    period = [record for record in training.records if record["global_step"] > training.saved_step]
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
        "seconds_trained": round(training.seconds_before + time.monotonic() - training.started, 1),
        "max_grad_norm": max(norms, default=None),
        "avg_grad_norm": statistics.fmean(norms) if norms else None,
        "clipped_fraction": statistics.fmean(record["clipped"] for record in period),
        "rejected_updates": period[-1]["rejected_updates"],
        **training.snapshot,
    }
    measure = "val_loss" if training.val_stream else "avg_train_loss"
    best = [c.meta for c in checkpointing.find_checkpoints(training.run.checkpoints) if c.is_best][-1:]
    to_beat = best[0].get(measure) if best else None
    score = meta[measure]
    meta["is_best"] = is_milestone and score is not None and (to_beat is None or score < to_beat)
    return meta


def sample(training: Training) -> str | None:
    """Complete the sample prompt greedily; None when the model's vocabulary is not GPT-2's."""
    if training.model_config.vocab_size < tokenizer.VOCAB_SIZE:
        return None
    prompt = training.config.sample_prompt
    [completion] = generate(training.model, tokenizer.encode(prompt), num_tokens=SAMPLE_TOKENS)
    return prompt + tokenizer.decode(completion.tolist())


def draw_charts(training: Training) -> None:
    run, config, records, title = training.run, training.config, training.records, training.run.path.name
    charts.draw_loss(
        run.loss_chart, records, interval=config.checkpoint_interval, title=title, landmarks=training.landmarks
    )
    charts.draw_learning_rate(run.learning_rate_chart, records, title=title)
    charts.draw_gradient_norm(run.gradient_norm_chart, records, clipping_max_norm=config.clipping_max_norm, title=title)
