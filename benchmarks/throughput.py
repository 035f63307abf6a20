"""How fast, and in how much memory, outside-in trains: the very steps of `train.py` on random tokens, no files written.

`dispatch_seconds` is how long the Python call that starts a step takes. It returns while the step is still running, on
the CPU too; there it shares the cores with the step, so the figure is an upper bound.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import in_jax
import jax
import numpy as np
import shapes
from flax import nnx
from safetensors.numpy import save_file

from outside_in.config import ModelConfig, TrainConfig
from outside_in.optimizer import make_optimizer
from outside_in.runtime import cli
from outside_in.runtime.devices import initialize_devices
from outside_in.train_step import compile_train_step, steps_ahead
from outside_in.weights import host_arrays


class Ours:
    def __init__(self, args: argparse.Namespace, config: ModelConfig, train: TrainConfig) -> None:
        initialize_devices()  # and keep freed memory, as programs of ours do
        self.config, self.train, self.steps_ahead = config, train, steps_ahead()
        self.stream = in_jax.make_stream(args, config, train)
        self.model = in_jax.make_model(args, config, train)
        if args.save_weights:
            save_file(host_arrays(nnx.state(self.model, nnx.Param)), args.save_weights)
        self.optimizer = make_optimizer(self.model, train, shapes.SCHEDULE_STEPS)
        self.seed_key = jax.random.key(train.seed)
        self.global_step = 0
        self.place_batch()
        self.step = compile_train_step(self.model, self.optimizer, self.batch[0], self.seed_key, train)

    def place_batch(self) -> None:
        self.batch = jax.device_put(self.stream.calls(self.global_step, self.train.calls_per_step))

    def start_step(self) -> tuple[Any, float]:
        began = time.perf_counter()
        reports = [self.step(self.model, self.optimizer, part, self.seed_key) for part in self.batch]
        self.global_step += 1
        return reports, time.perf_counter() - began

    def loss(self, started: Any) -> float:
        return float(np.mean([report.loss for report in jax.device_get(started)]))

    def product(self, size: int) -> Callable[[], Any]:
        return in_jax.product(size, self.train.precision)

    def describe(self) -> dict[str, Any]:
        return {**in_jax.describe(self.config), "needed_device_bytes": self.step.bytes_needed}


def main(args: argparse.Namespace) -> int:
    return shapes.run(args, Ours)


def make_parser() -> cli.ArgumentParser:
    parser = shapes.make_parser("Measure how fast outside-in trains; prints one JSON object.")
    parser.add_argument("--save-weights", type=Path, metavar="FILE", help="write the weights before the first step")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
