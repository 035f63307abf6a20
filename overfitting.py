"""The classic check of a new model: whether it can learn one batch by heart."""

from collections.abc import Iterator

import jax

from config import ModelConfig, TrainConfig
from data import open_streams
from dataset_sources import dataset_folder
from model import create_model
from optimizer import make_optimizer
from steps import compile_train_step

TARGET = 0.05  # nats
MOST_STEPS = 1_000


def overfit(model_config: ModelConfig, config: TrainConfig) -> Iterator[float]:
    """Train a fresh model on the first global step's batch alone, without dropout; yield the loss before each update.

    Ends when the loss is below `TARGET`, or after `MOST_STEPS`, over which the learning rate takes its usual course.
    Nothing is written.
    """
    config = config.model_copy(update={"drop_rate": 0.0})
    stream, _ = open_streams(dataset_folder(config.dataset, fetch=True), model_config, config, steps_per_epoch=1)
    model = create_model(model_config, config.seed, config.drop_rate, config.precision)
    optimizer = make_optimizer(model, config, MOST_STEPS)
    calls, key = jax.device_put(stream.calls(0, config.calls_per_step)), jax.random.key(config.seed)
    step = compile_train_step(model, optimizer, calls[0], key, config)
    for _ in range(MOST_STEPS):
        losses = jax.device_get([step(model, optimizer, call, key)["loss"] for call in calls])
        loss = sum(map(float, losses)) / len(losses)
        yield loss
        if loss < TARGET:
            return
