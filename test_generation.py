"""Smoke check: complete a prompt: `uv run test_generation.py RUN`.

This is a program, not a pytest test.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from outside_in.config_files import MIN_FLOAT32
from outside_in.inference.prompt import add_special_tokens, notice_end, read_prompt
from outside_in.runtime import cli


def main(args: argparse.Namespace) -> int:
    check(args)
    prompt = read_prompt(args.prompt_file or "-") if args.prompt_file or args.prompt == "-" else args.prompt
    # With JAX, which takes seconds to import: not for a usage error.
    from outside_in.inference.generation import Sampling, generate, stream
    from outside_in.inference.load import find_weights, load_saved_model, need_tokenizer
    from outside_in.runtime.devices import initialize_devices

    initialize_devices()
    path = find_weights(args.model)
    model, tokenizer = load_saved_model(path), need_tokenizer(path)
    notice_end(tokenizer, prompt, args.special_tokens)
    prompt_ids = tokenizer.encode(prompt, special=bool(args.special_tokens)).tolist() or [tokenizer.end_of_text]
    context_length = model.config.context_length
    if len(prompt_ids) >= context_length:
        raise ValueError(
            f"--prompt: expected fewer than {context_length:,} tokens, the context, got {len(prompt_ids):,}; shorten it"
        )
    if len(prompt_ids) + args.tokens > context_length + 1:  # the last one need not be read
        notice = f"when the text fills the context of {context_length:,} tokens, only its second half is kept"
        print(f"notice: {notice}", file=sys.stderr)
    stop_id = None if args.ignore_end else tokenizer.end_of_text
    sampling = Sampling(args.temperature, args.top_k, args.top_p, tokenizer.vocab_size)
    options = {"sampling": sampling, "seed": args.seed, "stop_id": stop_id}
    if args.samples == 1:
        parts = (part[0].tolist() for part in stream(model, prompt_ids, args.tokens, **options))
        print_completion(prompt, tokenizer.decode_stream(parts, stop_id))
    else:  # several come together, so each is printed when all are complete
        for completion in generate(model, prompt_ids, args.tokens, args.samples, **options):
            print_completion(prompt, tokenizer.decode_stream([completion.tolist()], stop_id))
    return cli.DONE


def print_completion(prompt: str, texts: Iterable[str]) -> None:
    """Print a prompt and the texts that follow, as they come."""
    print(prompt, end="", flush=True)
    for text in texts:
        print(text, end="", flush=True)
    print()


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that make no sense."""
    for option in ("tokens", "samples", "top_k"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')}: expected a number above 0, got {value}")
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed: expected a number from 0 to 2,147,483,647, got {args.seed}")
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature: expected 0 (greedy) or a positive number, got {args.temperature}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p: expected a share above 0, at most 1, got {args.top_p}")
    if args.temperature < MIN_FLOAT32 and (args.samples > 1 or args.top_k or args.top_p):
        raise ValueError(
            "--samples, --top-k and --top-p need a --temperature above 0: greedy completions are all the same"
        )


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Complete a prompt.")
    parser.add_argument("model", type=Path, help="a run (its best checkpoint), a checkpoint, or a model.safetensors")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt",
        default="Every effort moves you",
        help="(Every effort moves you); '': start a new text; -: read standard input",
    )
    prompt.add_argument(
        "--prompt-file",
        metavar="PATH",
        help="read the prompt from a file, without its last line end; -: standard input",
    )
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
    parser.add_argument("--samples", type=int, default=1, help="number of completions (1)")
    add_special_tokens(parser)
    parser.add_argument("--ignore-end", action="store_true", help="continue after the end of a text")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
