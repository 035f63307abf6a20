"""Which kernels bound a training step on a GPU, and how much a change gains: no GPU needed, but JAX's CUDA wheels.

Compiles a run's step, or that of a shape, for a card that is not there, or reads a compiled program (`step.hlo` of
`kernel_times.py`). Prints the least time of each kind of kernel and of the longest kernels. `--json` writes the same;
`--vs` compares with such a file.
"""

import argparse
import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import shapes

from outside_in.config import ModelConfig, TrainConfig, tokens_per_global_step
from outside_in.config_files import load_config
from outside_in.reports import hlo
from outside_in.reports.cards import CARDS, COMPILE_ONLY
from outside_in.reports.flops import mfu
from outside_in.reports.roofline import Account, Bound, Rates, account
from outside_in.runtime import cli
from outside_in.storage.run_directory import RunDirectory

SUFFIX = re.compile(r"(\.remat\w*|\.clone|[.\d]+)+$")  # of an instruction's name
SUMS = ("milliseconds", "kernels", "gigabytes", "teraflops")
TABLES = ("kinds", "each")
HEADER = f"{'ms':>9} {'kernels':>7} {'GB':>8} {'TFLOP':>7}  "


def main(args: argparse.Namespace) -> int:
    os.environ |= COMPILE_ONLY  # before JAX is imported
    model, train = configs(args)
    report: dict[str, Any] = {"program": str(args.run or args.shape), "device": args.device}
    if args.hlo:
        text = args.hlo.read_text()
    else:
        text, report["needed_device_bytes"] = compiled(args, model, train)
    if args.save_hlo:
        args.save_hlo.write_text(text)
    report["devices"] = args.devices or 1
    counted = account(hlo.parse(text), train.calls_per_step)
    report |= describe(counted, rates(args)) | speed(Bound.of(counted, rates(args)), args, model, train)
    show(report, args.rows)
    if args.vs:
        compare(json.loads(args.vs.read_text()), report, args.rows)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return cli.DONE


def configs(args: argparse.Namespace) -> tuple[ModelConfig, TrainConfig]:
    if args.run is None:
        return shapes.configs(args)
    run = RunDirectory(args.run)
    return load_config(run.model_config, ModelConfig), load_config(run.train_config, TrainConfig)


def compiled(args: argparse.Namespace, model: ModelConfig, train: TrainConfig) -> tuple[str, int]:
    """Return the text of a compiled call of the step, and the bytes that it needs."""
    from outside_in.diagnostics import absent_gpu, memory

    args.devices = args.devices or absent_gpu.devices_of(train)
    with absent_gpu.compiling_for(args.device, args.devices):
        step = memory.compile_for_shapes(model, train)
        return step.text, step.bytes_needed


def rates(args: argparse.Namespace) -> Rates:
    """Return the card's rates, or those that the arguments give."""
    found = Rates.of(CARDS[args.device])
    if args.tflops:
        found = found._replace(flops=args.tflops * 1e12, float32_flops=args.tflops / 2 * 1e12)
    return found._replace(bytes=args.terabytes * 1e12) if args.terabytes else found


def describe(counted: Account, rates: Rates) -> dict[str, Any]:
    """Return the account of a global step by kind of kernel and by kernel, the longest first."""
    kinds: dict[str, Any] = defaultdict(lambda: dict.fromkeys(SUMS, 0.0))
    kernels: dict[str, Any] = defaultdict(lambda: dict.fromkeys(SUMS, 0.0))
    for kernel in counted.kernels:
        name = f"{kernel.kind}: {SUFFIX.sub('', kernel.name)} {kernel.type}"
        once = max(rates.seconds(kernel)) / kernel.times * 1e3, 1, kernel.bytes / 1e9, kernel.flops / 1e12
        for sums in (kinds[kernel.kind], kernels[name]):
            add(sums, kernel.times, once)
    for send in counted.sends:
        add(kinds[send.kind], send.times, (send.bytes / rates.link * 1e3, 1, send.bytes / 1e9, 0))
    longest_first = (dict(sorted(rows.items(), key=lambda row: -row[1]["milliseconds"])) for rows in (kinds, kernels))
    return {"uncounted_loops": counted.endless, **dict(zip(TABLES, longest_first))}


