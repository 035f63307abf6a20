"""Which kernels take the time of a training step on a GPU? Traces a few steps, and prints the longest.

Writes into a folder: the trace (which xprof and Perfetto open), `kernels.json`, and the compiled program, `step.hlo`.
"""

import argparse
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import shapes
import throughput
from jax.profiler import ProfileData

from outside_in.runtime import cli

WARM_UP, TRACED, ROWS = 3, 3, 40  # steps, steps, rows printed


def main(args: argparse.Namespace) -> int:
    ours = throughput.Ours(args, *shapes.configs(args))
    shapes.time_steps(ours, WARM_UP)
    with jax.profiler.trace(args.folder):
        _, seconds, _ = shapes.time_steps(ours, TRACED)
    (args.folder / "step.hlo").write_text(ours.step.text)
    kernels = read_kernels(max(args.folder.glob("plugins/profile/*/*.xplane.pb")))
    busy = sum(nanoseconds for nanoseconds, _ in kernels.values()) / TRACED / 1e6
    print(f"{sum(seconds) / TRACED * 1e3:.2f} ms a step, kernels {busy:.2f} ms")
    rows = [
        {"name": name, "milliseconds": nanoseconds / TRACED / 1e6, "times": times / TRACED}
        for name, (nanoseconds, times) in sorted(kernels.items(), key=lambda item: -item[1][0])
    ]
    (args.folder / "kernels.json").write_text(json.dumps(rows, indent=1))
    for row in rows[:ROWS]:
        print("{milliseconds:9.3f} ms {times:6.0f} × {name}".format(**row))
    return cli.DONE


def read_kernels(path: Path) -> dict[str, tuple[float, int]]:
    """Return nanoseconds and number of calls by operation of the program and kernel."""
    nanoseconds: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for plane in ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                with warnings.catch_warnings():  # of nanobind's
                    warnings.simplefilter("ignore")
                    stats: dict[str, Any] = dict(event.stats)
                name = f"{stats.get('hlo_op', '')} | {event.name}"
                nanoseconds[name] += event.duration_ns
                times[name] += 1
    return {name: (nanoseconds[name], times[name]) for name in times}


def make_parser() -> cli.ArgumentParser:
    parser = shapes.make_parser("Print which kernels take the time of a training step on a GPU.")
    parser.add_argument("folder", type=Path, help="for the trace, kernels.json and step.hlo")
    parser.set_defaults(save_weights=None)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
