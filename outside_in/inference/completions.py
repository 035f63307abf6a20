"""Prints the completions of prompts, many at once."""

import argparse
from collections.abc import Iterable

from model import GPTModel
from outside_in.data.tokenizer import Tokenizer
from outside_in.inference.generation import Sampling, generate_all, stream
from outside_in.inference.prompt import encode_prompt, notice_outgrown
from outside_in.runtime import cli

ROWS_PER_BATCH = 32  # completions at once


def complete(model: GPTModel, tokenizer: Tokenizer, prompts: list[str], args: argparse.Namespace) -> int:
    """Print the completions of prompts, one prompt after the other.

    A single one appears as it comes. Returns the exit code.
    """
    context_length = model.config.context_length
    names = ["--prompt" if len(prompts) == 1 else f"prompt {i} of {len(prompts):,}" for i, _ in enumerate(prompts, 1)]
    all_ids = [
        encode_prompt(tokenizer, prompt, context_length, args.special_tokens, name)
        for prompt, name in zip(prompts, names, strict=True)
    ]
    notice_outgrown(max(map(len, all_ids)) + args.tokens, context_length)
    stop_id = None if args.ignore_end else tokenizer.end_of_text
    sampling = Sampling(args.temperature, args.top_k, args.top_p, tokenizer.vocab_size)
    options = {"sampling": sampling, "seed": args.seed, "stop_id": stop_id}
    if len(prompts) == args.samples == 1:
        parts = (part[0].tolist() for part in stream(model, all_ids[0], args.tokens, **options))
        print_completion(prompts[0], tokenizer.decode_stream(parts, stop_id))
        return cli.DONE
    per_batch = max(1, ROWS_PER_BATCH // args.samples)
    for first in range(0, len(prompts), per_batch):
        batch = slice(first, first + per_batch)
        completions = generate_all(model, all_ids[batch], args.tokens, args.samples, **options)
        for prompt, samples in zip(prompts[batch], completions.tolist(), strict=True):
            for token_ids in samples:
                print_completion(prompt, tokenizer.decode_stream([token_ids], stop_id))
    return cli.DONE


def print_completion(prompt: str, texts: Iterable[str]) -> None:
    """Print a prompt and the texts that follow, as they come."""
    print(prompt, end="", flush=True)
    for text in texts:
        print(text, end="", flush=True)
    print()
