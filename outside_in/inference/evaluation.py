"""Losses on held-out tokens: their mean, and each one."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model import GPTModel
from outside_in.data.loader import TokenStream
from outside_in.runtime.mesh import AXES, one_device
from outside_in.runtime.processes import device_put_global
from outside_in.train_step import Compiled, compile_eval_step, eval_step


def compile_for(model: GPTModel, stream: TokenStream, mesh: Mesh) -> Compiled:
    """Compile the evaluation step for the batches of a stream."""
    return compile_eval_step(model, *_batch(stream, 0, mesh)[0], mesh)


def mean_loss(
    model: GPTModel,
    stream: TokenStream,
    stop: Callable[[], bool] = lambda: False,
    step: Callable[..., jax.Array] | None = None,
    mesh: Mesh | None = None,
) -> float | None:
    """Return the mean of `model.loss` over all whole batches of a stream.

    Returns None when `stop` becomes true. A batch of the stream is that of one device; `step` is what `compile_for`
    returns.
    """
    mesh = mesh or one_device()
    step = step or partial(eval_step, mesh=mesh)
    losses, counts = [], []
    for first in range(0, stream.num_steps, mesh.devices.size):
        jax.block_until_ready(losses[:-1])  # not far ahead of the device, so that a stop is heard
        if stop():
            return None
        batch, count = _batch(stream, first, mesh)
        losses.append(step(model, *batch))
        counts.append(count)
    known = [of_batch[:count] for of_batch, count in zip(jax.device_get(losses), counts)]
    return float(np.concatenate(known).mean(dtype=np.float64))


def _batch(stream: TokenStream, first: int, mesh: Mesh) -> tuple[tuple[jax.Array, jax.Array], int]:
    """Put one batch per device, from `first` on, on the mesh.

    Also returns how many there are; where the stream ends, zeros follow.
    """
    devices = mesh.devices.size
    batches = [stream.batch(i) for i in range(first, min(first + devices, stream.num_steps))]
    inputs_MT, targets_MT = (
        np.concatenate([part.reshape(-1, part.shape[-1]) for part in side]) for side in zip(*batches)
    )
    padding = [(0, inputs_MT.shape[0] // len(batches) * devices - len(inputs_MT)), (0, 0)]
    sharding = NamedSharding(mesh, PartitionSpec(AXES))
    inputs, targets = (
        device_put_global(array, sharding) for array in (np.pad(inputs_MT, padding), np.pad(targets_MT, padding))
    )
    return (inputs, targets), len(batches)


@partial(jax.jit, static_argnums=0)
def _compiled_token_losses(
    graph: nnx.GraphDef, state: nnx.State, inputs_BT: jax.Array, targets_BT: jax.Array
) -> jax.Array:
    return nnx.merge(graph, state).token_losses(inputs_BT, targets_BT)


def _token_losses(model: GPTModel, tokens_BT: np.ndarray) -> jax.Array:
    """Return the loss of every token but the first of each row."""
    return _compiled_token_losses(*nnx.split(model), *jax.device_put((tokens_BT[:, :-1], tokens_BT[:, 1:])))


def num_windows(num_targets: int, length: int, stride: int) -> int:
    """Count the windows that reach the end of `num_targets` tokens.

    Each has `length` positions and starts `stride` after the one before.
    """
    return 1 + max(0, -(-(num_targets - length) // stride))


def windowed_losses(
    model: GPTModel, tokens: np.ndarray, *, stride: int | None = None, windows_per_batch: int = 8
) -> Iterator[np.ndarray]:
    """Yield the losses of all tokens but the first, in order.

    They come a batch of windows at a time; a window is as long as the model's context. Without `stride` windows follow
    one another. With it, each starts that many tokens after the one before, and each token is counted once: every token
    after the first window then has at least context - stride tokens before it.
    """
    length, num_targets = model.config.context_length, len(tokens) - 1
    stride = stride or length
    starts = [i * stride for i in range(num_windows(num_targets, length, stride))]

    def counted(losses_BT: jax.Array, batch: list[int]) -> np.ndarray:
        return np.concatenate(
            [
                losses[length - stride if start else 0 : min(length, num_targets - start)]
                for losses, start in zip(np.asarray(losses_BT), batch)
            ]
        )

    waiting: tuple[jax.Array, list[int]] | None = None  # so that the device works on a batch while the last is fetched
    for batch in (starts[i : i + windows_per_batch] for i in range(0, len(starts), windows_per_batch)):
        windows = np.zeros((windows_per_batch, length + 1), tokens.dtype)  # padded, for one compiled shape
        for row, start in zip(windows, batch):
            window = tokens[start : start + length + 1]
            row[: len(window)] = window
        losses_BT = _token_losses(model, windows)
        if waiting:
            yield counted(*waiting)
        waiting = losses_BT, batch
    if waiting:
        yield counted(*waiting)


def standard_error(values: np.ndarray, block: int) -> float | None:
    """Return the block standard error of a mean over autocorrelated values.

    None when there are fewer than two whole blocks.
    """
    blocks = values[: len(values) // block * block].reshape(-1, block).mean(axis=1, dtype=np.float64)
    return None if len(blocks) < 2 else float(blocks.std(ddof=1) / len(blocks) ** 0.5)


def completion_losses(
    model: GPTModel, texts: Iterable[tuple[list[int], list[int]]], *, rows_per_batch: int = 32, multiple: int = 32
) -> Iterator[np.ndarray]:
    """Yield the losses of each completion's tokens, after its context.

    Both are token ids, and neither is empty. If they are longer than the model's context, only their end is used. Texts
    of similar length should be neighbors: a batch is padded to its longest, in multiples of `multiple`.
    """
    max_length = model.config.context_length + 1
    pending = list(texts)
    for batch in (pending[i : i + rows_per_batch] for i in range(0, len(pending), rows_per_batch)):
        whole = [(context + completion)[-max_length:] for context, completion in batch]
        width = min(max_length - 1, -(-max(len(text) - 1 for text in whole) // multiple) * multiple)
        tokens = np.zeros((rows_per_batch, width + 1), np.int32)
        for row, text in zip(tokens, whole):
            row[: len(text)] = text
        losses_BT = np.asarray(_token_losses(model, tokens))
        for losses, text, (_, completion) in zip(losses_BT, whole, batch):
            yield losses[max(0, len(text) - 1 - len(completion)) : len(text) - 1]
