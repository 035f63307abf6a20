"""The paths inside `runs/<name>/`, and the lock of a run."""

import contextlib
import difflib
import fcntl
import os
import re
import shlex
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

OWNER = re.compile(r"process (\d+) on (\S+)\n")


@dataclass(frozen=True)
class RunDirectory:
    """One run: the user's `model.json` and `train.json`, and what training adds."""

    path: Path

    @property
    def model_config(self) -> Path:
        return self.path / "model.json"

    @property
    def train_config(self) -> Path:
        return self.path / "train.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.txt"

    @property
    def initial_weights(self) -> Path:
        """Return where an import puts the weights that its run starts from."""
        return self.path / "initial" / "model.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def loss_chart(self) -> Path:
        return self.path / "loss-chart.png"

    @property
    def learning_rate_chart(self) -> Path:
        return self.path / "learning-rate-chart.png"

    @property
    def gradient_norm_chart(self) -> Path:
        return self.path / "gradient-norm-chart.png"

    @property
    def loggers(self) -> Path:
        """Return where a run notes what the loggers have."""
        return self.path / "loggers.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def rejected(self, global_step: int) -> Path:
        """Return the path of a rejected update's record."""
        return self.path / f"rejected-{global_step}.json"

    def check(self) -> None:
        """Raise ValueError unless the folder exists."""
        if self.path.is_file():
            raise ValueError(f"{self.path}: expected a run folder, got a file; name the folder that holds train.json")
        if not self.path.is_dir():
            beside = [path.name for path in self.path.parent.iterdir()] if self.path.parent.is_dir() else []
            close = difflib.get_close_matches(self.path.name, beside, n=1)
            hint = f"did you mean {self.path.with_name(close[0])}?" if close else "`uv run train.py` lists the runs"
            raise ValueError(f"{self.path}: expected a run folder, found nothing; {hint}")
        check_not_hugging_face(self.path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run for this process.

        A lock left by a dead process does not count. Raises ValueError naming host and process id when another process
        holds it, or when the folder is read-only.
        """
        lock_file = self.path / ".lock"
        if self.checkpoints.is_dir() and not os.access(self.checkpoints, os.W_OK | os.X_OK):
            raise ValueError(f"{self.checkpoints}: cannot write here; make the folder writable")
        try:
            descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot write here ({error.strerror}); make the folder writable") from None
        with os.fdopen(descriptor, "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = _owner(file)
                raise ValueError(f"{self.path}: is being trained by {owner}; stop that one or wait for it") from None
            except OSError as error:  # some network disks have no locks
                raise ValueError(
                    f"{lock_file}: cannot be locked ({error.strerror}); mount its disk with locks, or use a local one"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield


def check_not_hugging_face(folder: Path) -> None:
    """Raise ValueError when a folder holds a model as `transformers` saves it, in one file or several."""
    if (folder / "config.json").is_file() and not (folder / "train.json").exists():
        raise ValueError(f"{folder}: {import_advice(folder)}")


def import_advice(source: Path) -> str:
    return f"is in transformers' format; import it: uv run convert_gpt2.py import {shlex.quote(str(source))} RUN"


def _owner(file: TextIO) -> str:
    """Return who holds a lock.

    The holder writes that just after it gets the lock, over what a dead process left; so this waits up to a second.
    """
    text = ""
    for _ in range(100):
        file.seek(0)
        text = file.read()
        if (match := OWNER.fullmatch(text)) and (match[2] != socket.gethostname() or _is_alive(int(match[1]))):
            return text.strip()
        time.sleep(0.01)
    return text.strip() or "another process"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def find_runs(folder: Path) -> list[RunDirectory]:
    """List the runs at and below `folder`, in order of their names. Links to folders are followed, once each."""
    runs, seen = [], set()
    for name, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(name)) in seen:
            folders.clear()
            continue
        seen.add(real)
        if "train.json" in files:
            runs.append(Path(name))
    return [RunDirectory(path) for path in sorted(runs)]
