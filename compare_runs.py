"""Compare runs in a chart, a page and a table: `uv run compare_runs.py RUN…`."""

import argparse
from pathlib import Path

from outside_in.reports.labels import COMPARISON, X_LABELS
from outside_in.runtime import cli
from outside_in.storage.run_directory import find_runs


def main(args: argparse.Namespace) -> int:
    for path in args.runs:
        if not find_runs(path):
            raise ValueError(f"{path}: expected a run or a folder of runs, found no train.json there; name another")
    if args.to_loss is not None and not 0 < args.to_loss < float("inf"):
        raise ValueError(f"--to-loss {args.to_loss}: expected a positive number")
    if args.output.is_dir() or not args.output.parent.is_dir():
        raise ValueError(f"{args.output}: expected a file in a folder that exists; name another --output")
    if args.output.suffix == ".html":  # the page's, which stands beside it
        raise ValueError(f"{args.output}: expected the chart's name, FILE.png; the page gets the same with .html")
    runs = list({run.path.resolve(): run for path in args.runs for run in find_runs(path)}.values())
    from outside_in.reports.comparison import compare  # with JAX, which takes seconds to import: not for a usage error

    print(*compare(runs, args.x, args.output, args.to_loss), sep="\n")
    return cli.DONE


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description="Draw several runs on one chart and one page, and print them as one table.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder of runs")
    parser.add_argument("--x", choices=X_LABELS, default="tokens", help="the horizontal axis (tokens)")
    parser.add_argument(
        "--to-loss", type=float, metavar="LOSS", help="say what each run took to reach it, by validation"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(COMPARISON),
        metavar="FILE.png",
        help=f"the chart ({COMPARISON}); the page stands beside it",
    )
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
