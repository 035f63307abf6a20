"""Evaluate models on the same held-out tokens: `uv run evaluate.py RUN_OR_CHECKPOINT…`."""

import argparse
import json
from pathlib import Path
from typing import Any

from outside_in.reports import markdown
from outside_in.runtime import cli
from outside_in.storage import atomic

COLUMNS = {  # of the table: heading and form of what the JSON has under these names; what no row has is left out
    "model": ("model", ""),
    "parameters": ("parameters", ","),
    "loss": ("loss", ".4f"),
    "loss_error": ("±", ".4f"),
    "difference": ("Δ vs. first", "+.4f"),
    "difference_error": ("±", ".4f"),
    "perplexity": ("perplexity", ",.6g"),
    "bits_per_byte": ("bits per byte", ".4f"),
    "hellaswag": ("HellaSwag", ".2%"),
    "hellaswag_error": ("±", ".2%"),
    "hellaswag_not_normalized": ("not normalized", ".2%"),
}


def main(args: argparse.Namespace) -> int:
    check(args)
    from outside_in.inference.held_out import evaluate  # with JAX, which takes seconds to import: not for a usage error

    subject, rows = evaluate(args)
    if subject:
        print("{dataset}, {split}: {tokens:,} tokens from {start_token:,} on".format(**subject), end="\n\n")
    print(*table(rows), sep="\n")
    if args.json:
        atomic.write_text(args.json, json.dumps({"judged_on": subject, "models": rows}, indent=2) + "\n")
    return cli.DONE


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table. Columns without values are left out."""
    columns = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    lines = []
    for row in rows:
        values = [(row.get(name), COLUMNS[name][1]) for name in columns]
        lines.append(["–" if value is None else format(value, form) for value, form in values])
    return markdown.table([COLUMNS[name][0] for name in columns], lines)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that make no sense."""
    for option, least in (("start_token", 0), ("tokens", 1), ("stride", 1), ("batch", 1)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise ValueError(f"--{option.replace('_', '-')}: expected a number of at least {least}, got {value}")
    if args.hellaswag and not args.dataset and (args.tokens or args.stride or args.start_token):
        raise ValueError("--hellaswag: expected a --dataset with --tokens, --stride or --start-token, got none")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise ValueError(f"--json: expected a file in an existing folder, got {args.json}")


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(
        "Evaluate models on the same held-out tokens: loss, perplexity, bits per byte, HellaSwag."
    )
    parser.add_argument(
        "models", nargs="+", type=Path, metavar="MODEL", help="a run (its best checkpoint), a checkpoint, or a file"
    )
    parser.add_argument("--dataset", help="a folder, a built-in name or hub:owner/name (the first model's)")
    parser.add_argument("--split", choices=("validation", "train"), default="validation")
    parser.add_argument("--start-token", type=int, default=0, help="first token (0)")
    parser.add_argument("--tokens", type=int, help="number of tokens to predict (all)")
    parser.add_argument(
        "--stride",
        type=int,
        help="start a window every STRIDE tokens, and count each token once (windows do not overlap)",
    )
    parser.add_argument("--batch", type=int, help="windows at a time (8,192 tokens' worth)")
    parser.add_argument(
        "--hellaswag",
        nargs="?",
        const="Rowan/hellaswag",
        metavar="FILE",
        help="answer HellaSwag's questions, from a .jsonl file or the Hub; only these unless --dataset is set",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
