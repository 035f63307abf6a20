"""Completions of "Every effort moves you", or any prompt: `uv run test_generation.py PATH/model.safetensors`.

This is a program, not a pytest test.
"""

import argparse
import sys
from pathlib import Path

import command_line


def main(args: argparse.Namespace) -> int:
    check(args)
    import tokenizer  # these take seconds: not for a typing error
    from generation import generate
    from mesh import describe_devices
    from saved_model import load_saved_model

    describe_devices()
    model = load_saved_model(args.model)
    prompt_ids = tokenizer.encode(args.prompt)
    if model.config.vocab_size < tokenizer.VOCAB_SIZE:
        raise ValueError(f"{args.model}: its vocabulary of {model.config.vocab_size:,} ids is not GPT-2's")
    context_length = model.config.context_length
    if len(prompt_ids) > context_length:
        print(f"notice: the model sees the last {context_length} of {len(prompt_ids)} prompt tokens", file=sys.stderr)
        prompt_ids = prompt_ids[-context_length:]
    completions = generate(
        model,
        prompt_ids,
        num_tokens=args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
        num_samples=args.samples,
    )
    for completion in completions:
        print(args.prompt + tokenizer.decode(completion.tolist()))
    return command_line.DONE


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that make no sense."""
    if not args.prompt:
        raise ValueError("--prompt: expected some text, got none")
    for option in ("tokens", "samples", "top_k"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')}: expected a number above 0, got {value}")
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature: expected 0 (greedy) or a positive number, got {args.temperature}")
    if args.temperature == 0 and (args.samples > 1 or args.top_k):
        raise ValueError("--samples and --top-k need a --temperature above 0: greedy completions are all the same")


def make_parser() -> command_line.ArgumentParser:
    parser = command_line.ArgumentParser("Complete a prompt; greedily, unless a temperature is given.")
    parser.add_argument("model", type=Path, help="a model.safetensors that train.py saved")
    parser.add_argument("--prompt", default="Every effort moves you")
    parser.add_argument("--tokens", type=int, default=20, help="how many to add (20)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token; 1: as the model says")
    parser.add_argument("--top-k", type=int, help="sample from the likeliest so many tokens only")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--samples", type=int, default=1, help="how many completions (1)")
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
