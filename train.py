"""Train a run, or go on with it: `uv run train.py runs/NAME`."""

import argparse
import math
import signal
import traceback
from pathlib import Path

import jax
from tqdm import tqdm

import checkpointing
import command_line
import drift
import fitting
import overfitting
import preflight
from command_line import say
from comparison import CHART, compare
from config import ModelConfig, TrainConfig, load_config
from interruption import StopRequest, listening
from mesh import describe_devices
from run_directory import RunDirectory, find_runs
from saving import Saver
from starting import describe_progress, go_on_from, set_up, tokens_available, whole_steps
from steps import compile_train_step
from training import (
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
from watching import Watcher

RUNS = Path("runs")


def main(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # where there is nothing to save yet, it must not kill
    watching = args.from_checkpoint or args.hash_parameters or args.debug_checks or args.accept_changes
    if args.instead and watching:
        raise ValueError("expected one of --check, --overfit-one-batch, --find-microbatch alone: it trains nothing")
    if args.run is None:
        if args.hash_parameters:  # which would take the run's folder for its pattern
            raise ValueError("expected the run before --hash-parameters: uv run train.py runs/NAME --hash-parameters")
        return list_runs()
    run = RunDirectory(args.run)
    run.check()
    runs = find_runs(args.run)
    if run.train_config.exists() or not runs:
        return train_one(run, args, StopRequest())
    return train_all(runs, args)


def train_one(run: RunDirectory, args: argparse.Namespace, stop: StopRequest) -> int:
    model_config = load_config(run.model_config, ModelConfig)
    config = load_config(run.train_config, TrainConfig)
    try:
        if args.instead:
            return args.instead(run, model_config, config)
        with run.lock():
            return train_or_go_on(run, model_config, config, args, stop)
    except Exception as error:
        if not command_line.is_out_of_device_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # which hold the model
        raise ValueError(fitting.advice(model_config, config, str(error))) from error


def describe(run: RunDirectory, model_config: ModelConfig, config: TrainConfig) -> int:
    """Print what a run will be and need."""
    print(*preflight.describe(run, model_config, config, tokens_available(config)), sep="\n")
    return command_line.DONE


def find_microbatch(_run: RunDirectory, model_config: ModelConfig, config: TrainConfig) -> int:
    """Print what each `microbatch_size` that was tried needs, and the largest that fits."""
    say(describe_devices())
    print(*fitting.report(model_config, config), sep="\n")
    return command_line.DONE


def overfit_one_batch(run: RunDirectory, model_config: ModelConfig, config: TrainConfig) -> int:
    """Say whether a fresh model can learn the first microbatch by heart; the run's folder is left alone."""
    say(describe_devices())
    losses = []
    with tqdm(total=overfitting.MOST_STEPS, unit="step", dynamic_ncols=True) as bar:
        for loss in overfitting.overfit(model_config, config, whole_steps(run, model_config, config) // config.epochs):
            losses.append(loss)
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()
    say(overfitting.verdict(losses))
    return command_line.DONE


def train_all(runs: list[RunDirectory], args: argparse.Namespace) -> int:
    """Train the runs of a folder one after the other, and compare them; one that fails does not stop the others."""
    if args.from_checkpoint:
        raise ValueError(f"{args.run}: expected one run with --from, got a folder of {len(runs)}; name one of them")
    for run in runs:  # a typing error in the last one should not show after hours
        load_config(run.model_config, ModelConfig), load_config(run.train_config, TrainConfig)
    failed, stop = False, StopRequest()
    for number, run in enumerate(runs, start=1):
        say(f"run {number} of {len(runs)}: {run.path}")
        try:
            code = train_one(run, args, stop)
        except Exception as error:
            code = command_line.complain(error, debug=args.debug)
        if stop or code >= command_line.INTERRUPTED:  # also when saving failed then
            return code
        failed |= code != command_line.DONE
    if any(run.metrics.exists() for run in runs) and not args.instead:
        print(*compare(runs, "tokens", args.run / CHART), sep="\n")
    return command_line.FAILED if failed else command_line.DONE


def list_runs() -> int:
    """Print a line for every run below `runs/`: new, at step N of M, or finished."""
    runs = find_runs(RUNS)
    width = max((len(str(run.path)) for run in runs), default=0)
    for run in runs:
        try:
            status = describe_progress(run)
        except ValueError as error:
            status = f"error: {error}"
        print(f"{run.path!s:{width}}  {status}")
    print("uv run train.py runs/NAME trains one, or goes on with it")
    return command_line.DONE


def train_or_go_on(
    run: RunDirectory, model_config: ModelConfig, config: TrainConfig, args: argparse.Namespace, stop: StopRequest
) -> int:
    total = whole_steps(run, model_config, config)
    checkpoint, complaints = checkpointing.choose(run.checkpoints, args.from_checkpoint)
    say(*complaints)
    if checkpoint:
        drift.check_form(checkpoint.meta, checkpoint.path / checkpointing.META_FILE)
        say(*drift.check_configs(checkpoint.meta, model_config, config, accept=args.accept_changes))
        is_finished = checkpoint.global_step == total and checkpoint.meta.get("is_milestone", True)
        checkpointing.settle(run.checkpoints, config.keep_checkpoints if is_finished else None)
        if is_finished:
            say(f"{run.path} is finished: step {total:,} of {total:,}, {run.checkpoints / 'latest'}")
            return command_line.DONE
    say(describe_devices())
    say(*preflight.describe(run, model_config, config, tokens_available(config)))
    training = set_up(run, model_config, config, total)
    watcher = Watcher(training, pattern=args.hash_parameters, debug_checks=args.debug_checks)
    if training.val_stream is None:
        say("no validation tokens: best goes by training loss")
    if checkpoint:
        from_one, accept = args.from_checkpoint is not None, args.accept_changes
        say(*go_on_from(checkpoint, training, accept=accept, commit_again=from_one))
    else:
        say(*set_history_aside(training))
        cut_after(training, 0)
    resume_line = f"uv run train.py {args.run}"
    with listening(
        stop,
        "stopping after this step; a second Ctrl-C leaves at once",
        f"left at once; to go on from the last checkpoint: {resume_line}",
    ):
        train(training, stop, watcher)
    if training.global_step == total and not training.lacks_milestone:
        share = training.seconds_paused / training.seconds
        say(f"finished: {training.seconds:,.0f} s of training, {share:.1%} of them waiting for checkpoints")
        return stop.exit_code if stop else command_line.DONE  # in a folder of runs the next one must not start
    where = (
        f"and saved at step {training.global_step:,} of {total:,}" if training.global_step else "before the first step"
    )
    say(f"stopped {where}; to go on: {resume_line}")
    return stop.exit_code


def train(training: Training, stop: StopRequest, watcher: Watcher) -> None:
    """Train to the end of the run or until a stop is asked for, and save the last step either way.

    Raises RuntimeError, with everything saved, when too many updates in a row were rejected.
    """
    config, total = training.config, training.total_steps
    seed_key = jax.random.key(config.seed)
    batch, checksum = place_batch(training)
    in_flight: list[tuple[int, list[Report], int]] = []  # steps whose reports are still on the device, one step late
    is_stuck, finding = False, None
    say(ABOUT_TO_STEP)
    step = compile_train_step(training.model, training.optimizer, batch[0], seed_key, config)
    say(fitting.check(step, training.model_config, config))
    with (
        Saver(training, lambda: bool(stop)) as saver,
        tqdm(total=total, initial=training.global_step, unit="step", dynamic_ncols=True) as bar,
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
                batch, checksum = place_batch(training)  # while the device works on this step
            say(*watcher.after_step(reports))
            is_due, is_wanted = at_milestone(training), stop.take_save_request()
            while len(in_flight) > (0 if is_due or is_wanted else 1):
                is_stuck |= finish_step(training, *in_flight.pop(0), bar)
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
        where = f"; {known} says where it fails" if known.exists() else ""
        raise RuntimeError(
            f"{config.max_consecutive_rejections} updates in a row were rejected, their gradients were not finite; "
            f"saved at step {training.global_step:,} with the last good parameters: go on --from best with a lower "
            f"learning_rate, or look at the data{where}"
        )


def finish_step(training: Training, step: int, reports: list[Report], checksum: int, bar: tqdm) -> bool:
    """Wait for a step, show it, and say whether too many updates in a row were rejected."""
    record, lines = collect(training, step, reports, checksum)
    say(*lines)
    loss = math.nan if record["loss"] is None else record["loss"]
    bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second(training):,.0f} tokens/s", refresh=False)
    bar.update()
    return record["consecutive_rejections"] >= training.config.max_consecutive_rejections


def make_parser() -> command_line.ArgumentParser:
    parser = command_line.ArgumentParser(description="Train a run, or go on with it.")
    parser.add_argument(
        "run", nargs="?", type=Path, help="the run's folder, or a folder of runs; without one, list them"
    )
    parser.add_argument(
        "--from",
        dest="from_checkpoint",
        metavar="CHECKPOINT",
        help="go on from this checkpoint: best, latest, or the name of one",
    )
    parser.add_argument("--accept-changes", action="store_true", help="go on although announced keys have changed")
    parser.add_argument(
        "--hash-parameters",
        nargs="?",
        const="*",
        metavar="PATTERN",
        help="print a hash of every parameter, or of those like 'blocks.0.*', after every step; marks unchanged ones",
    )
    parser.add_argument(
        "--debug-checks",
        action="store_true",
        help="stop at the first parameter, hidden state, logit, loss or gradient that is not finite, and say where; "
        "every step then takes more than twice as long",
    )
    instead = parser.add_mutually_exclusive_group()
    for option, function, text in (
        ("--check", describe, "print what the run will be and need"),
        ("--overfit-one-batch", overfit_one_batch, "see whether a fresh model can learn the first batch by heart"),
        ("--find-microbatch", find_microbatch, "find the largest microbatch_size that fits, by compiling"),
    ):
        instead.add_argument(
            option, dest="instead", action="store_const", const=function, help=f"{text}, and stop; writes nothing"
        )
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
