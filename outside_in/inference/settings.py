"""How completions are sampled, as `test_generation.py` is told on its command line or while it runs."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from outside_in.config_files import MIN_FLOAT32


class Setting(NamedTuple):
    """What a setting may be."""

    parse: Callable[[str], Any]
    fits: Callable[[Any], bool]
    expected: str


SETTINGS = {
    "temperature": Setting(float, lambda value: 0 <= value < float("inf"), "0 (greedy) or a positive number"),
    "top_k": Setting(int, lambda value: value >= 1, "a number above 0"),
    "top_p": Setting(float, lambda value: 0 < value <= 1, "a share above 0, at most 1"),
    "seed": Setting(int, lambda value: 0 <= value < 2**31, "a number from 0 to 2,147,483,647"),
    "tokens": Setting(int, lambda value: value >= 1, "a number above 0"),
}
OFF = "off"  # what a restriction without a value is called
RESTRICTIONS = ("top_k", "top_p")


def flag(name: str) -> str:
    return name.replace("_", "-")


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that make no sense."""
    for name, setting in SETTINGS.items():
        value = getattr(args, name)
        if value is not None and not setting.fits(value):
            raise ValueError(f"--{flag(name)}: expected {setting.expected}, got {value}")
    if args.samples < 1:
        raise ValueError(f"--samples: expected a number above 0, got {args.samples}")
    if args.interactive and args.samples > 1:
        raise ValueError("--samples: not with --interactive, where each completion is shown as it comes")
    if args.temperature < MIN_FLOAT32 and (args.samples > 1 or args.top_k or args.top_p):
        raise ValueError(
            "--samples, --top-k and --top-p need a --temperature above 0: greedy completions are all the same"
        )


def parse(name: str, text: str) -> Any:
    """Return the value of a setting that was typed. Raises ValueError when it is none."""
    if text == OFF and name in RESTRICTIONS:
        return None
    setting = SETTINGS[name]
    try:
        value = setting.parse(text)
    except ValueError:
        value = None
    if value is None or not setting.fits(value):
        or_off = f", or {OFF}" if name in RESTRICTIONS else ""
        raise ValueError(f"/{flag(name)}: expected {setting.expected}{or_off}, got {text or 'nothing'}")
    return value


def describe(args: argparse.Namespace) -> str:
    """Return all settings in one line."""
    values = {flag(name): getattr(args, name) for name in SETTINGS}
    return ", ".join(f"{name} {OFF if value is None else value}" for name, value in values.items())
