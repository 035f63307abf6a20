"""Prompts from the command line, a file or standard input."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from outside_in.data.prepare.formats import PROBE_BYTES, STANDARD_INPUT, check_encoding
from outside_in.storage.text import counted

if TYPE_CHECKING:  # it needs NumPy, which a usage error does not wait for
    from outside_in.data.tokenizer import Tokenizer

MAX_BYTES = 2**24  # no context is so long
START = "Every effort moves you"


def read_prompt(path: str) -> str:
    """Read a prompt from a file of UTF-8 text, or from standard input (`-`), without its last line end.

    Raises ValueError when it cannot be read.
    """
    name = STANDARD_INPUT if path == "-" else path
    try:
        with open(sys.stdin.fileno() if path == "-" else Path(path), "rb", closefd=path != "-") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{name}: expected a file with a prompt, cannot read it ({error.strerror})") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"{name}: expected a prompt of at most {MAX_BYTES // 2**20} MiB, got more; shorten it")
    check_encoding(content[:PROBE_BYTES], name)
    return decode_line(content, name)


def decode_line(content: bytes, name: str = STANDARD_INPUT) -> str:
    """Decode UTF-8 text without its last line end. Raises ValueError when it is none."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start:,} is 0x{content[error.start]:02x}"
        raise ValueError(f"{name}: expected UTF-8 text, but {byte}; convert it with iconv") from None
    return text.removesuffix("\n").removesuffix("\r")


def read_lines(path: str) -> list[str]:
    """Read several prompts, one on each line; empty lines are left out. Raises ValueError when there are none."""
    lines = [line.removesuffix("\r") for line in read_prompt(path).split("\n")]
    if prompts := [line for line in lines if line]:
        return prompts
    raise ValueError(f"{STANDARD_INPUT if path == '-' else path}: expected a prompt on each line, found none")


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is completed."""
    options = parser.add_mutually_exclusive_group()
    options.add_argument(
        "--prompt",
        action="append",
        help=f"({START}); '': start a new text; -: read standard input; may be given several times",
    )
    options.add_argument(
        "--prompt-file",
        action="append",
        metavar="PATH",
        help="read the prompt from a file, without its last line end; -: standard input; may be given several times",
    )
    options.add_argument("--prompt-lines", metavar="PATH", help="read several prompts, one on each line of a file")
    options.add_argument("--interactive", action="store_true", help="complete what you type, line by line")


def chosen_prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompts that the options name. Raises ValueError when one cannot be read."""
    if args.prompt_lines:
        return read_lines(args.prompt_lines)
    if args.prompt_file:
        return [read_prompt(path) for path in args.prompt_file]
    return [read_prompt("-") if prompt == "-" else prompt for prompt in args.prompt or [START]]


def encode_prompt(
    tokenizer: "Tokenizer", prompt: str, context_length: int, special: bool | None, name: str = "--prompt"
) -> list[int]:
    """Return the tokens of a prompt; an empty one starts a new text. Raises ValueError when they fill the context."""
    notice_end(tokenizer, prompt, special)
    ids = tokenizer.encode(prompt, special=bool(special)).tolist() or [tokenizer.end_of_text]
    if len(ids) >= context_length:
        raise ValueError(
            f"{name}: expected fewer than {context_length:,} tokens, the context, got {len(ids):,}; shorten it"
        )
    return ids


def notice_outgrown(num_tokens: int, context_length: int) -> None:
    """Tell on standard error of a text that will be longer than the context."""
    if num_tokens > context_length + 1:  # the last one need not be read
        what = f"when the text fills the context of {context_length:,} tokens, only its second half is kept"
        print(f"notice: {what}", file=sys.stderr)


def add_special_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--special-tokens",
        action=argparse.BooleanOptionalAction,
        help="read <|endoftext|> as the token that ends a text; or as ordinary text (the default, with a notice)",
    )


def notice_end(tokenizer: "Tokenizer", text: str, special: bool | None) -> None:
    """Tell on standard error of the text of a special token, if the option says neither."""
    if special is None and (count := text.count(tokenizer.end_token)):
        times = counted(count, "time")
        print(
            f"notice: {tokenizer.end_token!r} is in the text {times}, as ordinary text; --special-tokens reads it as "
            "the token that ends a text, --no-special-tokens leaves it so without a notice",
            file=sys.stderr,
        )
