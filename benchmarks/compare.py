"""How much faster is one benchmark than another on this machine now? Interleaved pairs of rounds, and their ratios.

Machines drift by more than programs differ: only what ran next to each other is compared. Both programs are started and
compiled once; then they train in turn, each while the other waits for a line on its standard input.
"""

import argparse
import contextlib
import json
import shlex
import statistics
import subprocess
import sys
from functools import partial
from typing import Any

from shapes import split_arguments

from outside_in.runtime import cli


def main(args: argparse.Namespace, both: list[str]) -> int:
    if args.pairs < 2:
        raise ValueError(f"the arguments: --pairs: expected at least 2, got {args.pairs}")
    output = sys.stderr if args.json else sys.stdout
    reports: list[list[dict[str, Any]]] = [[], []]
    with contextlib.ExitStack() as stack:
        programs = [stack.enter_context(start(command, both)) for command in (args.first, args.second)]
        for program in programs:  # which compile, and get warm, one after the other
            ask(program, args.steps)
        for pair in range(args.pairs):
            for which in (0, 1) if pair % 2 == 0 else (1, 0):
                reports[which].append(ask(programs[which], args.steps))
            first, second = (report[-1]["tokens_per_second"] for report in reports)
            print(f"pair {pair + 1}: {first:,.0f} and {second:,.0f} tokens/s, ratio {first / second:.3f}", file=output)
    ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(*reports, strict=True)]
    print(*describe(args, reports, spread(ratios)), sep="\n", file=output)
    if args.json:
        print(json.dumps({"ratio": spread(ratios), "first": reports[0], "second": reports[1]}))
    return cli.DONE


def start(command: str, both: list[str]) -> subprocess.Popen[str]:
    arguments = [*shlex.split(command), *both, "--rounds-from-stdin"]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(program: subprocess.Popen[str], steps: int) -> dict[str, Any]:
    """Let a program train a round of steps; return its report."""
    assert program.stdin and program.stdout
    with contextlib.suppress(BrokenPipeError):  # it has left, and said why
        print(steps, file=program.stdin, flush=True)
    line = program.stdout.readline()
    if not line:
        raise RuntimeError(f"{program.args}: ended with exit code {program.wait()}")
    return json.loads(line)


def spread(ratios: list[float]) -> dict[str, float]:
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper, "min": min(ratios), "max": max(ratios)}


def describe(args: argparse.Namespace, reports: list[list[dict[str, Any]]], ratio: dict[str, float]) -> list[str]:
    """Return the lines that say how fast both were, in how much memory, and the ratio of their speeds."""
    lines = []
    for command, of_one in zip((args.first, args.second), reports, strict=True):
        tokens_per_second = statistics.median(report["tokens_per_second"] for report in of_one)
        memory = [
            f"{of_one[-1][key] / 2**30:.2f} GiB {kind}"
            for key, kind in (("peak_device_bytes", "on the device"), ("peak_host_bytes", "on the host"))
            if of_one[-1][key]
        ]
        lines.append(f"{command}: {tokens_per_second:,.0f} tokens/s, at most {', '.join(memory) or 'unknown memory'}")
    lines.append(
        "ratio {median:.3f}, quartiles {lower_quartile:.3f} to {upper_quartile:.3f}, all {min:.3f} to {max:.3f}".format(
            **ratio
        )
    )
    return lines


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Compare the speed of two benchmarks; what follows -- is given to both.")
    parser.add_argument("first", help="a command line, such as 'python benchmarks/throughput.py --shape S'")
    parser.add_argument("second", help="another one; the ratio is how much faster the first is")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="of a round")
    parser.add_argument(
        "--json", action="store_true", help="print all reports as one JSON line, and the rest as errors"
    )
    return parser


if __name__ == "__main__":
    own, both = split_arguments()
    cli.run(partial(main, both=both), make_parser(), own)
