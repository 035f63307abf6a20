"""A prompt to talk to: `test_generation.py RUN --interactive`."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from model import GPTModel
from outside_in.config_files import MIN_FLOAT32
from outside_in.data.tokenizer import Tokenizer
from outside_in.inference import settings
from outside_in.inference.generation import ALL, Sampling, stream
from outside_in.inference.prompt import decode_line, encode_prompt, notice_outgrown
from outside_in.runtime import cli, signals
from outside_in.storage.checkpoint_folder import META_FILE
from outside_in.storage.strict_json import read_json

HELP = """\
Type a text, and the model continues it. Ctrl-C stops that. A line that starts with / is a command:
  /temperature 0.7   0: always the likeliest token; 1: the model's own distribution
  /top-p 0.9         sample only from the likeliest tokens whose probabilities add up to this; or off
  /top-k 40          sample only from so many likeliest tokens; or off
  /seed 1            another seed, another completion
  /tokens 100        number of tokens to add
  /settings          show all of these
  /quit              leave, as Ctrl-D does
For a text that starts with /, type //."""


def check_objective(weights: Path, name: Path) -> None:
    """Raise ValueError for weights whose checkpoint says that they were trained to repeat their input."""
    meta = weights.parent / META_FILE
    train = read_json(meta).get("train_config") if meta.is_file() else None
    if isinstance(train, dict) and train.get("objective") == "a-to-a":
        raise ValueError(
            f"{name}: was trained a-to-a, to repeat its input, so it continues nothing; "
            f"uv run test_a_to_a.py {name} --text TEXT"
        )


def converse(model: GPTModel, tokenizer: Tokenizer, args: argparse.Namespace) -> int:
    """Complete the lines of a terminal, or of standard input, until they end. Returns the exit code.

    `args` has the settings that the session starts with.
    """
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # some builds of Python lack it
            import readline  # noqa: F401  # gives `input` line editing, and a history
        print(f"{settings.describe(args)}; /help lists commands, Ctrl-D leaves")
    session, code = Session(model, tokenizer, argparse.Namespace(**vars(args)), is_terminal), cli.DONE
    with signals.raising():
        while not session.is_over:
            try:
                session.answer(read_line(is_terminal))
            except EOFError:
                break
            except ValueError as error:
                code = cli.report_error(error, debug=args.debug)
            except KeyboardInterrupt:
                if not is_terminal:  # where nobody could end the input
                    raise
                print("\nCtrl-D leaves", file=sys.stderr)
    return cli.DONE if is_terminal else code


def read_line(is_terminal: bool) -> str:
    """Read a line without its end; a terminal shows a prompt. Raises EOFError, and ValueError for other than UTF-8."""
    if is_terminal:
        try:
            return input("> ")
        except EOFError:
            print()
            raise
    if not (line := sys.stdin.buffer.readline()):
        raise EOFError
    return decode_line(line)


class Session:
    """A model, and the settings of its next completion."""

    def __init__(self, model: GPTModel, tokenizer: Tokenizer, args: argparse.Namespace, is_terminal: bool) -> None:
        self.model, self.tokenizer, self.args, self.is_terminal = model, tokenizer, args, is_terminal
        self.is_over = False

    def answer(self, line: str) -> None:
        """Obey a command, or complete a text. Raises ValueError when it is neither."""
        if line.startswith("/") and not line.startswith("//"):
            self.obey(*line[1:].split(maxsplit=1))
        elif line.strip():
            self.complete(line.removeprefix("/") if line.startswith("//") else line)

    def obey(self, command: str = "", value: str = "") -> None:
        name = command.replace("-", "_")
        if name in settings.SETTINGS:
            setattr(self.args, name, settings.parse(name, value.strip()))
            if self.is_terminal:
                print(settings.describe(self.args))
        elif command == "settings":
            print(settings.describe(self.args))
        elif command == "help":
            print(HELP)
        elif command == "quit":
            self.is_over = True
        else:
            raise ValueError(f"/{command}: no such command; /help lists them")

    def complete(self, prompt: str) -> None:
        context_length, args = self.model.config.context_length, self.args
        prompt_ids = encode_prompt(self.tokenizer, prompt, context_length, args.special_tokens, "the prompt")
        notice_outgrown(len(prompt_ids) + args.tokens, context_length)
        stop = signals.StopRequest()
        print(prompt, end="", flush=True)
        with signals.listening(stop, "the completion stops; Ctrl-C again leaves the program", "leaving at once"):
            for text in self.continuation(prompt_ids):
                if stop:
                    break
                print(text, end="", flush=True)
        print(flush=True)
        if stop and stop.received_signal != signal.SIGINT:
            raise SystemExit(stop.exit_code)

    def continuation(self, prompt_ids: list[int]) -> Iterator[str]:
        """Yield the text that follows. Whatever the settings but top-k, the same compiled programs make it."""
        args, end = self.args, self.tokenizer.end_of_text
        sampling = Sampling(
            max(args.temperature, MIN_FLOAT32),  # which is greedy
            args.top_k,
            ALL if args.top_p in (None, 1) else args.top_p,
            self.tokenizer.vocab_size,
        )
        options = {"sampling": sampling, "seed": args.seed, "size": self.model.config.context_length}
        stop_id = None if args.ignore_end else end
        parts = stream(self.model, prompt_ids, args.tokens, stop_id=stop_id, **options)
        yield from self.tokenizer.decode_stream((part[0].tolist() for part in parts), stop_id)
