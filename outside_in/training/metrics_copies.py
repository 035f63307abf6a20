"""Copies the metrics and samples of a run to its loggers, which can neither end nor delay its training.

A logger that has just what the checkpoint has is continued. Else, as after a kill, its copy is made anew from
`metrics.jsonl` and `samples.txt`: so it has every step once.
"""

import contextlib
import io
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

from outside_in.data.tokenizer import bits_per_byte
from outside_in.reports.flops import mfu
from outside_in.reports.loggers import LOGGERS, Logger
from outside_in.runtime import processes
from outside_in.runtime.devices import device_kind
from outside_in.runtime.log import log
from outside_in.storage import atomic, metrics, samples
from outside_in.storage.records import Record
from outside_in.training.state import TrainState

COPIED = ("loss", "val_loss", "gradient_norm", "learning_rate", "tokens_seen", "rejected_updates")


class MetricsCopies:
    """The loggers of a run: opened on entry, closed on exit, in the main process alone."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._start = state.global_step - state.needs_validation  # the step that lacks validation comes once more
        self._last = self._start  # copied step
        self._pending: list[Record] = []
        self._samples_size = 0  # bytes
        self._loggers: dict[str, Logger] = {}
        self._names = state.config.log_to if processes.is_main_process() else []

    def __enter__(self) -> Self:
        self._for_each(self._names, self._open)
        if self._names and self._state.needs_validation:
            self._pending.append(self._state.records.last)
        self._samples_size = self._size_of_samples()
        return self

    def __exit__(self, *_: object) -> None:
        self._for_each(list(self._loggers), self._close)

    def add(self, record: Record) -> None:
        """Take the record of a step. It is copied with the next `flush`, so it may still change."""
        if self._loggers:
            self._pending.append(record)

    def flush(self) -> None:
        """Copy the records that are whole, and the samples of their steps."""
        keep = len(self._pending) - self._state.needs_validation
        ready, self._pending = self._pending[:keep], self._pending[keep:]
        texts: dict[int, str] = {}
        if ready and (size := self._size_of_samples()) != self._samples_size:
            texts, self._samples_size = samples.read(self._state.run.samples), size
        for name in list(self._loggers):
            self._attempt(name, self._copy, ready, texts)
        self._last = ready[-1]["global_step"] if ready else self._last

    def _for_each(self, names: Sequence[str], action: Callable[..., None]) -> None:
        if names:
            with self._state.time_budget.during("loggers"):
                for name in names:
                    self._attempt(name, action)

    def _open(self, name: str) -> None:
        state = self._state
        copy = self._read_notes().get(name, {})
        is_current = (copy.get("folder"), copy.get("step")) == (self._folder, self._start) and self._start > 0
        configs = {"model": state.model_config.model_dump(), "train": state.config.model_dump()}
        with _without_output():
            try:
                logger = LOGGERS[name](state.run, configs, copy.get("id") if is_current else None)
            except LookupError:  # somebody has deleted it
                logger, is_current = LOGGERS[name](state.run, configs, None), False
        self._loggers[name] = logger
        self._note(name, step=None)  # it may have any steps from now on
        if not is_current and self._start:
            records = [r for r in metrics.read(state.run.metrics) if r["global_step"] <= self._start]
            self._copy(name, records, samples.read(state.run.samples))
            log.info(f"log_to {name}: made anew from {state.run.metrics.name}, up to step {self._start:,}")
        log.info(f"log_to {name}: {logger.where}")

    def _copy(self, name: str, records: list[Record], texts: dict[int, str]) -> None:
        for record in records:
            text = texts.get(step := record["global_step"])
            self._loggers[name].log(step, numbers_of(record, self._state), {"samples": text} if text else {})

    def _close(self, name: str) -> None:
        with _without_output():
            self._loggers[name].close()
        self._note(name, step=self._last)

    def _attempt(self, name: str, action: Callable[..., None], *arguments: Any) -> None:
        """Do something with a logger. If that fails, close it, and go on without it."""
        try:
            action(name, *arguments)
        except Exception as error:
            if logger := self._loggers.pop(name, None):
                with contextlib.suppress(Exception), _without_output():
                    logger.close()
            message = " ".join(str(error).split())[:300] or type(error).__name__
            log.warning(f"log_to {name}: {message}; it gets nothing more, and is made anew at the next start")

    @property
    def _folder(self) -> str:
        return str(self._state.run.path.resolve())  # a copy of the run's folder is another run

    def _read_notes(self) -> dict[str, dict[str, Any]]:
        try:
            notes = json.loads(self._state.run.loggers.read_text())
        except (OSError, ValueError):
            return {}
        return {name: note for name, note in notes.items() if isinstance(note, dict)} if isinstance(notes, dict) else {}

    def _note(self, name: str, step: int | None) -> None:
        """Remember what a logger has."""
        note = {"id": self._loggers[name].id, "folder": self._folder, "step": step}
        atomic.write_text(self._state.run.loggers, json.dumps(self._read_notes() | {name: note}, indent=2) + "\n")

    def _size_of_samples(self) -> int:
        path = self._state.run.samples
        return path.stat().st_size if path.exists() else 0


def numbers_of(record: Record, state: TrainState) -> dict[str, float]:
    """Return what a logger shows of a record; what is null, or unknown, is left out."""
    numbers = {name: record[name] for name in COPIED if record.get(name) is not None}
    if seconds := record["seconds"]:
        speed = numbers["tokens_per_second"] = state.tokens_per_step / seconds
        share = mfu(speed / state.mesh.devices.size, state.model_config, device_kind(), state.config.precision)
        numbers |= {"mfu": share} if share else {}
    if (loss := record.get("val_loss")) is not None:
        numbers |= {"val_perplexity": math.exp(loss)} if loss < math.log(1e30) else {}
        if state.bytes_per_token:
            numbers["val_bits_per_byte"] = bits_per_byte(loss, state.bytes_per_token)
    return numbers


def _without_output() -> contextlib.AbstractContextManager[Any]:
    """Keep greetings off the output. A package that would ask for a password finds no terminal, and raises."""
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
    return stack
