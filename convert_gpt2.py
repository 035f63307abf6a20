"""Import, export or push weights: `uv run convert_gpt2.py import|export|push SOURCE TARGET`."""

import argparse
import os
from pathlib import Path

from outside_in.runtime import cli


def main(args: argparse.Namespace) -> int:
    if args.action == "import" and args.checkpoint:
        raise ValueError("--checkpoint: only for export and push")
    if args.action != "push" and args.public:
        raise ValueError("--public: only for push")
    if args.action == "push":
        from outside_in.huggingface.upload import check_name, find_token

        check_name(args.target)
        token = find_token()
    else:
        token = ""
        check_is_free(Path(args.target))
    # With JAX, which takes seconds to import: not for a usage error.
    from outside_in.huggingface.import_export import export_folder, import_run, push_run

    if args.action == "import":
        return import_run(args.source, Path(args.target))
    if args.action == "push":
        return push_run(Path(args.source), args.target, args.checkpoint, token=token, public=args.public)
    return export_folder(Path(args.source), Path(args.target), args.checkpoint)


def check_is_free(target: Path) -> None:
    """Raise ValueError when a folder cannot be created."""
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target}: already exists; move it away or choose another name")
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ValueError(f"{target}: cannot be created: {above} is not a writable folder")


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(
        "Import a GPT-2, Llama or Qwen3 from Hugging Face as a run, export a run as a folder for transformers, or push "
        "that folder to the Hub."
    )
    parser.add_argument("action", choices=("import", "export", "push"))
    parser.add_argument(
        "source",
        help="import: a folder with config.json and model.safetensors, or a model of the Hub, such as "
        "hub:openai-community/gpt2; export and push: a run, a checkpoint, or a model.safetensors",
    )
    parser.add_argument(
        "target",
        help="the folder to create: a run (import), or a model for transformers (export); push: owner/name on the Hub",
    )
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="the checkpoint to export or push: best (default), latest, or a name"
    )
    parser.add_argument("--public", action="store_true", help="push: let everyone see the model; it is private else")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
