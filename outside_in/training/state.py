"""A run in progress: what training changes, and what happens to it at a step and at a checkpoint."""

import json
import statistics
import time
import zlib
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from model import GPTModel
from outside_in import train_step
from outside_in.config import ModelConfig, TrainConfig, tokens_per_global_step
from outside_in.data.loader import Batch, TokenStream
from outside_in.diagnostics.parameters import describe_rejection
from outside_in.runtime import processes
from outside_in.runtime.timing import Stopwatch
from outside_in.storage import atomic, metrics, samples
from outside_in.storage.run_directory import RunDirectory
from outside_in.weights import named_arrays

ABOUT_TO_STEP = "compiling the training step"  # said when everything is loaded; prove_resume.py waits for it
RECENT = 20  # steps over which tokens per second is taken
Report = dict[str, Any]  # of one compiled call, on the device


@dataclass
class Training:
    """A run in progress: its configs, what training changes, and the tokens that it consumes."""

    run: RunDirectory
    model_config: ModelConfig
    config: TrainConfig  # with the microbatches that this mesh takes
    mesh: Mesh
    total_steps: int
    model: GPTModel
    optimizer: nnx.Optimizer
    train_stream: TokenStream
    val_stream: TokenStream | None
    snapshot: dict[str, Any]  # what a checkpoint remembers of configs, data and versions
    landmarks: dict[str, float]  # losses to compare with, in nats
    stopwatch: Stopwatch  # of this process
    global_step: int = 0
    saved_step: int = 0  # of the newest checkpoint that is whole on the disk
    seconds_before: float = 0.0  # trained by earlier processes
    seconds_paused: float = 0.0  # waited for checkpoints, by earlier processes too
    paused: float = 0.0  # the part of it that no record has yet
    wish: int = 0  # of any process, as the last step that was waited for has brought it to all
    lacks_milestone: bool = False  # the newest checkpoint should have been validated, but the user wanted to leave
    started: float = field(default_factory=time.monotonic)
    records: list[metrics.Record] = field(default_factory=list)

    num_written: int = 0  # of the records, how many are in metrics.jsonl
    is_behind: bool = False  # the last attempt to write them failed
    last_collected: float = field(default_factory=time.monotonic)

    @property
    def tokens_per_step(self) -> int:
        return tokens_per_global_step(self.model_config, self.config, self.mesh.devices.size)

    @property
    def sequences_per_step(self) -> int:
        return self.tokens_per_step // self.model_config.context_length

    @property
    def seconds(self) -> float:
        """Time of training by all processes, compiling and checkpoints included."""
        return self.seconds_before + time.monotonic() - self.started


def write_metrics(training: Training, *, durable: bool = False) -> None:
    """Append the records that are not in the file yet; after an OSError they are still to be written."""
    if processes.is_first():
        metrics.append(training.run.metrics, training.records[training.num_written :], durable=durable)
    training.num_written = len(training.records)


def note_metrics(training: Training) -> list[str]:
    """Write new records if that is possible now; the next checkpoint insists. Returns what there is to say."""
    try:
        write_metrics(training)
    except OSError as error:
        is_news, training.is_behind = not training.is_behind, True
        return [f"WARNING metrics cannot be written ({error}); they are kept and tried again"] if is_news else []
    training.is_behind = False
    return []


def cut_after(training: Training, global_step: int) -> None:
    """Forget what is known of later steps; only the first process knows anything."""
    if processes.is_first():
        training.records = metrics.cut_after(training.run.metrics, global_step)
        training.num_written = len(training.records)
        samples.cut_after(training.run.samples, global_step)


