"""TensorBoard, trackio and Weights & Biases: where else the metrics of a run can be seen.

Each has one small class, and its package is imported only when the class is used. `metrics.jsonl` stays the truth.
"""

import html
import importlib.util
import json
import os
import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from outside_in.storage.run_directory import RunDirectory

PROJECT = "outside-in"
TIMEOUT_SECONDS = 30  # for a network that does not answer
Hyperparameters = dict[str, dict[str, Any]]  # by file: "model" and "train"


class Logger(Protocol):
    """A copy of a run's metrics in another program.

    It is made with the run, the configs, and the `id` of the copy to continue; LookupError means that there is none any
    more. Without an id it makes a new one, in place of an old one.
    """

    id: str  # by which the package finds the copy again
    where: str  # and what to type to see it

    def log(self, global_step: int, numbers: dict[str, float], texts: dict[str, str]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder, written without TensorFlow or PyTorch."""

    def __init__(self, run: RunDirectory, configs: Hyperparameters, former: str | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._text_pb = Event, Summary, text_pb
        folder = run.path / "tensorboard"
        folder.mkdir(exist_ok=True)
        old = list(folder.glob("events.out.tfevents.*"))
        if former and not old:
            raise LookupError
        for path in () if former else old:
            path.unlink()
        self._file = (folder / f"events.out.tfevents.{time.time():.6f}").open("xb")  # readers go by their names' order
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        if not former:
            flat = {f"{file}.{key}": value for file, config in configs.items() for key, value in config.items()}
            simple = {key: v if isinstance(v, int | float | str) else json.dumps(v) for key, v in flat.items()}
            self._add(step=0, session_log=SessionLog(status=SessionLog.START))  # what readers still have goes
            self._add(step=0, summary=hparams_pb(simple))
        self.id = "tensorboard"
        self.where = f"uv run tensorboard --logdir {shlex.quote(str(run.path.parent))}"

    def log(self, global_step: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        summary = self._summary(
            value=[self._summary.Value(tag=tag, simple_value=number) for tag, number in numbers.items()]
        )
        for tag, text in texts.items():
            summary.MergeFrom(self._text_pb(tag, _verbatim(text)))
        self._add(step=global_step, summary=summary)

    def _add(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()

    def close(self) -> None:
        self._records.close()


class Trackio:
    """A run in trackio's own database, or on the Space or server that its variables name."""

    def __init__(self, run: RunDirectory, configs: Hyperparameters, former: str | None) -> None:
        import matplotlib.figure  # noqa: F401  # trackio looks into it at each value, while another thread imports it
        import trackio

        self._markdown, self._finish = trackio.Markdown, trackio.finish
        folder = str(run.path.resolve())
        self.id = former or _free_trackio_name(run.path.resolve().name, folder)
        try:
            self._run = trackio.init(
                project=PROJECT,
                name=self.id,
                config={**configs, "folder": folder},
                resume="must" if former else "never",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        except ValueError:
            if not former:
                raise
            raise LookupError from None
        self.where = f"uv run trackio show --project {PROJECT}"

    def log(self, global_step: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        self._run.log(
            numbers | {name: self._markdown(_verbatim(text)) for name, text in texts.items()}, step=global_step
        )

    def close(self) -> None:
        self._finish()


def _verbatim(text: str) -> str:
    """Return Markdown that shows a text as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _free_trackio_name(name: str, folder: str) -> str:
    """Return a name that no run of another folder has; delete the runs of this one."""
    import trackio

    try:
        runs = list(trackio.Api().runs(PROJECT))
    except ValueError:  # there is no such project yet
        return name
    ours = [run for run in runs if (run.config or {}).get("folder") == folder]
    for run in ours:
        run.delete()
    is_taken = any(run.name == name for run in runs if run not in ours)
    return f"{name}-{secrets.token_hex(2)}" if is_taken else name


class Wandb:
    """A run of Weights & Biases, with its files in the run's folder; offline where it cannot log in."""

    def __init__(self, run: RunDirectory, configs: Hyperparameters, former: str | None) -> None:
        import wandb

        if former and not any((run.path / "wandb").glob(f"*run-*-{former}")):
            raise LookupError
        for old in () if former else (run.path / "wandb").glob("offline-run-*"):  # they would be uploaded as well
            shutil.rmtree(old)
        self._html, self._teardown = wandb.Html, wandb.teardown
        self.id = former or secrets.token_hex(4)
        options: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", PROJECT),
            "name": run.path.resolve().name,
            "id": self.id,
            "resume": "allow",
            "dir": str(run.path),
            "config": configs,
            "allow_val_change": True,
            "settings": wandb.Settings(
                console="off", silent=True, init_timeout=TIMEOUT_SECONDS, finish_timeout=TIMEOUT_SECONDS
            ),
        }
        reason = ""
        try:
            self._run = wandb.init(**options)
        except wandb.Error as error:  # not logged in, or no network
            reason = f" ({' '.join(str(error).split())[:200]})"
            self._run = wandb.init(**options, mode="offline")
        upload = f"uv run wandb sync {shlex.quote(str(run.path / 'wandb'))}"
        self.where = self._run.url or f"offline{reason}; {upload}"

    def log(self, global_step: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        pages = {
            name: self._html(f"<pre>{html.escape(text)}</pre>", data_is_not_path=True) for name, text in texts.items()
        }
        self._run.log(numbers | pages, step=global_step)

    def close(self) -> None:
        self._run.finish()
        self._teardown()  # waits for the process that writes the file


LOGGERS: dict[str, Callable[[RunDirectory, Hyperparameters, str | None], Logger]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}


def check_installed(run: RunDirectory, names: Sequence[str]) -> None:
    """Raise ValueError when the package of a logger is missing."""
    specs = {name: importlib.util.find_spec(name) for name in names}
    missing = [name for name, spec in specs.items() if spec is None or spec.origin is None]  # wandb/ may be just data
    if missing:
        groups = " ".join(f"--group {name}" for name in missing)
        raise ValueError(
            f"{run.path}: log_to: {' and '.join(missing)} not installed; this line installs what it needs: "
            f"uv run {groups} train.py {shlex.quote(str(run.path))}"
        )
