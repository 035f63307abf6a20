"""What all training benchmarks share: shapes, arguments, tokens, timing, and the JSON report; neither JAX nor PyTorch.

Importing it lets a benchmark find the modules of the repository, from wherever it is started.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from outside_in.config import ModelConfig, TrainConfig, tokens_per_global_step
from outside_in.config_files import parse_config
from outside_in.reports.flops import flops_per_token, peak_tflops
from outside_in.runtime.cli import DONE, ArgumentParser
from outside_in.storage.safetensors_file import open_tensors

SHAPES = {
    "S": {"n_layers": 4, "emb_dim": 256, "n_heads": 4, "context_length": 256}
    | {"microbatch_size": 4, "gradient_accumulation_steps": 4},
    "gpt2-small": {"n_layers": 12, "emb_dim": 768, "n_heads": 12, "context_length": 1024}
    | {"microbatch_size": 1, "gradient_accumulation_steps": 2},
    "gpt2-medium": {"n_layers": 24, "emb_dim": 1024, "n_heads": 16, "context_length": 1024}
    | {"microbatch_size": 1, "gradient_accumulation_steps": 2},
}
DEFAULTS = {"vocab_size": 50257, "qkv_bias": False, "learning_rate": 0.0014, "min_train_tokens": -1, "shuffle": False}
SAID = {
    "microbatch_size",
    "gradient_accumulation_steps",
    "microbatches_per_call",
    "precision",
    "remat",
    "seed",
}  # in the report
SCHEDULE_STEPS = 40  # two of warm-up; the first twenty see half of the cosine
RANDOM_STEPS = 64  # global steps until random tokens are repeated
PRODUCT_SIZES = {"cpu": 2048, "gpu": 8192}  # large enough for the best rate
PRODUCTS = 7
MIN_STEPS = 3  # with one step ahead the first and the last take too long and too short, by what dispatching takes


class Contender(Protocol):
    """A model, an optimizer, and the first batch on the device."""

    steps_ahead: int  # 1: a step may be started before the loss of the one before is read; 0: starting is waiting

    def place_batch(self) -> None:
        """Put the arrays of the next global step on the device."""
        ...

    def start_step(self) -> tuple[Any, float | None]:
        """Train on that batch; return what will be the loss, and the seconds that dispatching took where known."""
        ...

    def loss(self, started: Any) -> float:
        """Wait for a step that was started; return its mean loss."""
        ...

    def product(self, size: int) -> Callable[[], Any]:
        """Return a function that multiplies two square matrices in the precision of the training, and waits."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return `device`, `versions`, `parameters`, and `peak_device_bytes` (None where the device does not say)."""
        ...