def add(sums: dict[str, float], times: int, once: tuple[float, ...]) -> None:
    for key, value in zip(SUMS, once):
        sums[key] += times * value


def speed(bound: Bound, args: argparse.Namespace, model: ModelConfig, train: TrainConfig) -> dict[str, Any]:
    devices = args.devices or 1
    tokens_per_second = tokens_per_global_step(model, train, devices) / bound.total
    return {
        "bound_milliseconds": 1e3 * bound.total,
        "operations_milliseconds": 1e3 * bound.computing,
        "bytes_milliseconds": 1e3 * bound.moving,
        "sending_milliseconds": 1e3 * bound.sending,
        "tokens_per_second": tokens_per_second,
        "mfu": mfu(tokens_per_second / devices, model, CARDS[args.device].device_kind, train.precision),
    }


def show(report: dict[str, Any], rows: int) -> None:
    memory = f"; needs {report['needed_device_bytes'] / 2**30:.2f} GiB" if "needed_device_bytes" in report else ""
    print(
        f"{report['program']} on {report['devices']} × {report['device']}: a step takes at least "
        f"{report['bound_milliseconds']:.2f} ms ({report['operations_milliseconds']:.2f} of operations, "
        f"{report['bytes_milliseconds']:.2f} of bytes, {report['sending_milliseconds']:.2f} of sending): at most "
        f"{report['tokens_per_second']:,.0f} tokens/s, MFU {report['mfu']:.1%}{memory}"
    )
    for table in TABLES:
        print("", HEADER + table, *(row(*item) for item in list(report[table].items())[:rows]), sep="\n")


def compare(before: dict[str, Any], now: dict[str, Any], rows: int) -> None:
    """Print what has changed since another report: the bound, the kinds, and the kernels that changed most."""
    print(f"\n{before['bound_milliseconds']:.2f} ms before, {now['bound_milliseconds']:.2f} now")
    for table in TABLES:
        nothing = dict.fromkeys(SUMS, 0.0)
        changes = {
            name: {key: now[table].get(name, nothing)[key] - before[table].get(name, nothing)[key] for key in SUMS}
            for name in before[table] | now[table]
        }
        largest = sorted(changes.items(), key=lambda item: -abs(item[1]["milliseconds"]))
        changed = [row(*item, sign="+") for item in largest if any(item[1].values())]
        print("", f"{HEADER}change of {table}", *changed[:rows], sep="\n")


def row(name: str, sums: dict[str, float], sign: str = "") -> str:
    return "{:{s}9.3f} {:{s}7,.0f} {:{s}8.2f} {:{s}7.2f}  {}".format(*(sums[key] for key in SUMS), name[:130], s=sign)


def make_parser() -> cli.ArgumentParser:
    parser = shapes.make_parser("Bound a training step on a GPU that is not there, kernel by kernel.")
    add = parser.add_argument
    add("run", nargs="?", type=Path, help="the run's folder, instead of a shape")
    add("--device", choices=CARDS, default="h100", help="the card (default: h100)")
    add("--devices", type=int, metavar="N", help="how many; else as many as the run's mesh names")
    add("--tflops", type=float, help="its rate for bfloat16 products (default: the data sheet's); float32 is half")
    add("--terabytes", type=float, help="its bandwidth, TB/s (default: the data sheet's)")
    add("--rows", type=int, default=20, help="of each table (default: 20)")
    add("--hlo", type=Path, metavar="FILE", help="read this compiled program instead of compiling")
    add("--save-hlo", type=Path, metavar="FILE", help="write the compiled program")
    add("--json", type=Path, metavar="FILE", help="write the whole account")
    add("--vs", type=Path, metavar="FILE", help="compare with an account that --json wrote")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
