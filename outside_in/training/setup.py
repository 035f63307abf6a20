"""How a run starts or goes on: its tokens, model and optimiser, and what a checkpoint says of them."""

import math
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

import checkpointing
from model import create_model
from outside_in.config import ModelConfig, TrainConfig, load_config, parse_config, steps_per_epoch
from outside_in.data.loader import fingerprint, open_streams, unigram_entropy
from outside_in.data.prepare.description import recorded_leakage
from outside_in.data.sources import dataset_folder, dataset_revision
from outside_in.data.token_files import count_tokens
from outside_in.optimizer import make_optimizer
from outside_in.runtime import processes
from outside_in.runtime.mesh import own_columns, place
from outside_in.runtime.timing import Stopwatch
from outside_in.storage import manifest, samples
from outside_in.storage.run_directory import RunDirectory
from outside_in.training import resume_checks
from outside_in.training.state import Training, at_milestone, cut_after
from outside_in.weights import load_model, read_model_json


def tokens_available(config: TrainConfig, *, fetch: bool = False) -> int | None:
    """Count the training tokens from `start_train_token` on; None when they are not here and `fetch` is off."""
    path = dataset_folder(config.dataset, fetch=fetch) / "train.safetensors"
    if not fetch and not path.exists():
        return None
    return max(0, count_tokens(path) - config.start_train_token)


def leaked_share(config: TrainConfig) -> float | None:
    """Say what share of validation occurs in training, where the dataset's `data.json` does."""
    return recorded_leakage(dataset_folder(config.dataset, fetch=False))


def total_steps(model_config: ModelConfig, config: TrainConfig, devices: int = 1, *, fetch: bool = False) -> int | None:
    """Count the global steps of a whole run that begins on so many devices.

    None when that takes data that are not here and `fetch` is off.
    """
    steps = steps_per_epoch(model_config, config, devices=devices)
    if steps is None:
        steps = steps_per_epoch(model_config, config, tokens_available(config, fetch=fetch), devices)
    return None if steps is None else steps * config.epochs


def whole_steps(run: RunDirectory, model_config: ModelConfig, config: TrainConfig, devices: int = 1) -> int:
    """Count the global steps as `total_steps` does, fetching the data; raises ValueError when there are none."""
    total = total_steps(model_config, config, devices, fetch=True)
    if not total:
        raise ValueError(f"{run.train_config}: {config.dataset} has too few tokens for one global step")
    return total


def describe_progress(run: RunDirectory) -> str:
    """Say how far a run is: new, at step N of M, or finished. Raises ValueError when its files are wrong."""
    config, model_config = load_config(run.train_config, TrainConfig), load_config(run.model_config, ModelConfig)
    checkpoints = checkpointing.find_checkpoints(run.checkpoints)
    if not checkpoints:
        total_steps(model_config, config)  # raises when something is wrong
        return "new"
    total = total_steps(model_config, config, devices_at_start(config, checkpoints[-1].meta))
    step = checkpoints[-1].global_step
    if step == total:
        return "finished"
    return f"at step {step:,} of {total:,}" if total else f"at step {step:,}"


def devices_at_start(config: TrainConfig, meta: dict[str, Any]) -> int:
    """Return on how many devices a run has begun, by what a checkpoint says: that sets the size of a global step."""
    own = config.gradient_accumulation_steps * config.microbatch_size
    sequences = meta.get("sequences_per_step", own)
    if not isinstance(sequences, int) or sequences < own or sequences % own:
        raise ValueError(f"sequences_per_step of the checkpoint: expected a multiple of {own}, got {sequences!r}")
    return sequences // own


