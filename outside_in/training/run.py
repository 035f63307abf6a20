"""One run from start to end: plan, restore or build, train, report."""

import argparse
from typing import Any

import jax

import checkpointing
from checkpointing import Checkpoint
from outside_in.config import ModelConfig, TrainConfig, devices_at_start
from outside_in.data.run_length import fetch_and_count_steps, known_data
from outside_in.diagnostics import preflight
from outside_in.layers.kernels import describe_attention
from outside_in.overrides import MODEL, in_effect, parse, train_line
from outside_in.reports.flops import describe_peak
from outside_in.reports.loggers import check_installed
from outside_in.runtime import processes
from outside_in.runtime.cli import DONE
from outside_in.runtime.devices import device_kind, initialize_devices
from outside_in.runtime.log import log
from outside_in.runtime.signals import StopRequest, listening
from outside_in.runtime.timing import TimeBudget
from outside_in.storage.run_directory import RunDirectory
from outside_in.training import resume_checks
from outside_in.training.loop import train
from outside_in.training.monitor import StepMonitor
from outside_in.training.pictures import page_of
from outside_in.training.setup import Plan, build, plan_run, restore, start
from outside_in.training.state import TrainState
from outside_in.training.summary import describe_end


def run_training(
    run: RunDirectory,
    model_config: ModelConfig,
    config: TrainConfig,
    args: argparse.Namespace,
    stop: StopRequest,
    time_budget: TimeBudget,
) -> int:
    """Train a run, or resume it; return the exit code."""
    overrides = in_effect((key for key in parse(args.changes) if not key.startswith(MODEL)), config)
    check_same(model_config, config, args, overrides)
    processes.on_main_process(check_installed, run, config.log_to)
    checkpoint, accepted = find_start(run, args.from_checkpoint), set()
    if checkpoint:
        resume_checks.check_form(checkpoint.meta, checkpoint.path / checkpointing.META_FILE)
        accepted = resume_checks.check_configs(
            checkpoint.meta, model_config, config, accept=args.accept_changes, overrides=overrides
        )
        total = fetch_and_count_steps(model_config, config, devices_at_start(config, checkpoint.meta))
        is_finished = checkpoint.global_step == total and checkpoint.is_validated
        keep = config.keep_checkpoints if is_finished else None
        processes.on_main_process(checkpointing.repair_links_and_prune, run.checkpoints, keep)
        if is_finished:
            log.info(f"{run.path} is finished: step {total:,} of {total:,}, {checkpoint.path}")
            return DONE
    log.info(initialize_devices())
    plan = plan_run(run, model_config, config, checkpoint, overrides)
    announce(plan)
    state = build(plan, time_budget)
    monitor = StepMonitor(state, pattern=args.hash_parameters, debug_checks=args.debug_checks)
    if state.val_stream is None:
        log.info("no validation tokens: the best checkpoint is the one with the lowest training loss")
    if checkpoint:
        accept = args.accept_changes or not resume_checks.OF_VALIDATION.isdisjoint(accepted)
        restore(checkpoint, state, accept=accept, commit_again=args.from_checkpoint is not None)
    else:
        start(state)
    resume_line = f"type the same line again ({train_line(args.run, args.changes)})"
    leaving = f"exited at once; to resume from the last checkpoint, {resume_line}"
    with listening(stop, "stopping after this step; a second Ctrl-C exits at once", leaving), page_of(state):
        train(state, stop, monitor)
        stop.apply(processes.all_max(stop.pending_stop()))  # what came too late for the last step
    return report(state, stop, resume_line)


def check_same(
    model_config: ModelConfig, config: TrainConfig, args: argparse.Namespace, overrides: dict[str, Any]
) -> None:
    """Raise ValueError when the processes have different configs, overrides or options."""
    options = {name: getattr(args, name) for name in ("from_checkpoint", "accept_changes", "hash_parameters")}
    configs = {"model.json": model_config.model_dump(), "train.json": config.model_dump()}
    with processes.propagate_errors():
        processes.check_same({"the command line": options | overrides} | configs)


def find_start(run: RunDirectory, which: str | None) -> Checkpoint | None:
    """Return the checkpoint to resume from; None for a new run. The main process selects it for all."""
    name = None
    with processes.propagate_errors():
        if processes.is_main_process():
            selected = checkpointing.select_checkpoint(run.checkpoints, which)
            name = selected and selected.path.name
    name = processes.broadcast(name)
    return Checkpoint(run.checkpoints / name) if name else None


def announce(plan: Plan) -> None:
    """Log what the run will be, need and use."""
    config, kind = plan.config, device_kind()
    for line in preflight.describe(plan.run, plan.model_config, config, known_data(config), plan.mesh):
        log.info(line)
    if kind == "cpu":  # has neither a known peak nor cuDNN
        return
    log.info(describe_peak(kind, config.precision))
    if plan.model_config.n_layers:
        log.info(
            describe_attention(config.precision, plan.model_config.head_width, config.drop_rate, jax.default_backend())
        )


def report(state: TrainState, stop: StopRequest, resume_line: str) -> int:
    """Log how a run has ended and what to type next. Returns the exit code."""
    step, total = state.global_step, state.total_steps
    is_finished = step == total and not state.needs_validation
    if processes.is_main_process():
        for line in describe_end(state, is_finished=is_finished):
            log.info(line)
    if is_finished:
        log.info(f"finished: step {step:,} of {total:,}; see {state.run.report}")
        return stop.exit_code if stop else DONE  # in a folder of runs the next one must not start
    where = f"and saved at step {step:,} of {total:,}" if step else "before the first step"
    log.info(f"stopped {where}; to resume, {resume_line}")
    return stop.exit_code
