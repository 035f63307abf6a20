"""Train a run, or go on with it: `uv run train.py runs/NAME`."""

import argparse
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

import charts
import checkpointing
import command_line
import drift
import metrics
import preflight
import samples
import tokenizer
from command_line import say
from config import ModelConfig, TrainConfig, load_config, steps_per_epoch, tokens_per_global_step
from data import Batch, TokenStream, count_tokens, fingerprint, open_streams, unigram_entropy
from dataset_sources import dataset_folder
from evaluation import mean_loss
from generation import generate
from inspection import check_parameters_changed, first_loss_line, parameter_hashes
from interruption import StopRequest, listening
from mesh import describe_devices
from model import GPTModel, create_model
from optimizer import make_optimizer
from run_directory import RunDirectory, find_runs
from steps import train_step

RUNS = Path("runs")
SAMPLE_TOKENS = 20
RECENT = 20  # steps over which the progress bar's tokens per second is taken
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


def main(args: argparse.Namespace) -> int:
    if args.run is None:
        return list_runs()
    run = RunDirectory(args.run)
    run.check()
    model_config = load_config(run.model_config, ModelConfig)
    config = load_config(run.train_config, TrainConfig)
    if args.check:
        print(*preflight.describe(run, model_config, config, tokens_available(config)), sep="\n")
        return command_line.DONE
    with run.lock():
        return train_or_go_on(run, model_config, config, args)


def list_runs() -> int:
    """Print a line for every run below `runs/`: new, at step N of M, or finished."""
    for run in find_runs(RUNS):
        try:
            config = load_config(run.train_config, TrainConfig)
            total = total_steps(load_config(run.model_config, ModelConfig), config)
            checkpoints = checkpointing.find_checkpoints(run.checkpoints)
            step = checkpoints[-1].global_step if checkpoints else 0
            status = f"at step {step:,} of {total:,}" if total else f"at step {step:,}"
            status = "new" if not checkpoints else "finished" if step == total else status
        except ValueError as error:
            status = f"error: {error}"
        print(f"{run.path!s:30} {status}")
    print("uv run train.py runs/NAME trains one, or goes on with it")
    return command_line.DONE


def tokens_available(config: TrainConfig, *, fetch: bool = False) -> int | None:
    """Count the training tokens from `start_train_token` on; None when they are not here and `fetch` is off."""
    path = dataset_folder(config.dataset, fetch=fetch) / "train.safetensors"
    if not fetch and not path.exists():
        return None
    return max(0, count_tokens(path) - config.start_train_token)


def total_steps(model_config: ModelConfig, config: TrainConfig, *, fetch: bool = False) -> int | None:
    """Count the global steps of the whole run; None when that takes data that are not here and `fetch` is off."""
    steps = steps_per_epoch(model_config, config)
    if steps is None:
        steps = steps_per_epoch(model_config, config, tokens_available(config, fetch=fetch))
    return None if steps is None else steps * config.epochs


def train_or_go_on(run: RunDirectory, model_config: ModelConfig, config: TrainConfig, args: argparse.Namespace) -> int:
    total = total_steps(model_config, config, fetch=True)
    if not total:
        raise ValueError(f"{run.train_config}: {config.dataset} has too few tokens for one global step")
    checkpoint, complaints = checkpointing.choose(run.checkpoints, args.from_checkpoint)
    for complaint in complaints:
        say(complaint)
    if checkpoint:
        for difference in drift.check_configs(checkpoint.meta, model_config, config, accept=args.accept_changes):
            say(difference)
        if checkpoint.global_step == total:
            say(f"{run.path} is finished: step {total:,} of {total:,}, {run.checkpoints / 'latest'}")
            return command_line.DONE
    say(describe_devices())
    training = set_up(run, model_config, config, total)
    if checkpoint:
        go_on_from(checkpoint, training, args)
    else:
        cut_after(training, 0)
    resume_line = f"uv run train.py {run.path}"
    with listening(
        "stopping after this step; a second Ctrl-C leaves at once",
        f"left at once; to go on from the last checkpoint: {resume_line}",
    ) as stop:
        train(training, stop)
    if training.global_step == total:
        say(f"finished: {training.seconds_before + time.monotonic() - training.started:,.0f} s of training")
        return command_line.DONE
    say(f"stopped and saved at step {training.global_step:,} of {total:,}; to go on: {resume_line}")
    return stop.exit_code


