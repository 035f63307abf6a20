"""The training loop: a run from its checkpoint, or its beginning, to its end or to a stop that is asked for."""

import argparse
import math
import shlex

import jax
from jax.sharding import Mesh
from tqdm import tqdm

import checkpointing
from outside_in.config import ModelConfig, TrainConfig, with_sequences_per_step
from outside_in.diagnostics import memory, preflight
from outside_in.layers.kernels import describe_attention
from outside_in.reports.flops import describe_peak, mfu
from outside_in.runtime import cli, processes
from outside_in.runtime.cli import say
from outside_in.runtime.mesh import describe_devices, device_kind, make_mesh
from outside_in.runtime.signals import StopRequest, listening
from outside_in.runtime.timing import Stopwatch
from outside_in.storage.run_directory import RunDirectory
from outside_in.train_step import compile_train_step, steps_ahead
from outside_in.training import resume_checks
from outside_in.training.checkpoint_writer import Saver
from outside_in.training.monitor import Watcher
from outside_in.training.setup import (
    devices_at_start,
    go_on_from,
    leaked_share,
    set_up,
    start_from_weights,
    tokens_available,
    whole_steps,
)
from outside_in.training.state import (
    ABOUT_TO_STEP,
    Report,
    Training,
    at_milestone,
    collect,
    cut_after,
    note_metrics,
    place_batch,
    set_history_aside,
    tokens_per_second,
)


def train_or_go_on(
    run: RunDirectory,
    model_config: ModelConfig,
    config: TrainConfig,
    args: argparse.Namespace,
    stop: StopRequest,
    stopwatch: Stopwatch,
) -> int:
    check_same(model_config, config, args)
    checkpoint = choose_checkpoint(run, args.from_checkpoint)
    devices = 0  # on which the run has begun
    if checkpoint:
        resume_checks.check_form(checkpoint.meta, checkpoint.path / checkpointing.META_FILE)
        say(*resume_checks.check_configs(checkpoint.meta, model_config, config, accept=args.accept_changes))
        devices = devices_at_start(config, checkpoint.meta)
        total = whole_steps(run, model_config, config, devices)
        is_finished = checkpoint.global_step == total and checkpoint.meta.get("is_milestone", True)
        with processes.together():
            if processes.is_first():
                checkpointing.settle(run.checkpoints, config.keep_checkpoints if is_finished else None)
        if is_finished:
            say(f"{run.path} is finished: step {total:,} of {total:,}, {run.checkpoints / 'latest'}")
            return cli.DONE
    say(describe_devices())
    mesh = make_mesh(config.mesh)
    devices = devices or mesh.devices.size
    total = whole_steps(run, model_config, config, devices)
    own = config.gradient_accumulation_steps * config.microbatch_size
    given, config = config, with_sequences_per_step(config, devices * own, mesh.devices.size)
    announce(run, model_config, config, mesh)
    training = set_up(run, model_config, config, total, mesh, stopwatch, given)
    watcher = Watcher(training, pattern=args.hash_parameters, debug_checks=args.debug_checks)
    if training.val_stream is None:
        say("no validation tokens: best goes by training loss")
    if checkpoint:
        from_one, accept = args.from_checkpoint is not None, args.accept_changes
        say(*go_on_from(checkpoint, training, accept=accept, commit_again=from_one))
    else:
        with processes.together():
            say(*start_from_weights(training), *set_history_aside(training))
            cut_after(training, 0)
    resume_line = f"uv run train.py {args.run}"
    with listening(
        stop,
        "stopping after this step; a second Ctrl-C leaves at once",
        f"left at once; to go on from the last checkpoint: {resume_line}",
    ):
        train(training, stop, watcher)
        stop.heed(processes.largest(stop.wish() if stop.shared else 0))  # what came too late for the last step
    say(stopwatch.describe())
    if training.global_step == total and not training.lacks_milestone:
        share = training.seconds_paused / training.seconds
        say(f"finished: {training.seconds:,.0f} s of training, {share:.1%} of them waiting for checkpoints")
        return stop.exit_code if stop else cli.DONE  # in a folder of runs the next one must not start
    where = (
        f"and saved at step {training.global_step:,} of {total:,}" if training.global_step else "before the first step"
    )
    say(f"stopped {where}; to go on: {resume_line}")
    return stop.exit_code


def check_same(model_config: ModelConfig, config: TrainConfig, args: argparse.Namespace) -> None:
    """Raise ValueError when the processes of a run were told different things."""
    told = {name: getattr(args, name) for name in ("from_checkpoint", "accept_changes", "hash_parameters")}
    configs = {"model.json": model_config.model_dump(), "train.json": config.model_dump()}
    with processes.together():
        processes.check_same(configs | {"the command line": told})


def announce(run: RunDirectory, model_config: ModelConfig, config: TrainConfig, mesh: Mesh) -> None:
    """Say what the run will be, need and use."""
    available, leaked = tokens_available(config), leaked_share(config)
    say(*preflight.describe(run, model_config, config, available, leaked, mesh))
    say(describe_peak(device_kind(), config.precision))
    if model_config.n_layers:
        say(describe_attention(config.precision, model_config.head_width, config.drop_rate, jax.default_backend()))


