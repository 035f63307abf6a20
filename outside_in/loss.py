"""Cross-entropy of next-token prediction, in nats: the definition, and the same in chunks, without all logits at once.

The chunked form computes the logits of a few rows, their loss and all gradients while those logits are at hand, so that
no array of (tokens, vocabulary) ever exists. It takes any function from hidden states to logits. The idea is that of
"Cut Your Losses in Large-Vocabulary Language Models", https://arxiv.org/abs/2411.09009.

Suffixes of array names: as in model.py; M all rows, R rows of a chunk, C chunks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from outside_in.runtime import target

LOGIT_BYTES = {"cpu": 2**27, "gpu": 2**32}  # float32, of one chunk: large enough for fast products, else small

Unembed = Callable[[jax.Array], jax.Array]  # hidden states (B, T, D) to logits (B, T, V); no position sees another


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Average -log softmax(logits)[target] over all positions, in float32 or wider.

    Takes logits (…, V) and target ids (…) of any integer type, each below V. Returns a scalar.
    """
    _check_targets(targets_BT, logits_BTV.shape[:-1], "logits")
    logits = _at_least_float32(logits_BTV.reshape(-1, logits_BTV.shape[-1]))
    targets = targets_BT.reshape(-1).astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def chunked_cross_entropy(
    unembed: Unembed, hidden_BTD: jax.Array, targets_BT: jax.Array, rows_per_chunk: int | None = None
) -> jax.Array:
    """Return `cross_entropy(unembed(hidden), targets)` without ever holding all logits.

    Takes hidden states (B, T, D) and target ids (B, T), from 0 to V - 1. `unembed` gets a chunk of positions as
    (1, R, D), and may use any arrays around it: they get their gradients. The rows of a chunk are chosen for the device
    unless given.
    """
    unembed_rows, chunks = _chunks(unembed, hidden_BTD, targets_BT, rows_per_chunk)
    unembed_rows, captured = jax.closure_convert(unembed_rows, chunks[0][0])
    return _mean_loss(unembed_rows, captured, *chunks)


def chunked_losses(
    unembed: Unembed, hidden_BTD: jax.Array, targets_BT: jax.Array, rows_per_chunk: int | None = None
) -> jax.Array:
    """Return the loss of every target, (B, T).

    `chunked_cross_entropy` is their mean. The gradient computes the logits of each chunk a second time.
    """
    unembed_rows, (hidden_CRD, targets_CR, _) = _chunks(unembed, hidden_BTD, targets_BT, rows_per_chunk)

    @jax.checkpoint
    def losses(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _losses(unembed_rows(chunk[0]), chunk[1])[0]

    return jax.lax.map(losses, (hidden_CRD, targets_CR)).reshape(-1)[: targets_BT.size].reshape(targets_BT.shape)


def chunk_size(vocab_size: int, platform: str) -> int:
    """Return the rows of logits in a chunk, a power of two."""
    rows = LOGIT_BYTES.get(platform, LOGIT_BYTES["gpu"]) // (4 * vocab_size)
    return 2 ** max(rows.bit_length() - 1, 0)


def _chunks(
    unembed: Unembed, hidden_BTD: jax.Array, targets_BT: jax.Array, rows_per_chunk: int | None
) -> tuple[Unembed, tuple[jax.Array, jax.Array, jax.Array]]:
    """Cut rows into chunks: hidden states (C, R, D), targets and weights (C, R); rows of padding weigh nothing.

    Also returns `unembed` for one chunk, from (R, D) to (R, V).
    """
    _check_targets(targets_BT, hidden_BTD.shape[:-1], "hidden states")
    hidden_MD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    rows = len(hidden_MD)
    assert rows, "a loss needs at least one target"
    vocab_size = jax.eval_shape(unembed, hidden_MD[None, :1]).shape[-1]
    chunks = -(-rows // (rows_per_chunk or chunk_size(vocab_size, target.platform())))
    if rows_per_chunk is None:
        chunks = max(chunks, min(2, rows))  # also of few rows never all logits
    padding = -rows % chunks

    def split(x: jax.Array, mode: str) -> jax.Array:
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1), mode=mode).reshape(chunks, -1, *x.shape[1:])

    weights_M = jnp.full(rows, 1 / rows, jnp.promote_types(hidden_MD.dtype, jnp.float32))
    targets_M = targets_BT.reshape(-1).astype(jnp.int32)
    # The last row once more, not zeros, for which an `unembed` with a norm in it would have no finite gradient.
    arrays = split(hidden_MD, "edge"), split(targets_M, "edge"), split(weights_M, "constant")
    return lambda hidden_RD: unembed(hidden_RD[None])[0], arrays


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mean_loss(
    unembed: Callable[..., jax.Array],
    captured: list[jax.Array],
    hidden_CRD: jax.Array,
    targets_CR: jax.Array,
    weights_CR: jax.Array,
) -> jax.Array:
    """Sum the weighted losses of all rows: what runs when nobody asks for gradients."""

    def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        hidden_RD, targets_R, weights_R = chunk
        losses_R, *_ = _losses(unembed(hidden_RD, *captured), targets_R)
        return total + losses_R @ weights_R, None

    return jax.lax.scan(add, jnp.zeros((), weights_CR.dtype), (hidden_CRD, targets_CR, weights_CR))[0]


