"""Do two benchmarks train the same? Their losses, step by step, from the same weights on the same tokens.

The first is `throughput.py`: it writes the weights that the second starts from.
"""

import argparse
import json
import shlex
import subprocess
import tempfile
from functools import partial
from pathlib import Path

from shapes import split_arguments

from outside_in.runtime import cli

MAX_DIFFERENCE = 1e-3  # nats, in float32; over twenty steps in which losses fall by several


def main(args: argparse.Namespace, both: list[str]) -> int:
    arguments = [*both, "--steps", str(args.steps - 1)]  # the first step is one more
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "model.safetensors")
        first = losses(args.first, [*arguments, "--save-weights", weights])
        second = losses(args.second, [*arguments, "--weights", weights])
    differences = [abs(left - right) for left, right in zip(first, second, strict=True)]
    print("step     first    second  difference")
    for step, row in enumerate(zip(first, second, differences, strict=True)):
        print("{:4}  {:8.5f}  {:8.5f}  {:.1e}".format(step, *row))
    is_same = all(difference <= MAX_DIFFERENCE for difference in differences)  # with NaN it is not
    print(f"largest difference {max(differences):.1e}, allowed {MAX_DIFFERENCE:.0e}")
    return cli.DONE if is_same else cli.FAILED


def losses(command: str, arguments: list[str]) -> list[float]:
    finished = subprocess.run([*shlex.split(command), *arguments], stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        raise RuntimeError(f"{command}: ended with exit code {finished.returncode}")
    return json.loads(finished.stdout)["losses"]


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Compare the losses of two benchmarks; what follows -- is given to both.")
    parser.add_argument("first", help="a command line that runs throughput.py")
    parser.add_argument("second", help="a command line that runs another benchmark")
    parser.add_argument("--steps", type=int, default=20)
    return parser


if __name__ == "__main__":
    own, both = split_arguments()
    cli.run(partial(main, both=both), make_parser(), own)
