"""How a run starts or resumes: plan, tokens, model and optimizer."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

import checkpointing
from checkpointing import Checkpoint
from model import model_of
from outside_in.config import (
    ModelConfig,
    TrainConfig,
    devices_at_start,
    tokens_per_global_step,
    with_sequences_per_step,
)
from outside_in.config_files import load_config
from outside_in.data.loader import ENTROPY_SAMPLE, TokenStream, fingerprint, open_streams, unigram_loss
from outside_in.data.run_length import fetch_and_count_steps, find_data_tokenizer, spare_sequences, total_steps
from outside_in.data.sources import dataset_folder, dataset_revision
from outside_in.data.tokenizer import Tokenizer
from outside_in.diagnostics.preflight import check_fits
from outside_in.inference.load import find_initial_weights
from outside_in.optimizer import make_optimizer
from outside_in.overrides import as_arguments, as_trained
from outside_in.runtime import processes
from outside_in.runtime.cli import DONE
from outside_in.runtime.log import log
from outside_in.runtime.mesh import local_sequence_slice, make_mesh, place
from outside_in.runtime.timing import TimeBudget
from outside_in.storage import manifest, samples
from outside_in.storage.checkpoint_folder import beats
from outside_in.storage.metrics import MetricsLog
from outside_in.storage.run_directory import RunDirectory, find_runs
from outside_in.training import events, resume_checks
from outside_in.training.state import TrainState, forget_after, set_history_aside
from outside_in.weights import load_model


@dataclass(frozen=True)
class Plan:
    """What a run will be on the present devices."""

    run: RunDirectory
    model_config: ModelConfig
    config: TrainConfig  # with as many microbatches as the mesh takes
    config_as_written: TrainConfig  # in train.json and on the command line
    overrides: dict[str, Any]  # of the command line
    mesh: Mesh
    total_steps: int
    grown: tuple[int, ...] = ()  # steps at which the first epoch was made longer
    spare: int = 0  # sequences beside those of an epoch's whole steps


def plan_run(
    run: RunDirectory,
    model_config: ModelConfig,
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    overrides: dict[str, Any],
) -> Plan:
    """Return a run's plan. A run keeps the sequences per global step with which it started, on any devices."""
    mesh = make_mesh(config.mesh)
    devices = devices_at_start(config, checkpoint.meta) if checkpoint else mesh.devices.size
    sequences = devices * config.gradient_accumulation_steps * config.microbatch_size
    adapted = with_sequences_per_step(config, sequences, mesh.devices.size)
    total = fetch_and_count_steps(model_config, config, devices)
    length, steps = model_config.context_length, total // config.epochs
    grown = resume_checks.check_length(checkpoint, total, sequences * length, config)
    spare = spare_sequences(model_config, config, steps, devices)
    if checkpoint and grown == tuple(checkpoint.meta.get("grown", ())):  # as long as it was: then as it was
        spare = resume_checks.num_spare(checkpoint.meta, steps * sequences, length)
    return Plan(run, model_config, adapted, config, overrides, mesh, total, grown, spare)


def describe_progress(run: RunDirectory) -> str:
    """Return a run's progress: new, at step N of M, or finished. Raises ValueError when its files are wrong."""
    config, model_config = load_config(run.train_config, TrainConfig), load_config(run.model_config, ModelConfig)
    checkpoints = checkpointing.find_checkpoints(run.checkpoints)
    if not checkpoints:
        total_steps(model_config, config)  # raises when something is wrong
        return "new"
    step, meta = checkpoints[-1].global_step, checkpoints[-1].meta
    config = as_trained(run, config, meta)
    total = total_steps(model_config, config, devices_at_start(config, meta))
    with_overrides = f", with {shlex.join(as_arguments(meta['overrides']))}" if meta.get("overrides") else ""
    if step == total:
        return "finished" + with_overrides
    return f"at step {step:,}" + (f" of {total:,}" if total else "") + with_overrides


def list_runs(folder: Path) -> int:
    """Print a line for every run below a folder. Returns the exit code."""
    runs = find_runs(folder)
    width = max((len(str(run.path)) for run in runs), default=0)
    for run in runs:
        try:
            status = describe_progress(run)
        except ValueError as error:
            status = f"error: {error}"
        print(f"{run.path!s:{width}}  {status}")
    print("uv run train.py runs/NAME trains one, or resumes it")
    return DONE


