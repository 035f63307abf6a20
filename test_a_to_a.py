"""Smoke check: does a model map a text to itself? `uv run test_a_to_a.py RUN`.

This is a program, not a pytest test.
"""

import argparse
from pathlib import Path

from outside_in.inference.prompt import add_special_tokens, notice_end
from outside_in.runtime import cli

# The first verse of "The Rime of the Ancient Mariner", Samuel Taylor Coleridge, 1834.
POEM = """It is an ancient Mariner,
And he stoppeth one of three.
'By thy long grey beard and glittering eye,
Now wherefore stopp'st thou me?"""


def main(args: argparse.Namespace) -> int:
    # With JAX, which takes seconds to import: not for a usage error.
    from outside_in.inference.generation import likeliest_outputs
    from outside_in.inference.load import find_weights, load_saved_model, need_tokenizer
    from outside_in.runtime.devices import initialize_devices

    initialize_devices()
    path = find_weights(args.model)
    model, tokenizer = load_saved_model(path), need_tokenizer(path)
    notice_end(tokenizer, args.text, args.special_tokens)
    token_ids = tokenizer.encode(args.text, special=bool(args.special_tokens)).tolist()
    if not token_ids:
        raise ValueError("--text: expected some text, got none")
    predicted = likeliest_outputs(model, token_ids, tokenizer.vocab_size)
    print("input:", args.text, "", "output:", tokenizer.decode(predicted), "", sep="\n")
    matches = sum(token == output for token, output in zip(token_ids, predicted, strict=True))
    print(f"{matches} of {len(token_ids)} tokens map to themselves")
    return cli.DONE if matches == len(token_ids) else cli.FAILED


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Check that a model maps a text to itself: exit code 0 if it does, 1 if not.")
    parser.add_argument("model", type=Path, help="a run (its best checkpoint), a checkpoint, or a model.safetensors")
    parser.add_argument("--text", default=POEM, help="text to map (the first verse of The Rime of the Ancient Mariner)")
    add_special_tokens(parser)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