def note_rejection(training: Training, step: int, evidence: list[dict[str, np.ndarray]]) -> str:
    """Write down what is known of a rejected update; return what there is to say.

    The parameters are those after the next step, which may have begun: what is not finite stays so.
    """
    model = training.model
    parameters = named_arrays(nnx.state(model, nnx.Param))
    bad_parameters = [name for name, is_finite in jax.device_get(_all_finite(parameters)).items() if not is_finite]
    positions_KB = training.config.start_train_token + training.train_stream.positions(step - 1)
    known = describe_rejection(
        step, evidence, list(parameters), train_step.backward_order(model), bad_parameters, positions_KB
    )
    path = training.run.rejected(step)
    if not processes.is_first():
        return ""
    try:
        atomic.write_text(path, json.dumps(known, indent=1, allow_nan=False) + "\n")
    except OSError as error:  # a full disk must not end the training
        return f"WARNING step {step:,}: its update was rejected, and what is known cannot be written ({error})"
    return f"WARNING step {step:,}: its update was rejected, {known['reason']}; {path} says where"


@jax.jit
def _all_finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(array).all() for name, array in arrays.items()}


def set_history_aside(training: Training) -> list[str]:
    """Keep the metrics and samples of a run whose checkpoints are gone; return what there is to say."""
    run, records = training.run, metrics.read(training.run.metrics) if processes.is_first() else []
    if not records or records[-1]["global_step"] <= 2 * training.config.checkpoint_interval:
        return []  # it was killed before its first checkpoint
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    for path in (run.metrics, run.samples):
        if path.exists():
            path.rename(path.with_name(f"{path.stem}-before-{moment}{path.suffix}"))
    return [f"WARNING no checkpoint, but metrics up to step {records[-1]['global_step']:,}: kept as *-before-{moment}*"]


def period_start(training: Training) -> int:
    """Return the milestone before the present step: a step at which a checkpoint validates and samples."""
    interval = training.config.checkpoint_interval
    return (training.global_step - 1) // interval * interval


def at_milestone(training: Training) -> bool:
    return training.global_step in (training.total_steps, period_start(training) + training.config.checkpoint_interval)


def place_batch(training: Training, wish: int = 0) -> tuple[list[Batch], int]:
    """Put the arrays of the coming global step on the devices, a batch per compiled call, with this process's wish.

    Also return the CRC-32 of the tokens that this process has brought.
    """
    calls = training.train_stream.calls(training.global_step, training.config.calls_per_step)
    checksum = 0
    for batch in calls:
        checksum = zlib.crc32(batch.targets.tobytes(), zlib.crc32(batch.inputs.tobytes(), checksum))
    return [train_step.place_batch(batch, training.mesh, wish) for batch in calls], checksum


def mean_of_calls(reports: list[Report]) -> float:
    return float(np.mean([report["loss"] for report in reports], dtype=np.float64))


def collect(training: Training, step: int, reports: list[Report], data_crc32: int) -> tuple[metrics.Record, list[str]]:
    """Wait for a step's reports and add its record; return it, and what there is to say."""
    host_reports = jax.device_get(reports)
    now = time.monotonic()
    evidence = [report.pop("evidence") for report in host_reports]
    training.wish = max(int(report.pop("wish")) for report in host_reports)
    record: metrics.Record = {
        "global_step": step,
        **{name: value.item() for name, value in host_reports[-1].items()},
        "loss": metrics.finite(mean_of_calls(host_reports)),
        "gradient_norm": metrics.finite(host_reports[-1]["gradient_norm"].item()),
        "tokens_seen": step * training.tokens_per_step,
        "data_crc32": data_crc32,  # of the tokens that were trained on: what two runs must share to be the same
        "seconds": round(now - training.last_collected, 4),
    }
    if training.paused:
        record["checkpoint_seconds"] = round(training.paused, 4)
        training.paused = 0.0
    training.last_collected = now
    training.records.append(record)
    return record, [note_rejection(training, step, evidence)] if record["rejected"] else []


def tokens_per_second(training: Training) -> float:
    """Return the speed of the latest steps."""
    return training.tokens_per_step / max(statistics.median(r["seconds"] for r in training.records[-RECENT:]), 1e-9)
