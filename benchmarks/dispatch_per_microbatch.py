"""The loop that JAX tutorials teach, to compare with: one call of a jitted step, and one `.item()`, per microbatch.

Nothing is donated, all logits are held, and `optax.MultiSteps` joins the microbatches. The model is ours; with
`--plain-parts` its attention and layer norm are those that JAX and Flax offer, as a tutorial would have them.
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import in_jax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import shapes
from flax import nnx

from model import GPTModel
from outside_in.config import ModelConfig, TrainConfig
from outside_in.layers import kernels
from outside_in.optimizer import learning_rate_schedule
from outside_in.runtime import cli


@nnx.jit
def train_step(model: GPTModel, optimizer: nnx.Optimizer, inputs_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
    def mean_loss(model: GPTModel) -> jax.Array:
        logits_BTV = model(inputs_BT).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT).mean()

    loss, grads = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, grads)
    return loss


def make_optimizer(model: GPTModel, train: TrainConfig) -> nnx.Optimizer:
    schedule = learning_rate_schedule(train, shapes.SCHEDULE_STEPS)
    adamw = optax.adamw(schedule, b2=train.beta2, weight_decay=train.weight_decay)
    clipped = optax.chain(optax.clip_by_global_norm(train.clipping_max_norm or math.inf), adamw)
    guarded = optax.apply_if_finite(clipped, train.max_consecutive_rejections)
    joined = optax.MultiSteps(guarded, train.gradient_accumulation_steps)
    return nnx.Optimizer(model, joined.gradient_transformation(), wrt=nnx.Param)


def take_plain_parts() -> None:
    """Let models have the attention and layer norm of JAX and Flax, as they have on a GPU without cuDNN."""
    vars(kernels)["choose_attention"] = lambda *_: "xla"
    kernels.LayerNorm.__call__ = nnx.LayerNorm.__call__


class DispatchPerMicrobatch:
    steps_ahead = 0

    def __init__(self, args: argparse.Namespace, config: ModelConfig, train: TrainConfig) -> None:
        if args.plain_parts:
            take_plain_parts()
        self.config, self.train = config, train
        self.stream = in_jax.make_stream(args, config, train)
        self.model = in_jax.make_model(args, config, train)
        self.optimizer = make_optimizer(self.model, train)
        self.global_step = 0
        self.place_batch()

    def place_batch(self) -> None:
        self.batch = jax.device_put([array.astype(np.int32) for array in self.stream.batch(self.global_step)])

    def start_step(self) -> tuple[float, float]:
        losses, dispatch_seconds = [], 0.0
        for inputs_BT, targets_BT in zip(*self.batch, strict=True):
            began = time.perf_counter()
            loss = train_step(self.model, self.optimizer, inputs_BT, targets_BT)
            dispatch_seconds += time.perf_counter() - began
            losses.append(loss.item())
        self.global_step += 1
        return float(np.mean(losses)), dispatch_seconds

    def loss(self, started: float) -> float:
        return started

    def product(self, size: int) -> Callable[[], Any]:
        return in_jax.product(size, self.train.precision)

    def describe(self) -> dict[str, Any]:
        return in_jax.describe(self.config)


def main(args: argparse.Namespace) -> int:
    return shapes.run(args, DispatchPerMicrobatch)


def make_parser() -> cli.ArgumentParser:
    parser = shapes.make_parser("Measure a JAX loop with one call per microbatch; prints one JSON object.")
    parser.add_argument("--plain-parts", action="store_true", help="attention and layer norm of JAX and Flax")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
