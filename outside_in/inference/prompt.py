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
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start:,} is 0x{content[error.start]:02x}"
        raise ValueError(f"{name}: expected UTF-8 text, but {byte}; convert it with iconv") from None
    return text.removesuffix("\n").removesuffix("\r")


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
