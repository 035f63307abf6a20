"""A run in progress."""

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from model import GPTModel
from outside_in.config import ModelConfig, TrainConfig, tokens_per_global_step
from outside_in.data.loader import TokenStream
from outside_in.data.tokenizer import TOKENIZER_FILE, Tokenizer
from outside_in.runtime import processes
from outside_in.runtime.log import log
from outside_in.runtime.timing import TimeBudget
from outside_in.storage import samples
from outside_in.storage.metrics import MetricsLog
from outside_in.storage.records import Records
from outside_in.storage.run_directory import RunDirectory
from outside_in.training.events import Event

RECENT = 20  # steps over which tokens per second is taken


@dataclass
class TrainState:
    """A run in progress: configs, what training changes, tokens, records."""

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
    tokenizer: Tokenizer | None  # None: unknown
    bytes_per_token: float | None  # of the validation tokens, else of the training tokens; None: unknown
    reference_losses: dict[str, float]  # in nats
    time_budget: TimeBudget  # of this process
    metrics: MetricsLog
    events: list[Event] = field(default_factory=list)  # what happened so far
    global_step: int = 0
    saved_step: int = 0  # of the newest checkpoint that is whole on the disk
    needs_validation: bool = False  # the newest checkpoint is of a milestone, but the user left before it was validated
    seconds_before: float = 0.0  # trained by earlier processes
    seconds_paused: float = 0.0  # waited for checkpoints, by earlier processes too
    paused: float = 0.0  # the part of it that no record has yet
    last_collected: float = field(default_factory=time.monotonic)
    metrics_are_behind: bool = False  # the last attempt to write them failed

    @property
    def records(self) -> Records:
        return self.metrics.records

    @property
    def measure(self) -> str:
        """Return by which of a checkpoint's losses it is judged."""
        return "val_loss" if self.val_stream else "avg_train_loss"

    @property
    def files(self) -> dict[str, bytes]:
        """Return what else a checkpoint holds, so that it completes text anywhere: the tokenizer's file."""
        return {TOKENIZER_FILE: self.tokenizer.file} if self.tokenizer and self.tokenizer.file else {}

    @property
    def tokens_per_step(self) -> int:
        return tokens_per_global_step(self.model_config, self.config, self.mesh.devices.size)

    @property
    def sequences_per_step(self) -> int:
        return self.tokens_per_step // self.model_config.context_length

    @property
    def seconds(self) -> float:
        """Return the time of training by all processes, compiling and checkpoints included."""
        return self.seconds_before + time.monotonic() - self.time_budget.started

    @property
    def tokens_per_second(self) -> float:
        """Return the speed of the latest steps."""
        return self.tokens_per_step / max(statistics.median(self.records.column("seconds", RECENT)), 1e-9)

    @property
    def period_start(self) -> int:
        """Return the last milestone before the present step. At a milestone a checkpoint is validated and sampled."""
        interval = self.config.checkpoint_interval
        return (self.global_step - 1) // interval * interval

    @property
    def is_at_milestone(self) -> bool:
        return self.global_step in (self.total_steps, self.period_start + self.config.checkpoint_interval)


def write_metrics_if_possible(state: TrainState) -> None:
    """Write new records; log a warning on failure. The next checkpoint insists."""
    try:
        state.metrics.write()
    except OSError as error:
        if not state.metrics_are_behind:
            log.warning(f"metrics cannot be written ({error}); they are kept in memory and written later")
        state.metrics_are_behind = True
    else:
        state.metrics_are_behind = False


def forget_after(state: TrainState, global_step: int) -> None:
    """Drop the metrics and samples of later steps."""
    state.metrics.cut_after(global_step)
    if processes.is_main_process():
        samples.cut_after(state.run.samples, global_step)


def set_history_aside(state: TrainState) -> None:
    """Keep the metrics and samples of a run whose checkpoints are gone."""
    run, records = state.run, state.metrics.load()
    if not records or records.last["global_step"] <= 2 * state.config.checkpoint_interval:
        return  # it was killed before its first checkpoint
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    for path in (run.metrics, run.samples):
        if path.exists():
            path.rename(path.with_name(f"{path.stem}-before-{moment}{path.suffix}"))
    log.warning(
        f"no checkpoint, but metrics up to step {records.last['global_step']:,}; they are kept as *-before-{moment}*"
    )