def build(plan: Plan, time_budget: TimeBudget) -> TrainState:
    """Load the tokens, and build a fresh model and optimizer."""
    config, mesh = plan.config, plan.mesh
    with processes.propagate_errors():
        folder = dataset_folder(config.dataset)
        tokenizer = find_data_tokenizer(plan.model_config, config)
        local_sequences = local_sequence_slice(mesh, config.microbatch_size)
        steps = plan.total_steps // config.epochs
        train_stream, val_stream = open_streams(
            folder,
            plan.model_config,
            config,
            steps,
            mesh.devices.size,
            grown=plan.grown,
            spare=plan.spare,
            local_sequences=local_sequences,
        )
    fingerprints = {
        "train": fingerprint(train_stream.tokens) if processes.is_main_process() else None,
        "validation": fingerprint(val_stream.tokens) if val_stream else None,
        "revision": dataset_revision(folder),
    }
    fingerprints = processes.broadcast(fingerprints)
    check_fits(plan.model_config, config, mesh)
    model = model_of(plan.model_config, config)
    place(model, mesh)
    tokens_per_step = tokens_per_global_step(plan.model_config, config, mesh.devices.size)
    optimizer = make_optimizer(model, config, plan.total_steps, tokens_per_step)
    place(optimizer, mesh)
    return TrainState(
        run=plan.run,
        model_config=plan.model_config,
        config=config,
        mesh=mesh,
        total_steps=plan.total_steps,
        model=model,
        optimizer=optimizer,
        train_stream=train_stream,
        val_stream=val_stream,
        snapshot=resume_checks.snapshot(plan.model_config, plan.config_as_written, fingerprints, tokenizer)
        | {"grown": list(plan.grown), "overrides": plan.overrides},
        tokenizer=tokenizer,
        bytes_per_token=bytes_per_token(tokenizer, val_stream or train_stream),
        reference_losses=reference_losses(plan.model_config, train_stream, val_stream),
        time_budget=time_budget,
        metrics=MetricsLog(plan.run.metrics, enabled=processes.is_main_process()),
    )


def bytes_per_token(tokenizer: Tokenizer | None, stream: TokenStream) -> float | None:
    """Return the mean number of bytes that a token to predict stands for; None where that is unknown."""
    targets = np.asarray(stream.tokens[1:ENTROPY_SAMPLE])
    if tokenizer is None or stream.objective == "a-to-a" or targets.max() >= tokenizer.vocab_size:
        return None
    return tokenizer.count_bytes(targets, is_start=False) / targets.size or None


def reference_losses(model_config: ModelConfig, train: TokenStream, validation: TokenStream | None) -> dict[str, float]:
    """Return losses in nats to compare a run's with, by name."""
    uniform = math.log(model_config.vocab_size)
    unigram = unigram_loss(train.tokens, (validation or train).tokens, model_config.vocab_size)
    losses = {f"uniform guess, ln({model_config.vocab_size:,})": uniform}
    return losses | ({"token frequencies of training": unigram} if unigram < uniform - 0.05 else {})


def start(state: TrainState) -> None:
    """Start a new run, without history, from `initial_weights` if set."""
    with processes.propagate_errors():
        load_initial_weights(state)
        state.events = events.started(state.snapshot)
        set_history_aside(state)
        forget_after(state, 0)


def load_initial_weights(state: TrainState) -> None:
    """Load `initial_weights`, if set, into a fresh model. Raises ValueError when they are another model's."""
    if path := find_initial_weights(state.run, state.model_config, state.config):
        manifest.check_alone(path)
        load_model(path, state.model)
        log.info(f"starting from the weights in {path}")


def restore(checkpoint: Checkpoint, state: TrainState, *, accept: bool, commit_again: bool) -> None:
    """Load a checkpoint, and drop the metrics and samples of later steps.

    `accept` allows other validation tokens. `commit_again` makes it the newest, so that the next start resumes from it
    too.
    """
    resume_checks.check_tokenizer(checkpoint.meta, state.snapshot)
    count = resume_checks.num_train_tokens(checkpoint.meta) or 0
    data = state.snapshot["data"]
    if count < state.train_stream.tokens.size:  # the run has been made longer
        tokens = state.train_stream.tokens[:count]
        data = data | {"train": processes.broadcast(fingerprint(tokens) if processes.is_main_process() else None)}
    resume_checks.check_data(checkpoint.meta, data, accept=accept)
    with processes.propagate_errors():
        checkpointing.load(checkpoint, state.model, state.optimizer)
    state.global_step = state.saved_step = checkpoint.global_step
    state.seconds_before = checkpoint.meta["seconds_trained"]
    state.seconds_paused = checkpoint.meta.get("seconds_paused", 0.0)
    state.events = events.resumed(checkpoint.meta, state.snapshot)
    if commit_again:
        meta, model_json = (
            checkpoint.meta | state.snapshot | {"events": state.events},
            state.model_config.model_dump_json(),
        )
        before = [other for other in checkpointing.find_checkpoints(state.run.checkpoints) if other <= checkpoint]
        is_best_now = checkpoint.is_validated and beats(meta, state.measure, before)  # better ones may be gone
        meta["is_best"] = checkpoint.is_best or is_best_now
        copy = checkpointing.snapshot(state.run.checkpoints, state.model, state.optimizer, state.global_step)
        processes.on_main_process(checkpointing.save, state.run.checkpoints, copy, meta, model_json, state.files)
    with processes.propagate_errors():
        forget_after(state, state.global_step)
    steps = state.records.column("global_step")
    has_record = state.global_step in steps[-1:]
    needs_validation = not checkpoint.is_validated and state.is_at_milestone and has_record
    state.needs_validation = processes.broadcast(needs_validation)
    if state.needs_validation and processes.is_main_process():  # its sample comes once more
        samples.cut_after(state.run.samples, state.global_step - 1)
    if not np.array_equal(steps, np.arange(1, state.global_step + 1)):
        log.warning(f"{state.run.metrics} lacks steps before {state.global_step:,}; charts will show a gap")
    log.info(f"resuming from step {state.global_step:,} of {state.total_steps:,}, {checkpoint.path}")