def choose_checkpoint(run: RunDirectory, which: str | None) -> checkpointing.Checkpoint | None:
    """Choose as `checkpointing.choose` does: the first process for all of them."""
    name = None
    with processes.together():
        if processes.is_first():
            chosen, complaints = checkpointing.choose(run.checkpoints, which)
            say(*complaints)
            name = chosen and chosen.path.name
    name = processes.from_the_first(name)
    return checkpointing.Checkpoint(run.checkpoints / name) if name else None


def train(training: Training, stop: StopRequest, watcher: Watcher) -> None:
    """Train to the end of the run or until a stop is asked for, and save the last step either way.

    Raises RuntimeError, with everything saved, when too many updates in a row were rejected.
    """
    config, total, stopwatch = training.config, training.total_steps, training.stopwatch
    seed_key = jax.random.key(config.seed)
    batch, checksum = place_batch(training, stop.wish() if stop.shared else 0)
    in_flight: list[tuple[int, list[Report], int]] = []  # steps whose reports are still on the device
    is_stuck, finding, quiet = False, None, not processes.is_first()
    say(ABOUT_TO_STEP)
    stopwatch.turn_to("compiling")
    step = compile_train_step(training.model, training.optimizer, batch[0], seed_key, config, training.mesh)
    say(memory.check(step, training.model_config, config))
    stopwatch.turn_to("steps")
    with (
        Saver(training, lambda: bool(stop)) as saver,
        tqdm(total=total, initial=training.global_step, unit="step", dynamic_ncols=True, disable=quiet) as bar,
    ):
        if training.lacks_milestone:
            say(*saver.save(is_milestone=True))
        while training.global_step < total and not stop and not is_stuck:
            finding = watcher.before_step(batch, seed_key)
            if finding:
                break
            reports = [step(training.model, training.optimizer, part, seed_key) for part in batch]
            training.global_step += 1
            in_flight.append((training.global_step, reports, checksum))
            if training.global_step < total:
                with stopwatch.during("preparing data"):  # while the device works on this step
                    batch, checksum = place_batch(training, stop.wish() if stop.shared else 0)
            say(*watcher.after_step(reports))
            is_due, is_wanted = at_milestone(training), stop.take_save_request()
            while len(in_flight) > (0 if is_due or is_wanted else steps_ahead()):
                is_stuck |= finish_step(training, *in_flight.pop(0), bar)
                stop.heed(training.wish)
            if is_due or is_wanted:
                say(*saver.save(is_milestone=is_due))
            say(*saver.news(), *note_metrics(training))
        for finished in in_flight:
            is_stuck |= finish_step(training, *finished, bar)
        say(*saver.finish(is_milestone=at_milestone(training), prune=not (is_stuck or finding)))
    if finding:
        raise RuntimeError(finding + (f"; saved at step {training.global_step:,}" if training.global_step else ""))
    if is_stuck:
        known = training.run.rejected(training.global_step)
        where = f" ({known} says where)" if known.exists() else ""
        raise RuntimeError(
            f"{config.max_consecutive_rejections} updates in a row were rejected: their gradients, or the norms of "
            f"these, were not finite{where}; saved at step {training.global_step:,} with the last good parameters; "
            + way_back(training)
        )


def way_back(training: Training) -> str:
    """Say what to type after too many rejections."""
    run, uniform = training.run, math.log(training.model_config.vocab_size)
    start = f"uv run train.py {shlex.quote(str(run.path))}"
    again = f"lower learning_rate, move {run.checkpoints} away, and start again: {start}"
    best = [c for c in checkpointing.find_checkpoints(run.checkpoints) if c.is_best][-1:]
    if not best:
        return f"there is no best checkpoint to go back to: {again}"
    loss = best[0].meta.get("val_loss" if training.val_stream else "avg_train_loss")
    if loss is not None and loss > uniform:  # None: whether there is validation has changed since
        of_step = f"the best checkpoint, of step {best[0].global_step:,}, is no better than a uniform guess"
        return f"{of_step}: its loss is {loss:.4f}, that of a guess {uniform:.4f}, so it has diverged too: {again}"
    return f"lower learning_rate, or look at the data, and go back: {start} --from best --accept-changes"


def finish_step(training: Training, step: int, reports: list[Report], checksum: int, bar: tqdm) -> bool:
    """Wait for a step, show it, and say whether too many updates in a row were rejected."""
    record, lines = collect(training, step, reports, checksum)
    say(*lines)
    loss = math.nan if record["loss"] is None else record["loss"]
    speed = tokens_per_second(training)
    speed_of_one = speed / training.mesh.devices.size
    share = mfu(speed_of_one, training.model_config, device_kind(), training.config.precision)
    shown_share = f", MFU {share:.1%}" if share else ""
    bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s{shown_share}", refresh=False)
    bar.update()
    return record["consecutive_rejections"] >= training.config.max_consecutive_rejections
