"""How fast the runs of a ladder train, beside each other: rounds of a few steps of each, in turn, on random tokens.

Machines drift by more than rungs differ, so the speeds that runs report say little: only the ratios of a round do.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import in_jax
import jax
import numpy as np
from compare import spread

from model import model_of
from outside_in.config import tokens_per_global_step
from outside_in.data.loader import TokenStream
from outside_in.optimizer import make_optimizer
from outside_in.overrides import load_run
from outside_in.runtime import cli
from outside_in.runtime.devices import initialize_devices
from outside_in.storage.run_directory import RunDirectory, find_runs
from outside_in.train_step import compile_train_step

TOTAL_STEPS = 1_000  # of the schedule


class Rung:
    def __init__(self, run: RunDirectory) -> None:
        config, train, _ = load_run(run, [])
        self.name, self.tokens = run.path.name, tokens_per_global_step(config, train)
        shape = (train.gradient_accumulation_steps, train.microbatch_size, config.context_length)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, self.tokens + 1).astype(np.uint16)
        stream = TokenStream(tokens, shape, train.objective, train.seed, shuffle=False)
        self.batch = jax.device_put(stream.calls(0, train.calls_per_step))
        self.model, self.key = model_of(config, train), jax.random.key(train.seed)
        self.optimizer = make_optimizer(self.model, train, TOTAL_STEPS)
        self.step = compile_train_step(self.model, self.optimizer, self.batch[0], self.key, train)

    def tokens_per_second(self, steps: int) -> float:
        began = time.perf_counter()
        reports = [self.step(self.model, self.optimizer, part, self.key) for _ in range(steps) for part in self.batch]
        jax.block_until_ready(reports)
        return steps * self.tokens / (time.perf_counter() - began)


def main(args: argparse.Namespace) -> int:
    if args.rounds < 2 or args.steps < 1:
        raise ValueError("expected at least 2 --rounds and 1 of --steps")
    for path in args.runs:
        if not find_runs(path):
            raise ValueError(f"{path}: expected a run or a folder of runs, found no train.json there")
    runs = [run for path in args.runs for run in find_runs(path)]
    initialize_devices()
    rungs = [Rung(run) for run in runs]
    for rung in rungs:
        rung.tokens_per_second(1)
    rounds = [[rung.tokens_per_second(args.steps) for rung in rungs] for _ in range(args.rounds)]
    speeds = zip(*rounds, strict=True)
    report = {
        rung.name: {
            "tokens_per_second": statistics.median(of_rung),
            "by_the_first": spread([own / of_round[0] for own, of_round in zip(of_rung, rounds)]),
        }
        for rung, of_rung in zip(rungs, speeds)
    }
    about = in_jax.versions()
    print(json.dumps(about | {"rounds": args.rounds, "steps": args.steps, "rungs": report}))
    return cli.DONE


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description="Measure how fast runs train beside each other; prints one JSON object.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder of runs")
    parser.add_argument("--rounds", type=int, default=9, help="of steps of every run (9)")
    parser.add_argument("--steps", type=int, default=20, help="of each run in a round (20)")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
