"""Logging: dated lines above the progress bar."""

import logging

from tqdm import tqdm

log = logging.getLogger("outside_in")


class _AboveTheProgressBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname} " if record.levelno >= logging.WARNING else ""
        self.setFormatter(logging.Formatter(f"%(asctime)s  {level}%(message)s", "%Y-%m-%d %H:%M:%S"))
        tqdm.write(self.format(record))


def set_up() -> None:
    """Print what is logged from now on."""
    log.handlers[:] = [_AboveTheProgressBar()]
    log.setLevel(logging.INFO)
    log.propagate = False
