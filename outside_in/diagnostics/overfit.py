"""The classic check of a new model: whether it can learn one batch by heart."""

import math
from collections.abc import Iterator, Sequence

import jax

from model import create_model
from outside_in.config import ModelConfig, TrainConfig
from outside_in.data.loader import open_streams
from outside_in.data.sources import dataset_folder
from outside_in.optimizer import make_optimizer
from outside_in.train_step import compile_train_step

TARGET = 0.05  # nats
MOST_STEPS = 1_000


def overfit(model_config: ModelConfig, config: TrainConfig, steps_per_epoch: int) -> Iterator[float]:
    """Train a fresh model on the run's first microbatch alone, without dropout; yield the loss before each update.

    Ends when the loss is below `TARGET` or not finite, or after `MOST_STEPS`, over which the learning rate takes its
    usual course. Nothing is written.
    """
    changes = {"drop_rate": 0.0, "val_tokens": 0}
    folder = dataset_folder(config.dataset, fetch=True)
    stream, _ = open_streams(folder, model_config, config.model_copy(update=changes), steps_per_epoch)
    changes |= {"gradient_accumulation_steps": 1, "microbatches_per_call": None}
    config = config.model_copy(update=changes)
    model = create_model(model_config, config.seed, config.drop_rate, config.precision, config.loss_rows_per_chunk)
    optimizer = make_optimizer(model, config, MOST_STEPS)
    [first] = stream.calls(0)
    batch = jax.device_put(first._replace(inputs=first.inputs[:1], targets=first.targets[:1]))
    key = jax.random.key(config.seed)
    step = compile_train_step(model, optimizer, batch, key, config)
    for _ in range(MOST_STEPS):
        loss = float(step(model, optimizer, batch, key)["loss"])
        yield loss
        if not TARGET <= loss < math.inf:
            return


def verdict(losses: Sequence[float]) -> str:
    """Say that the model got there; raises RuntimeError, with what to look at, when it did not."""
    reached = f"loss {losses[-1]:.4f} on the first batch after {len(losses) - 1:,} updates"
    if losses[-1] < TARGET:
        return f"got there: {reached}; the model can learn"
    raise RuntimeError(
        f"did not get there: {reached}, expected below {TARGET}; look at the targets, the learning rate, the gradients "
        "(a model without attention, or whose context repeats, cannot tell all of its targets apart)"
    )
