"""Mean loss over held-out batches."""

from collections.abc import Callable

import jax
import numpy as np

from data import TokenStream
from model import GPTModel
from steps import Compiled, compile_eval_step, eval_step


def compile_for(model: GPTModel, stream: TokenStream) -> Compiled:
    """Compile the evaluation step for the batches of a stream, for those who average the loss again and again."""
    inputs_KBT, targets_KBT = jax.device_put(stream.batch(0))
    return compile_eval_step(model, inputs_KBT[0], targets_KBT[0])


def mean_loss(
    model: GPTModel,
    stream: TokenStream,
    stop: Callable[[], bool] = lambda: False,
    step: Callable[..., jax.Array] = eval_step,
) -> float | None:
    """Average the loss over every whole batch of a token stream, in nats per token; None when `stop` became true."""
    losses: list[jax.Array] = []
    for number in range(stream.num_steps):
        jax.block_until_ready(losses[:-1])  # not far ahead of the device, so that a stop is heard
        if stop():
            return None
        inputs_KBT, targets_KBT = jax.device_put(stream.batch(number))
        losses += [step(model, inputs_BT, targets_BT) for inputs_BT, targets_BT in zip(inputs_KBT, targets_KBT)]
    return float(np.mean(jax.device_get(losses), dtype=np.float64))
