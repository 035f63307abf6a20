"""Smoke check: complete a prompt: `uv run test_generation.py RUN`.

This is a program, not a pytest test.
"""

import argparse
from pathlib import Path

from outside_in.inference import settings
from outside_in.inference.prompt import add_prompts, add_special_tokens, chosen_prompts
from outside_in.runtime import cli


def main(args: argparse.Namespace) -> int:
    settings.check(args)
    prompts = [] if args.interactive else chosen_prompts(args)
    # With JAX, which takes seconds to import: not for a usage error.
    from outside_in.inference.completions import complete
    from outside_in.inference.interactive import check_objective, converse
    from outside_in.inference.load import find_weights, load_saved_model, need_tokenizer
    from outside_in.runtime.devices import initialize_devices

    initialize_devices()
    path = find_weights(args.model)
    check_objective(path, args.model)
    model, tokenizer = load_saved_model(path), need_tokenizer(path)
    return converse(model, tokenizer, args) if args.interactive else complete(model, tokenizer, prompts, args)


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Complete a prompt.")
    parser.add_argument("model", type=Path, help="a run (its best checkpoint), a checkpoint, or a model.safetensors")
    add_prompts(parser)
    parser.add_argument("--tokens", type=int, default=50, help="number of tokens to add (50)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        help="0: always the likeliest token; 1: the model's own distribution (0.7)",
    )
    parser.add_argument("--top-k", type=int, help="sample only from the TOP_K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, help="sample only from the likeliest tokens whose probabilities add up to TOP_P"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (0)")
    parser.add_argument("--samples", type=int, default=1, help="number of completions of each prompt (1)")
    add_special_tokens(parser)
    parser.add_argument("--ignore-end", action="store_true", help="continue after the end of a text")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