def set_up(
    run: RunDirectory,
    model_config: ModelConfig,
    config: TrainConfig,
    total: int,
    mesh: Mesh,
    stopwatch: Stopwatch,
    given: TrainConfig,
) -> Training:
    """Load the tokens, and build a fresh model and optimiser.

    `config` has as many microbatches as the mesh takes, `given` what train.json says.
    """
    with processes.together():
        folder = dataset_folder(config.dataset)
        columns = own_columns(mesh, config.microbatch_size)
        steps = total // config.epochs
        train_stream, val_stream = open_streams(folder, model_config, config, steps, mesh.devices.size, columns)
    uniform, unigram = math.log(model_config.vocab_size), unigram_entropy(train_stream.tokens)
    landmarks = {f"uniform guess, ln({model_config.vocab_size:,})": uniform}
    if unigram < uniform - 0.05:
        landmarks["unigram entropy of the data"] = unigram
    prints = {
        "train": fingerprint(train_stream.tokens) if processes.is_first() else None,
        "validation": fingerprint(val_stream.tokens) if val_stream else None,
        "revision": dataset_revision(folder),
    }
    prints = processes.from_the_first(prints)
    model = create_model(model_config, config.seed, config.drop_rate, config.precision, config.loss_rows_per_chunk)
    place(model, mesh)
    optimizer = make_optimizer(model, config, total)
    place(optimizer, mesh)
    return Training(
        run=run,
        model_config=model_config,
        config=config,
        mesh=mesh,
        total_steps=total,
        model=model,
        optimizer=optimizer,
        train_stream=train_stream,
        val_stream=val_stream,
        snapshot=resume_checks.snapshot(model_config, given, prints),
        landmarks=landmarks,
        stopwatch=stopwatch,
    )


def start_from_weights(training: Training) -> list[str]:
    """Put `initial_weights` into the fresh model of a new run; return what there is to say.

    Raises ValueError when they are those of another model.
    """
    if training.config.initial_weights is None:
        return []
    own = training.run.path / training.config.initial_weights  # as an import has it, so that a run can be moved
    path = own if own.is_file() else Path(training.config.initial_weights)
    theirs = parse_config(read_model_json(path), ModelConfig, f"{path}: model.json in its metadata").model_dump()
    ours = training.model_config.model_dump()
    if differing := [f"{name} {theirs[name]} against {ours[name]}" for name in ours if ours[name] != theirs[name]]:
        raise ValueError(f"initial_weights: {path} is of another model than model.json: {', '.join(differing)}")
    manifest.check_alone(path)
    load_model(path, training.model)
    return [f"starting from the weights in {path}"]


def go_on_from(
    checkpoint: checkpointing.Checkpoint, training: Training, *, accept: bool, commit_again: bool
) -> list[str]:
    """Load a checkpoint, and forget the metrics and samples of later steps; return what there is to say.

    `accept` other validation tokens; `commit_again` makes it the newest, so that the next start goes on from it too.
    """
    resume_checks.check_data(checkpoint.meta, training.snapshot["data"], accept=accept)
    with processes.together():
        checkpointing.load(checkpoint, training.model, training.optimizer)
    training.global_step = training.saved_step = checkpoint.global_step
    training.seconds_before = checkpoint.meta["seconds_trained"]
    training.seconds_paused = checkpoint.meta.get("seconds_paused", 0.0)
    if commit_again:
        meta = checkpoint.meta | training.snapshot
        state = checkpointing.copy_to_host(training.model, training.optimizer)
        staged = checkpointing.stage(training.run.checkpoints, training.optimizer, checkpoint.global_step)
        model_json = training.model_config.model_dump_json()
        with processes.together():
            if processes.is_first():
                checkpointing.save(training.run.checkpoints, state, meta, model_json, staged)
    with processes.together():
        cut_after(training, checkpoint.global_step)
    was_broken_off = not checkpoint.meta.get("is_milestone", True)
    steps = [record["global_step"] for record in training.records]
    has_record = checkpoint.global_step in steps[-1:]
    lacks_milestone = was_broken_off and at_milestone(training) and has_record
    training.lacks_milestone = processes.from_the_first(lacks_milestone)
    if training.lacks_milestone and processes.is_first():  # its sample comes once more
        samples.cut_after(training.run.samples, checkpoint.global_step - 1)
    lines = [f"going on from step {checkpoint.global_step:,} of {training.total_steps:,}, {checkpoint.path}"]
    if steps != list(range(1, checkpoint.global_step + 1)):
        gap = f"WARNING {training.run.metrics} lacks steps before {checkpoint.global_step:,}; charts will show a gap"
        lines.insert(0, gap)
    return lines
