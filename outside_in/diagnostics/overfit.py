"""The classic check of a new model: it must learn one batch."""

import math
from collections.abc import Iterator, Sequence

import jax

from model import model_of
from outside_in.config import ModelConfig, TrainConfig
from outside_in.data.loader import open_streams
from outside_in.data.run_length import fetch_and_count_steps
from outside_in.data.sources import dataset_folder
from outside_in.optimizer import make_optimizer
from outside_in.runtime.devices import initialize_devices
from outside_in.runtime.log import log
from outside_in.runtime.progress import Progress
from outside_in.storage.run_directory import RunDirectory
from outside_in.train_step import compile_train_step

TARGET = 0.05  # nats
MAX_STEPS = 1_000


def overfit_one_batch(_run: RunDirectory, model_config: ModelConfig, config: TrainConfig) -> None:
    """Check that a fresh model learns the first microbatch: `--overfit-one-batch`."""
    log.info(initialize_devices())
    losses = []
    with Progress(total=MAX_STEPS, unit="step") as bar:
        for loss in overfit(model_config, config, fetch_and_count_steps(model_config, config) // config.epochs):
            losses.append(loss)
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()
    log.info(verdict(losses))


def overfit(model_config: ModelConfig, config: TrainConfig, steps_per_epoch: int) -> Iterator[float]:
    """Train a fresh model on the run's first microbatch, without dropout.

    Yields the loss before each update. Ends when the loss is below `TARGET` or not finite, or after `MAX_STEPS`, over
    which the learning rate takes its usual course, but for `warmup_tokens`. Nothing is written.
    """
    changes = {"drop_rate": 0.0, "val_tokens": 0}
    folder = dataset_folder(config.dataset, fetch=True)
    stream, _ = open_streams(folder, model_config, config.model_copy(update=changes), steps_per_epoch)
    changes |= {"gradient_accumulation_steps": 1, "microbatches_per_call": None, "warmup_tokens": None}
    config = config.model_copy(update=changes)
    model = model_of(model_config, config)
    optimizer = make_optimizer(model, config, MAX_STEPS)
    [first] = stream.calls(0)
    batch = jax.device_put(first._replace(inputs=first.inputs[:1], targets=first.targets[:1]))
    key = jax.random.key(config.seed)
    step = compile_train_step(model, optimizer, batch, key, config)
    for _ in range(MAX_STEPS):
        loss = float(step(model, optimizer, batch, key).loss)
        yield loss
        if not TARGET <= loss < math.inf:
            return


def verdict(losses: Sequence[float]) -> str:
    """Return a line if the model passed; raise RuntimeError if it failed."""
    reached = f"loss {losses[-1]:.4f} on the first batch after {len(losses) - 1:,} updates"
    if losses[-1] < TARGET:
        return f"passed: {reached}; the model can learn"
    raise RuntimeError(
        f"failed: {reached}, expected below {TARGET}; check the targets, the learning rate and the gradients "
        "(without attention, or with a context that repeats, a model cannot learn all of its targets)"
    )
