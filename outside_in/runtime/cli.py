"""What all programs share: one-line errors and warnings, exit codes, `--debug`."""

import argparse
import contextlib
import errno
import io
import itertools
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

from outside_in.runtime import log

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
READER_HAS_GONE = (errno.EPIPE, errno.EIO)


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser with one-line errors and the option `--debug`."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        print(f"error: {' '.join(message.split())}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(USAGE)


class KeyArgumentParser(ArgumentParser):
    """Takes `KEY=VALUE` anywhere on the line, and says how to write a key that comes as an option."""

    _arguments: Sequence[str] = ()

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._arguments = sys.argv[1:] if args is None else list(args)
        return self.parse_intermixed_args(self._arguments, namespace)

    def error(self, message: str) -> NoReturn:
        from outside_in.overrides import as_key

        for option, following in itertools.pairwise([*self._arguments, "--"]):
            name, equals, value = option.partition("=")
            if option.startswith("--") and (key := as_key(name)):
                value = value if equals else "VALUE" if following.startswith("--") else following
                message = f"{option}: keys have no dashes before them; write {shlex.quote(f'{key}={value}')}"
                break
        super().error(message)


class _TolerantStream:
    """An output stream whose errors do not end the program.

    On a full disk the output is lost, and also when its reader has gone, as `tee` goes with the Ctrl-C that stops the
    training. Characters that it cannot show are replaced.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.is_cut_short = False
        self._stream = stream or Path(os.devnull).open("w")  # noqa: SIM115  # it was closed before the program started
        if isinstance(self._stream, io.TextIOWrapper):  # a terminal or file that is not UTF-8 lacks characters
            self._stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._tolerate(error)
            return len(text)

    def flush(self, *, is_last: bool = False) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._tolerate(error, is_last=is_last)

    def _tolerate(self, error: OSError, *, is_last: bool = False) -> None:
        self.is_cut_short |= error.errno not in READER_HAS_GONE
        if is_last or error.errno in READER_HAS_GONE:  # nobody reads what is still to come
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run(
    main: Callable[[argparse.Namespace], int],
    parser: ArgumentParser,
    arguments: list[str] | None = None,
    *,
    trains: bool = False,
) -> NoReturn:
    """Run `main` on the parsed arguments and exit with its code.

    Output that the disk has no place for makes that code 1, unless the program `trains`: then it is only a log.
    An exception becomes one line and an exit code: 2 for ValueError, which the user can fix, 1 for everything else.
    """
    args = parser.parse_args(arguments)
    warnings.showwarning = _show_warning
    log.set_up()
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not in the background
    if listens:
        signal.signal(signal.SIGINT, _interrupt)
    output: Any = _TolerantStream(sys.stdout)
    errors: Any = _TolerantStream(sys.stderr)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = main(args)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = INTERRUPTED
        except Exception as error:
            code = report_error(error, debug=args.debug)
        finally:
            if listens:
                signal.signal(signal.SIGINT, signal.default_int_handler)
        output.flush(is_last=True)
        if output.is_cut_short and code == DONE and not trains:
            print("error: the output could not be written, is the disk full?", file=sys.stderr)
            code = FAILED
        errors.flush(is_last=True)
    raise SystemExit(code)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; but leave at once during an import, which may swallow that, or crash from it."""
    while frame:
        if "importlib" in frame.f_code.co_filename:
            os.write(2, b"interrupted\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    signal.default_int_handler(signum, frame)


def report_error(error: Exception, *, debug: bool) -> int:
    """Print an error as one line, and return its exit code. With `debug`, the traceback comes first."""
    if debug:
        traceback.print_exception(error)
    print(f"error: {_one_line(error)}", file=sys.stderr)
    return USAGE if isinstance(error, ValueError) else FAILED


def is_out_of_device_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error)


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    tqdm.write(f"WARNING {' '.join(str(message).split())}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if is_out_of_device_memory(error) or isinstance(error, MemoryError):
        return f"out of memory; use a smaller microbatch_size and more gradient_accumulation_steps ({text[:200]})"
    if isinstance(error, ValueError | RuntimeError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text}; --debug shows where"
