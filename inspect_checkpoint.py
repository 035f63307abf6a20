"""Look at the parameters of a checkpoint, or at two side by side: `uv run inspect_checkpoint.py runs/NAME`."""

import argparse
from pathlib import Path

import command_line


def main(args: argparse.Namespace) -> int:
    if len(args.paths) > 2:
        raise ValueError(f"expected one path or two, got {len(args.paths)}")
    import manifest  # these take seconds: not for a typing error
    from inspection import array_table
    from saved_model import find_weights
    from weights import load_weights

    files = [find_weights(path, "latest") for path in args.paths]
    tables = [{name: stored.content[...] for name, stored in load_weights(file).items()} for file in files]
    for file in files:
        manifest.check_alone(file)
    print(*files, "", *array_table(*tables), sep="\n")
    return command_line.DONE


def make_parser() -> command_line.ArgumentParser:
    parser = command_line.ArgumentParser(
        "Print a table of the parameters of a checkpoint: shape, norm, mean, deviation, zeros, what is not finite. "
        "Of two checkpoints, the first one's, and how far the second one's are from them, relative to their norm."
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="a run, a checkpoint, or a model.safetensors; at most two"
    )
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
