"""Train a run, or go on with it: `uv run train.py runs/NAME`.

JAX and its kin take seconds to import: functions import them when they need them, so that typing errors are told at
once.
"""

import argparse
import contextlib
import os
import signal
import traceback
from pathlib import Path

from tqdm import tqdm

from outside_in.config import ModelConfig, TrainConfig, load_config
from outside_in.runtime import cli
from outside_in.runtime.cli import say
from outside_in.runtime.signals import StopRequest
from outside_in.runtime.timing import Stopwatch
from outside_in.storage.run_directory import RunDirectory, find_runs

RUNS = Path("runs")


def main(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # where there is nothing to save yet, it must not kill
    watching = args.from_checkpoint or args.hash_parameters or args.debug_checks or args.accept_changes
    if args.instead and watching:
        raise ValueError("expected one of --check, --overfit-one-batch, --find-microbatch alone: it trains nothing")
    if args.no_compilation_cache:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # which JAX reads when it is imported
    if args.run is None:
        if args.hash_parameters:  # which would take the run's folder for its pattern
            raise ValueError("expected the run before --hash-parameters: uv run train.py runs/NAME --hash-parameters")
        return list_runs()
    run = RunDirectory(args.run)
    run.check()
    runs = find_runs(args.run)
    stop = StopRequest()
    if args.distributed and (args.instead or args.debug_checks):
        raise ValueError("--distributed: expected neither --check, --debug-checks nor the like: one process does those")
    if args.distributed:
        meet(args, stop)
    elif args.coordinator or args.processes is not None or args.process is not None:
        raise ValueError("--coordinator, --processes and --process: go with --distributed")
    if run.train_config.exists() or not runs:
        return train_one(run, args, stop)
    return train_all(runs, args, stop)


def train_one(run: RunDirectory, args: argparse.Namespace, stop: StopRequest) -> int:
    model_config = load_config(run.model_config, ModelConfig)
    config = load_config(run.train_config, TrainConfig)
    stopwatch = Stopwatch("starting")
    try:
        if args.instead:
            return args.instead(run, model_config, config)
        with locked(run, args):
            from outside_in.training.loop import train_or_go_on

            return train_or_go_on(run, model_config, config, args, stop, stopwatch)
    except Exception as error:
        if not cli.is_out_of_device_memory(error):
            raise
        from outside_in.diagnostics import memory

        traceback.clear_frames(error.__traceback__)  # which hold the model
        raise ValueError(memory.advice(model_config, config, str(error))) from error


def locked(run: RunDirectory, args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Hold the run for this process, or for all of those that train it together."""
    if not args.distributed:
        return run.lock()
    from outside_in.runtime.processes import by_the_first

    return by_the_first(run.lock())


def meet(args: argparse.Namespace, stop: StopRequest) -> None:
    """Meet the other processes of a run; all but the first one are quiet from now on."""
    by_hand = (args.coordinator, args.processes, args.process)
    if None in by_hand and by_hand != (None, None, None):
        raise ValueError("--distributed: expected all of --coordinator, --processes and --process, or none of them")
    if args.coordinator is not None:
        host, _, port = args.coordinator.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65_535:
            raise ValueError(f"--coordinator: expected HOST:PORT, got {args.coordinator}")
        if not 0 <= args.process < args.processes:
            raise ValueError(
                f"--process: expected a number from 0 to --processes - 1, got {args.process} of {args.processes}"
            )
    from outside_in.runtime.processes import is_first, join

    join(*by_hand)
    stop.shared = True
    if not is_first():
        cli.be_quiet()


def describe(run: RunDirectory, model_config: ModelConfig, config: TrainConfig) -> int:
    """Print what a run will be and need."""
    from outside_in.diagnostics import preflight
    from outside_in.runtime.mesh import describe_devices, make_mesh
    from outside_in.training.setup import leaked_share, tokens_available

    print(describe_devices())
    available, leaked = tokens_available(config), leaked_share(config)
    print(*preflight.describe(run, model_config, config, available, leaked, make_mesh(config.mesh)), sep="\n")
    return cli.DONE


def find_microbatch(_run: RunDirectory, model_config: ModelConfig, config: TrainConfig) -> int:
    """Print what each `microbatch_size` that was tried needs, and the largest that fits."""
    from outside_in.diagnostics import memory
    from outside_in.runtime.mesh import describe_devices

    say(describe_devices())
    print(*memory.report(model_config, config), sep="\n")
    return cli.DONE


def overfit_one_batch(run: RunDirectory, model_config: ModelConfig, config: TrainConfig) -> int:
    """Say whether a fresh model can learn the first microbatch by heart; the run's folder is left alone."""
    from outside_in.diagnostics import overfit
    from outside_in.runtime.mesh import describe_devices
    from outside_in.training.setup import whole_steps

    say(describe_devices())
    losses = []
    with tqdm(total=overfit.MOST_STEPS, unit="step", dynamic_ncols=True) as bar:
        for loss in overfit.overfit(model_config, config, whole_steps(run, model_config, config) // config.epochs):
            losses.append(loss)
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()
    say(overfit.verdict(losses))
    return cli.DONE


def train_all(runs: list[RunDirectory], args: argparse.Namespace, stop: StopRequest) -> int:
    """Train the runs of a folder one after the other, and compare them; one that fails does not stop the others."""
    if args.from_checkpoint:
        raise ValueError(f"{args.run}: expected one run with --from, got a folder of {len(runs)}; name one of them")
    for run in runs:  # a typing error in the last one should not show after hours
        load_config(run.model_config, ModelConfig), load_config(run.train_config, TrainConfig)
    failed = False
    for number, run in enumerate(runs, start=1):
        say(f"run {number} of {len(runs)}: {run.path}")
        try:
            code = train_one(run, args, stop)
        except Exception as error:
            code = cli.complain(error, debug=args.debug)
        if stop or code >= cli.INTERRUPTED:  # also when saving failed then
            return code
        failed |= code != cli.DONE
    if any(run.metrics.exists() for run in runs) and not args.instead and not cli.is_quiet():
        from outside_in.reports.charts import COMPARISON
        from outside_in.reports.comparison import compare

        print(*compare(runs, "tokens", args.run / COMPARISON), sep="\n")
    return cli.FAILED if failed else cli.DONE


def list_runs() -> int:
    """Print a line for every run below `runs/`: new, at step N of M, or finished."""
    from outside_in.training.setup import describe_progress

    runs = find_runs(RUNS)
    width = max((len(str(run.path)) for run in runs), default=0)
    for run in runs:
        try:
            status = describe_progress(run)
        except ValueError as error:
            status = f"error: {error}"
        print(f"{run.path!s:{width}}  {status}")
    print("uv run train.py runs/NAME trains one, or goes on with it")
    return cli.DONE


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description="Train a run, or go on with it.")
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
    parser.add_argument(
        "--no-compilation-cache", action="store_true", help="compile anew, and do not keep it for the next start"
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes that train the run together: found under SLURM, Open MPI, Kubernetes, torchrun",
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where the first process listens, to say it by hand")
    parser.add_argument("--processes", type=int, metavar="N", help="how many there are")
    parser.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
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
    cli.run(main, make_parser())
