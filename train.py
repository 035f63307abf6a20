"""Train a run, or resume it: `uv run train.py runs/NAME`.

JAX takes seconds to import, so what needs it is imported late: usage errors show at once.
"""

import argparse
import contextlib
import importlib
import logging
import os
import shlex
import signal
import traceback
from pathlib import Path

from outside_in.overrides import KNOWN, load_run, parse
from outside_in.reports.cards import CARDS, COMPILE_ONLY
from outside_in.reports.loggers import check_installed
from outside_in.runtime import cli
from outside_in.runtime.log import log
from outside_in.runtime.signals import StopRequest
from outside_in.runtime.timing import TimeBudget
from outside_in.storage.run_directory import RunDirectory, find_runs
from outside_in.storage.text import counted

RUNS = Path("runs")
MODES = {  # instead of training: the function that does it, and its help
    "check": ("preflight.check", "print parameters, steps, memory and disk"),
    "overfit-one-batch": ("overfit.overfit_one_batch", "check that a fresh model can learn the first batch by heart"),
    "find-microbatch": ("memory.find_microbatch", "find the largest microbatch_size that fits, by compiling"),
}
DEVICE_MODES = {"check": "check", "find-microbatch": "find_microbatch"}  # of absent_gpu, with --device


def main(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # where there is nothing to save yet, it must not kill
    check(args)
    if args.new:
        from outside_in.training.new_run import make_run

        make_run(args.new, args.like, [str(argument) for argument in (args.run, *args.changes) if argument])
        return cli.DONE
    if args.help_keys:
        from outside_in.reports.key_table import key_table

        print(*key_table(), sep="\n")
        return cli.DONE
    if args.device:
        os.environ |= COMPILE_ONLY
    if args.no_compilation_cache:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # which JAX reads when it is imported
    if args.run is None:
        from outside_in.training.setup import list_runs

        return list_runs(RUNS)
    run = RunDirectory(args.run)
    run.check()
    runs = find_runs(args.run)
    stop = StopRequest()
    if args.distributed:
        from outside_in.runtime.processes import join

        join(args.coordinator, args.processes, args.process)
        stop.is_distributed = True
    if run.train_config.exists() or not runs:
        if args.max_layers is not None:
            raise ValueError(f"--max-layers {args.max_layers}: expected a folder of runs, got the run {args.run}")
        return train_one(run, args, stop)
    return train_all(runs, args, stop)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together."""
    if args.mode and (args.from_checkpoint or args.hash_parameters or args.debug_checks or args.accept_changes):
        raise ValueError(
            f"--{args.mode}: expected without --from, --accept-changes, --hash-parameters and --debug-checks, "
            "since it trains nothing"
        )
    if args.device and args.mode not in DEVICE_MODES:
        raise ValueError(f"--device {args.device}: expected with --check or --find-microbatch, which only compile")
    if args.devices is not None and (not args.device or args.devices < 1):
        raise ValueError(f"--devices {args.devices}: expected a positive number, and --device")
    if args.new and args.mode:
        raise ValueError(f"--{args.mode}: expected without --new, which only writes a run's files; type it afterwards")
    if bool(args.new) != bool(args.like):
        raise ValueError("--new and --like: expected together: --new RUN --like RUN KEY=VALUE …")
    if args.run and not args.new and str(args.run).partition("=")[0] in KNOWN and not args.run.exists():
        raise ValueError(f"{args.run}: expected after the run: uv run train.py runs/NAME {shlex.quote(str(args.run))}")
    if args.run is None and (args.mode or args.max_layers is not None or args.from_checkpoint) and not args.new:
        raise ValueError("expected a run, or a folder of runs, before the options: uv run train.py runs/NAME …")
    if args.run is None and args.hash_parameters:  # which has taken the run's folder for its pattern
        raise ValueError("expected the run before --hash-parameters: uv run train.py runs/NAME --hash-parameters")
    if "=" in (args.hash_parameters or ""):
        raise ValueError(f"--hash-parameters {args.hash_parameters}: expected a pattern; write keys before the option")
    if args.distributed and (args.mode or args.debug_checks):
        raise ValueError(f"--{args.mode or 'debug-checks'}: runs in one process; leave out --distributed")
    manual = (args.coordinator, args.processes, args.process)
    if not args.distributed and manual != (None, None, None):
        raise ValueError("--coordinator, --processes and --process: expected together with --distributed")
    if None in manual and manual != (None, None, None):
        raise ValueError("--distributed: expected all of --coordinator, --processes and --process, or none of them")
    if args.coordinator is None:
        return
    host, _, port = args.coordinator.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ValueError(f"--coordinator: expected HOST:PORT, got {args.coordinator}")
    if not 0 <= args.process < args.processes:
        raise ValueError(
            f"--process: expected a number from 0 to --processes - 1, got {args.process} of {args.processes}"
        )


def train_one(run: RunDirectory, args: argparse.Namespace, stop: StopRequest) -> int:
    model_config, config, overrides = load_run(run, args.changes)
    for line in overrides:
        log.info(line)
    time_budget = TimeBudget("starting")
    try:
        if args.device:
            from outside_in.diagnostics import absent_gpu

            compile_only = getattr(absent_gpu, DEVICE_MODES[args.mode])
            compile_only(run, model_config, config, args.device, args.devices)
            return cli.DONE
        if args.mode:
            module, _, function = MODES[args.mode][0].partition(".")
            getattr(importlib.import_module(f"outside_in.diagnostics.{module}"), function)(run, model_config, config)
            if args.mode == "check":
                from outside_in.training.resume_checks import check_newest

                check_newest(run, model_config, config, parse(args.changes))
            return cli.DONE
        with lock(run, args):
            log.info("starting")
            from outside_in.training.run import run_training

            return run_training(run, model_config, config, args, stop, time_budget)
    except Exception as error:
        if not cli.is_out_of_device_memory(error):
            raise
        from outside_in.diagnostics import memory

        traceback.clear_frames(error.__traceback__)  # which hold the model
        raise ValueError(memory.advice(model_config, config, str(error))) from error


def lock(run: RunDirectory, args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Lock the run for this process, or for all that train it."""
    if not args.distributed:
        return run.lock()
    from outside_in.runtime.processes import held_by_main_process

    return held_by_main_process(run.lock())


def train_all(runs: list[RunDirectory], args: argparse.Namespace, stop: StopRequest) -> int:
    """Train the runs of a folder in order, and compare them.

    A run that fails does not stop the others. Returns the exit code.
    """
    if args.from_checkpoint:
        raise ValueError(f"{args.run}: expected one run with --from, got a folder of {len(runs)}; name one of them")
    layers = []
    for run in runs:  # a typo, or a package that is missing, should not show after hours
        model_config, config, _ = load_run(run, args.changes)
        check_installed(run, config.log_to)
        layers.append(model_config.n_layers)
    if args.max_layers is not None:
        runs = [run for run, count in zip(runs, layers) if count <= args.max_layers]
    if not runs:
        raise ValueError(f"--max-layers {args.max_layers}: expected at least {min(layers)}, the fewest of {args.run}")
    failed = {}
    for i, run in enumerate(runs, start=1):
        log.info(f"run {i} of {len(runs)}: {run.path}")
        try:
            code = train_one(run, args, stop)
        except Exception as error:
            code = cli.report_error(error, debug=args.debug)
        if stop or code >= cli.INTERRUPTED:  # also when saving failed then
            return code
        if code != cli.DONE:
            failed[run.path.name] = code
    if any(run.metrics.exists() for run in runs) and not args.mode and log.isEnabledFor(logging.INFO):
        from outside_in.reports.comparison import compare
        from outside_in.reports.labels import COMPARISON

        print(*compare(runs, "tokens", args.run / COMPARISON), sep="\n")
    if failed:
        log.error(f"not finished: {', '.join(failed)} ({len(failed)} of {counted(len(runs), 'run')})")
    return min(failed.values(), default=cli.DONE)  # 1 if the user cannot mend all of them


def make_parser() -> cli.ArgumentParser:
    parser = cli.KeyArgumentParser(description="Train a run, or resume it.")
    add = parser.add_argument
    add("run", nargs="?", type=Path, help="the run's folder, or a folder of runs; without one, list them")
    add(
        "--from",
        dest="from_checkpoint",
        metavar="CHECKPOINT",
        help="resume from this checkpoint: best, latest, or the name of one",
    )
    add(
        "changes",
        nargs="*",
        metavar="KEY=VALUE",
        help="another value for this start, or for the run that --new makes: learning_rate=3e-4, model.n_layers=6",
    )
    add("--help-keys", action="store_true", help="list every key with its type, default, limits and meaning, and stop")
    add("--new", type=Path, metavar="RUN", help="make a run from that of --like, and stop")
    add("--like", type=Path, metavar="RUN", help="the run whose files --new takes")
    add("--max-layers", type=int, metavar="N", help="of a folder of runs, train only those with at most N layers")
    add("--accept-changes", action="store_true", help="resume even if keys that affect training have changed")
    add(
        "--hash-parameters",
        nargs="?",
        const="*",
        metavar="PATTERN",
        help="after every step, print a hash of every parameter (or of those like 'blocks.0.*')",
    )
    add(
        "--debug-checks",
        action="store_true",
        help="stop at the first parameter, hidden state, logit, loss or gradient that is not finite, and print where; "
        "steps take two to three times as long",
    )
    add("--no-compilation-cache", action="store_true", help="disable the compilation cache")
    modes = parser.add_mutually_exclusive_group()
    for mode, (_, text) in MODES.items():
        modes.add_argument(
            f"--{mode}", dest="mode", action="store_const", const=mode, help=f"{text}, and stop; writes nothing"
        )
    add(
        "--device",
        choices=CARDS,
        help="with --check or --find-microbatch: compile for a GPU that need not be here",
    )
    add("--devices", type=int, metavar="N", help="with --device: how many; else as many as the run's mesh names")
    add = parser.add_argument_group("several processes").add_argument
    add(
        "--distributed",
        action="store_true",
        help="train together with other processes, detected under SLURM, Open MPI, Kubernetes and torchrun",
    )
    add("--coordinator", metavar="HOST:PORT", help="address of process 0 (manual setup)")
    add("--processes", type=int, metavar="N", help="number of processes (manual setup)")
    add("--process", type=int, metavar="I", help="index of this process, from 0 (manual setup)")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser(), trains=True)