def _forward(
    unembed: Callable[..., jax.Array], captured: list[jax.Array], *chunks: jax.Array
) -> tuple[jax.Array, tuple[list[jax.Array], jax.Array]]:
    """Return the weighted loss and its gradients.

    They are those by the arrays that `unembed` has captured, and by the hidden states.
    """

    def add(totals: Any, chunk: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        hidden_RD, targets_R, weights_R = chunk
        logits_RV, vjp = jax.vjp(unembed, hidden_RD, *captured)
        losses_R, exps_RV, sums_R = _losses(logits_RV, targets_R)
        is_target_RV = jnp.arange(logits_RV.shape[-1])[None] == targets_R[:, None]
        d_logits_RV = exps_RV * (weights_R / sums_R)[:, None] - jnp.where(is_target_RV, weights_R[:, None], 0)
        d_hidden_RD, *d_captured = vjp(d_logits_RV.astype(logits_RV.dtype))
        return jax.tree.map(jnp.add, totals, (losses_R @ weights_R, d_captured)), d_hidden_RD

    zeros = (
        jnp.zeros((), chunks[-1].dtype),
        [jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for x in captured],
    )
    (loss, d_captured), d_hidden_CRD = jax.lax.scan(add, zeros, chunks)
    return loss, ([d.astype(x.dtype) for d, x in zip(d_captured, captured)], d_hidden_CRD)


def _backward(
    unembed: Callable[..., jax.Array], grads: tuple[list[jax.Array], jax.Array], d_loss: jax.Array
) -> tuple[Any, ...]:
    return *jax.tree.map(lambda x: (d_loss * x).astype(x.dtype), grads), None, None


_mean_loss.defvjp(_forward, _backward)


def _losses(logits_RV: jax.Array, targets_R: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return losses (R,), exp(logit - the row's largest) (R, V), sums of those (R,)."""
    logits_RV = _at_least_float32(logits_RV)
    largest_R1 = logits_RV.max(axis=-1, keepdims=True)
    exps_RV = jnp.exp(logits_RV - largest_R1)
    sums_R = exps_RV.sum(axis=-1)
    chosen_R = jnp.take_along_axis(logits_RV, targets_R[:, None], axis=-1)[:, 0]
    return jnp.log(sums_R) + largest_R1[:, 0] - chosen_R, exps_RV, sums_R


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _check_targets(targets_BT: jax.Array, shape: tuple[int, ...], against: str) -> None:
    chex.assert_type(targets_BT, int, custom_message="target ids")
    chex.assert_shape(targets_BT, shape, custom_message=f"target ids, against {against}")
