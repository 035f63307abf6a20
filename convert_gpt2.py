"""Import or export GPT-2's weights: `uv run convert_gpt2.py import|export SOURCE TARGET`."""

import argparse
import os
from pathlib import Path

from outside_in.runtime import cli


def main(args: argparse.Namespace) -> int:
    if args.target.exists() or args.target.is_symlink():
        raise ValueError(f"{args.target}: already exists; move it away or choose another name")
    above = next(folder for folder in args.target.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ValueError(f"{args.target}: cannot be created: {above} is not a writable folder")
    if args.action == "import" and args.checkpoint:
        raise ValueError("--checkpoint: only for export")
    from outside_in.huggingface.import_export import (  # with JAX, which takes seconds to import: not for a usage error
        export_folder,
        import_run,
    )

    if args.action == "import":
        return import_run(args.source, args.target)
    return export_folder(Path(args.source), args.target, args.checkpoint)


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(
        "Import a GPT-2 from Hugging Face as a run, or export a run as a folder that transformers loads."
    )
    parser.add_argument("action", choices=("import", "export"))
    parser.add_argument(
        "source",
        help="import: a folder with config.json and model.safetensors, or a model of the Hub, such as "
        "hub:openai-community/gpt2; export: a run, a checkpoint, or a model.safetensors",
    )
    parser.add_argument(
        "target", type=Path, help="the folder to create: a run (import), or a model for transformers (export)"
    )
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="the checkpoint to export: best (default), latest, or a name"
    )
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