def make_parser(description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description)
    parser.add_argument(
        "--shape", choices=SHAPES, default="S", help="a named shape; the following override parts of it"
    )
    for option, key in (
        ("--layers", "n_layers"),
        ("--width", "emb_dim"),
        ("--heads", "n_heads"),
        ("--context", "context_length"),
        ("--vocab", "vocab_size"),
        ("--microbatch", "microbatch_size"),
        ("--accumulation", "gradient_accumulation_steps"),
        ("--microbatches-per-call", "microbatches_per_call"),
        ("--loss-rows-per-chunk", "loss_rows_per_chunk"),
    ):
        parser.add_argument(option, dest=key, type=int, metavar="N", help=f"{key} of model.json or train.json")
    parser.add_argument("--tied", dest="tied_head", action="store_true", default=None, help="tie the output head")
    parser.add_argument("--remat", choices=("none", "blocks"), help="gradient checkpointing")
    parser.add_argument("--precision", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--steps", type=int, default=10, help="global steps to time, after one that is not")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="start from these weights, a model.safetensors")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="train on this file of `tokens`, not random ones")
    parser.add_argument("--ceiling", action="store_true", help="also measure the rate of large matrix products")
    parser.add_argument("--rounds-from-stdin", action="store_true", help=argparse.SUPPRESS)  # of compare.py
    return parser


def configs(args: argparse.Namespace) -> tuple[ModelConfig, TrainConfig]:
    """Return what the two files of such a run would say; raises ValueError when the arguments do not fit together."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    keys = DEFAULTS | SHAPES[args.shape] | given | {"dataset": str(args.tokens or "random")}
    model, train = (
        json.dumps({key: keys[key] for key in kind.model_fields if key in keys}) for kind in (ModelConfig, TrainConfig)
    )
    return parse_config(model, ModelConfig, "the arguments"), parse_config(train, TrainConfig, "the arguments")


def load_tokens(args: argparse.Namespace, model: ModelConfig, train: TrainConfig) -> np.ndarray:
    """Return token ids (num_tokens,), uint16: those of a file, or random ones.

    Small random ids are far more frequent than large ones, roughly as in text. Raises ValueError when a file is wrong.
    """
    per_step = tokens_per_global_step(model, train)
    if args.tokens is None:
        shares = np.random.default_rng(train.seed).random(RANDOM_STEPS * per_step + 1)
        return (model.vocab_size * shares**8).astype(np.uint16)
    file = open_tensors(args.tokens)
    tokens = file.get_tensor("tokens") if "tokens" in file.keys() else np.zeros(0)  # noqa: SIM118
    if len(tokens) <= per_step or tokens.max() >= model.vocab_size:
        raise ValueError(
            f"{args.tokens}: expected more than {per_step:,} `tokens`, each below {model.vocab_size}; use another file"
        )
    return tokens.astype(np.uint16)


def run(args: argparse.Namespace, build: Callable[[argparse.Namespace, ModelConfig, TrainConfig], Contender]) -> int:
    """Build a contender, train a first step, and print one JSON object per round of steps.

    There is one round, or one for each number that standard input brings, until it ends.
    """
    model, train = configs(args)
    if args.steps < MIN_STEPS:
        raise ValueError(f"the arguments: --steps: expected at least {MIN_STEPS}, got {args.steps}")
    began = time.perf_counter()
    contender = build(args, model, train)
    losses, _, _ = time_steps(contender, 1)
    first_step_seconds = time.perf_counter() - began
    for steps in map(int, sys.stdin) if args.rounds_from_stdin else [args.steps]:
        new_losses, seconds, dispatch_seconds = time_steps(contender, steps)
        losses += new_losses
        known = contender.describe()
        ceiling = product_tflops(contender, known["device"]) if args.ceiling else None
        report = {
            "program": Path(sys.argv[0]).name,
            "model": model.model_dump(),
            "train": train.model_dump(include=SAID),
            **known,
            "cores": os.cpu_count(),
            **speed(model, train, seconds, known["device"], ceiling),
            "first_step_seconds": first_step_seconds,  # building and compiling included
            "dispatch_seconds": dispatch_seconds,
            "peak_host_bytes": peak_host_bytes(),
            "losses": losses,
        }
        print(json.dumps(report), flush=True)
    return DONE


def time_steps(contender: Contender, count: int) -> tuple[list[float], list[float], float | None]:
    """Train, reading each loss as late as `train.py` does; return losses, seconds per step, median dispatch seconds."""
    losses, ends, in_flight, dispatch_seconds = [], [time.perf_counter()], [], []

    def finish_step() -> None:
        losses.append(contender.loss(in_flight.pop(0)))
        ends.append(time.perf_counter())

    for _ in range(count):
        started, seconds = contender.start_step()
        in_flight.append(started)
        dispatch_seconds.append(seconds)
        contender.place_batch()  # while the device works on this step
        if len(in_flight) > contender.steps_ahead:
            finish_step()
    while in_flight:
        finish_step()
    dispatch = None if None in dispatch_seconds else statistics.median(dispatch_seconds)
    return losses, [end - start for start, end in itertools.pairwise(ends)], dispatch


def speed(
    model: ModelConfig, train: TrainConfig, step_seconds: list[float], device: str, ceiling: float | None
) -> dict[str, Any]:
    """Say how fast steps were, by their median, and what share that is of the peaks that are known."""
    tokens_per_second = tokens_per_global_step(model, train) / statistics.median(step_seconds)
    tflops = tokens_per_second * flops_per_token(model) / 1e12
    peak = peak_tflops(device, train.precision)
    return {
        "tokens_per_second": tokens_per_second,
        "step_seconds": step_seconds,
        "tflops": tflops,
        "mfu": tflops / peak if peak else None,
        "product_tflops": ceiling,
        "share_of_products": tflops / ceiling if ceiling else None,
    }


def product_tflops(contender: Contender, device: str) -> float:
    """Measure the rate of large matrix products: what no model on this machine can pass."""
    size = PRODUCT_SIZES.get(device, PRODUCT_SIZES["gpu"])
    multiply = contender.product(size)
    multiply()
    seconds = []
    for _ in range(PRODUCTS):
        began = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds) / 1e12


def peak_host_bytes() -> int | None:
    """Return the largest resident set of this process so far, compiling included; None where there is no /proc.

    `getrusage` would say what the process that started this one once needed, if that was more.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM:"))


def split_arguments() -> tuple[list[str], list[str]]:
    """Split the command line at `--`: what this program is told, and what those are told that it starts."""
    arguments = [*sys.argv[1:], "--"]
    where = arguments.index("--")
    return arguments[:where], arguments[where + 1 : -1]