def set_up(run: RunDirectory, model_config: ModelConfig, config: TrainConfig, total: int) -> Training:
    """Load the tokens, print the preflight, and build a fresh model and optimiser."""
    folder = dataset_folder(config.dataset)
    for line in preflight.describe(run, model_config, config, tokens_available(config)):
        say(line)
    train_stream, val_stream = open_streams(folder, model_config, config, total // config.epochs)
    if val_stream is None:
        say("no validation tokens: best goes by training loss")
    uniform, unigram = math.log(model_config.vocab_size), unigram_entropy(train_stream.tokens)
    landmarks = {f"uniform guess, ln({model_config.vocab_size:,})": uniform}
    if unigram < uniform - 0.05:
        landmarks["unigram entropy of the data"] = unigram
    prints = {
        "train": fingerprint(train_stream.tokens),
        "validation": fingerprint(val_stream.tokens) if val_stream else None,
    }
    model = create_model(model_config, config.seed, config.drop_rate, config.precision)
    return Training(
        run=run,
        model_config=model_config,
        config=config,
        total_steps=total,
        model=model,
        optimizer=make_optimizer(model, config, total),
        train_stream=train_stream,
        val_stream=val_stream,
        snapshot=drift.snapshot(model_config, config, prints),
        landmarks=landmarks,
    )


def go_on_from(checkpoint: checkpointing.Checkpoint, training: Training, args: argparse.Namespace) -> None:
    """Load a checkpoint, and forget the metrics and samples of later steps."""
    drift.check_data(checkpoint.meta, training.snapshot["data"], accept=args.accept_changes)
    checkpointing.load(checkpoint, training.model, training.optimizer)
    training.global_step = training.saved_step = checkpoint.global_step
    training.seconds_before = checkpoint.meta["seconds_trained"]
    if args.from_checkpoint:  # commit it again, so that it is the newest and the next start goes on from it as well
        meta = checkpoint.meta | training.snapshot
        checkpointing.save(
            training.run.checkpoints, training.model, training.optimizer, meta, training.model_config.model_dump_json()
        )
    cut_after(training, checkpoint.global_step)
    say(f"going on from step {checkpoint.global_step:,} of {training.total_steps:,}, {checkpoint.path}")


def cut_after(training: Training, global_step: int) -> None:
    training.records = metrics.cut_after(training.run.metrics, global_step)
    training.num_written = len(training.records)
    samples.cut_after(training.run.samples, global_step)


def train(training: Training, stop: StopRequest) -> None:
    """Train to the end of the run or until a stop is asked for, and save the last step either way.

    Raises RuntimeError, with everything saved, when too many updates in a row were rejected.
    """
    config, total = training.config, training.total_steps
    seed_key = jax.random.key(config.seed)
    hashes = parameter_hashes(training.model) if training.global_step == 0 else None
    batch = place_batch(training)
    in_flight: list[list[Report]] = []  # reports that are still on the device, one step late
    is_stuck = False
    say("compiling the training step")
    with tqdm(total=total, initial=training.global_step, unit="step", dynamic_ncols=True) as bar:
        while training.global_step < total and not stop and not is_stuck:
            in_flight.append([train_step(training.model, training.optimizer, part, seed_key, config) for part in batch])
            training.global_step += 1
            if training.global_step < total:
                batch = place_batch(training)  # while the device works on this step
            if hashes:
                check_first_update(training, in_flight[0], hashes)
                hashes = None
            is_milestone = training.global_step in (total, next_milestone(training))
            while len(in_flight) > (0 if is_milestone else 1):
                is_stuck |= collect(training, in_flight.pop(0), bar)
            if is_milestone:
                save_checkpoint(training, is_milestone=True)
            else:
                metrics.append(training.run.metrics, training.unwritten())
        for reports in in_flight:
            is_stuck |= collect(training, reports, bar)
    if training.saved_step != training.global_step:
        save_checkpoint(training, is_milestone=False, prune=not is_stuck)
    if is_stuck:
        raise RuntimeError(
            f"{config.max_consecutive_rejections} updates in a row were rejected, their gradients were not finite; "
            f"saved at step {training.global_step:,} with the last good parameters: "
            "go on --from best with a lower learning_rate, or look at the data"
        )


def next_milestone(training: Training) -> int:
    """Return the first multiple of `checkpoint_interval` after the newest checkpoint."""
    interval = training.config.checkpoint_interval
    return (training.saved_step // interval + 1) * interval


def place_batch(training: Training) -> list[Batch]:
    """Put the arrays of the coming global step on the device, a batch per compiled call."""
    return jax.device_put(training.train_stream.calls(training.global_step, training.config.calls_per_step))


def check_first_update(training: Training, reports: list[Report], hashes: dict[str, str]) -> None:
    """Compare the first loss with a uniform guess, and see that the first update changed something."""
    say(first_loss_line(mean_of_calls(jax.device_get(reports)), training.model_config.vocab_size))
    if not reports[-1]["rejected"]:
        check_parameters_changed(hashes, parameter_hashes(training.model))


def mean_of_calls(reports: list[Report]) -> float:
    return float(np.mean([report["loss"] for report in reports], dtype=np.float64))


def collect(training: Training, reports: list[Report], bar: tqdm) -> bool:
    """Wait for a step, add its record, and say whether too many updates in a row were rejected."""
    host_reports = jax.device_get(reports)
    now = time.monotonic()
    step = bar.n + 1
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
    recent = statistics.median(r["seconds"] for r in training.records[-RECENT:])
    tokens_per_second = training.tokens_per_step / max(recent, 1e-9)
    bar.set_postfix_str(f"loss {record['loss'] or math.nan:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
    bar.update()
    return record["consecutive_rejections"] >= training.config.max_consecutive_rejections


def save_checkpoint(training: Training, *, is_milestone: bool, prune: bool = True) -> None:
    """Commit a checkpoint; a milestone also validates, samples, and may become the best one."""
    started = time.monotonic()
    run, record = training.run, training.records[-1]
    if is_milestone and training.val_stream:
        record["val_loss"] = metrics.finite(mean_loss(training.model, training.val_stream))
    metrics.append(run.metrics, training.unwritten(), durable=True)
    if is_milestone and (text := sample(training)):
        samples.append(run.samples, training.global_step, text)
        say(f"sample: {text}")
    meta = describe_period(training, is_milestone)
    checkpoint = checkpointing.save(
        run.checkpoints, training.model, training.optimizer, meta, training.model_config.model_dump_json()
    )
    training.saved_step = training.global_step
    if prune:
        checkpointing.prune(run.checkpoints, training.config.keep_checkpoints)
    draw_charts(training)
    losses = ", ".join(f"{name} {meta[key]:.4f}" for name, key in SHOWN_LOSSES.items() if meta[key] is not None)
    best = ", the best so far" if meta["is_best"] else ""
    say(f"step {training.global_step:,}: {losses}{best}; {time.monotonic() - started:.1f} s for {checkpoint.path}")
    training.last_collected = time.monotonic()  # the pause is no part of the next step


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


def make_parser() -> command_line.ArgumentParser:
    parser = command_line.ArgumentParser(description="Train a run, or go on with it.")
    parser.add_argument("run", nargs="?", type=Path, help="the run's folder; without one, list the runs that are there")
    parser.add_argument("--check", action="store_true", help="print what the run will be and need, and stop")
    parser.add_argument(
        "--from",
        dest="from_checkpoint",
        metavar="CHECKPOINT",
        help="go on from this checkpoint: best, latest, or the name of one",
    )
    parser.add_argument("--accept-changes", action="store_true", help="go on although announced keys have changed")
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
