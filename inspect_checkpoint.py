"""Print a checkpoint's parameters, or compare two: `uv run inspect_checkpoint.py runs/NAME`."""

import argparse
import shlex
from pathlib import Path

from outside_in.runtime import cli


def main(args: argparse.Namespace) -> int:
    if len(args.paths) > 2:
        raise ValueError(f"expected one path or two, got {len(args.paths)}")
    from outside_in.diagnostics.parameters import (
        array_table,  # with JAX, which takes seconds to import: not for a usage error
    )
    from outside_in.inference.load import find_weights
    from outside_in.storage import manifest
    from outside_in.weights import load_weights

    files = [find_weights(path) for path in args.paths]
    tables = [{name: stored.content[...] for name, stored in load_weights(file).items()} for file in files]
    for file in files:
        manifest.check_alone(file)
    print(*map(describe, files), "", *array_table(*tables), sep="\n")
    return cli.DONE


def describe(file: Path) -> str:
    """Return a weights file's path, with the overrides under which it was trained."""
    from outside_in.overrides import as_arguments
    from outside_in.storage.checkpoint_folder import META_FILE
    from outside_in.storage.strict_json import read_json

    meta = read_json(meta_file) if (meta_file := file.parent / META_FILE).is_file() else {}
    overrides = meta.get("overrides")
    return f"{file}, trained with {shlex.join(as_arguments(overrides))}" if overrides else str(file)


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(
        "Print a table of a checkpoint's parameters: shape, norm, mean, std, zeros, NaN/Inf. "
        "With a second checkpoint, also how far its parameters are from the first one's, relative to their norm."
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="a run (its best checkpoint), a checkpoint, or a file"
    )
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
