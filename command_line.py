"""The manners that all programs share: one-line errors, exit codes, `--debug`, dated lines."""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from tqdm import tqdm

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one `error:` line, and which knows `--debug`."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(USAGE)


def say(line: str) -> None:
    """Print one dated line, above the progress bar where there is one."""
    tqdm.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}")


def run(main: Callable[[argparse.Namespace], int], parser: ArgumentParser) -> NoReturn:
    """Parse the arguments, run `main`, and turn what it raises into one line and an exit code.

    ValueError is what the user can mend (2); everything else is a failed run (1).
    """
    args = parser.parse_args()
    try:
        code = main(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left: `train.py | head`
        sys.stderr.close()
        code = FAILED
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(f"error: {_one_line(error)}", file=sys.stderr)
        code = USAGE if isinstance(error, ValueError) else FAILED
    raise SystemExit(code)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
        return f"out of memory; use a smaller microbatch_size and more gradient_accumulation_steps ({text[:200]})"
    if isinstance(error, ValueError | RuntimeError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text}; --debug shows where"
