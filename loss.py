"""Cross-entropy of next-token prediction, in nats: the plain definition, and the fused one that is fast.

The fused one takes a few rows at a time and computes their logits, their loss and both gradients of the output head
while those logits are at hand, so that no array of (tokens, vocabulary) ever exists. The idea is that of "Cut Your
Losses in Large-Vocabulary Language Models", https://arxiv.org/abs/2411.09009.

Suffixes of array names: as in model.py; R rows of a chunk, C chunks.
"""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

LOGIT_BYTES = {"cpu": 2**27, "gpu": 2**30}  # float32, of one chunk: large enough for fast products, else small
VOCAB_MULTIPLE = {"cpu": 1, "gpu": 128}  # tensor cores like round numbers: 50,257 becomes 50,304


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Average -log softmax(logits)[target] over all positions, in float32 whatever the logits' type.

    Takes logits (…, V) and target ids (…) of any integer type, each below V. Returns a scalar.
    """
    chex.assert_type(targets_BT, int, custom_message="target ids")
    chex.assert_shape(targets_BT, logits_BTV.shape[:-1], custom_message="target ids, against logits")
    logits = logits_BTV.reshape(-1, logits_BTV.shape[-1]).astype(jnp.float32)
    targets = targets_BT.reshape(-1).astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def fused_cross_entropy(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    dtype: DTypeLike = jnp.float32,
    rows_per_chunk: int | None = None,
    vocab_multiple: int | None = None,
) -> jax.Array:
    """Return `cross_entropy(hidden @ head.T, targets)` without ever holding all logits.

    Takes hidden states (…, D), the output head (V, D), and target ids (…) of any integer type, each below V. Products
    are computed in `dtype`; their sums, the log-sum-exp and the loss are float32; gradients have the types of what they
    belong to. The rows of a chunk, and the multiple that the vocabulary is padded to meanwhile, are chosen for the
    device unless given.
    Returns a scalar.
    """
    chex.assert_type(targets_BT, int, custom_message="target ids")
    chex.assert_shape(targets_BT, hidden_BTD.shape[:-1], custom_message="target ids, against hidden states")
    chex.assert_shape(head_VD, (None, hidden_BTD.shape[-1]), custom_message="the output head, against hidden states")
    hidden_MD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    targets_M = targets_BT.reshape(-1).astype(jnp.int32)
    rows = len(targets_M)
    platform = jax.default_backend()
    chunks = -(-rows // (rows_per_chunk or chunk_size(head_VD.shape[0], platform)))
    chunks = max(chunks, min(2, rows))  # also of few rows never all logits
    padding = -rows % chunks
    vocab_padding = -len(head_VD) % (vocab_multiple or VOCAB_MULTIPLE.get(platform, 1))

    def split(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(chunks, -1, *x.shape[1:])

    weights_M = jnp.full(rows, 1 / rows, jnp.float32)  # padded with 0: such rows count for nothing
    return _loss(jnp.dtype(dtype), vocab_padding, split(hidden_MD), head_VD, split(targets_M), split(weights_M))


def chunk_size(vocab_size: int, platform: str) -> int:
    """Return how many rows of logits a device takes at a time, a power of two."""
    rows = LOGIT_BYTES.get(platform, LOGIT_BYTES["gpu"]) // (4 * vocab_size)
    return 2 ** max(rows.bit_length() - 1, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(
    dtype: jnp.dtype,
    vocab_padding: int,
    hidden_CRD: jax.Array,
    head_VD: jax.Array,
    targets_CR: jax.Array,
    weights_CR: jax.Array,
) -> jax.Array:
    """Sum the weighted losses of all rows: what runs when nobody asks for gradients."""
    padded_VD = _pad(head_VD.astype(dtype), vocab_padding)

    def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        hidden_RD, targets_R, weights_R = chunk
        losses_R, _ = _losses_and_shares(hidden_RD.astype(dtype), padded_VD, targets_R, len(head_VD))
        return total + losses_R @ weights_R, None

    return jax.lax.scan(add, jnp.zeros(()), (hidden_CRD, targets_CR, weights_CR))[0]


def _loss_and_gradients(
    dtype: jnp.dtype,
    vocab_padding: int,
    hidden_CRD: jax.Array,
    head_VD: jax.Array,
    targets_CR: jax.Array,
    weights_CR: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    padded_VD = _pad(head_VD.astype(dtype), vocab_padding)
    ids_V1 = jnp.arange(len(padded_VD))[:, None]

    def add(totals: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        hidden_RD, targets_R, weights_R = chunk
        hidden_RD = hidden_RD.astype(dtype)
        losses_R, shares_VR = _losses_and_shares(hidden_RD, padded_VD, targets_R, len(head_VD))
        slopes_VR = (shares_VR - (ids_V1 == targets_R[None])) * weights_R[None]  # d loss / d logits
        slopes_VR = slopes_VR.astype(dtype)
        hidden_slopes_DR = _product("vd,vr->dr", padded_VD, slopes_VR)  # XLA's CPU backend takes longer for (R, D)
        head_slopes_VD = _product("vr,rd->vd", slopes_VR, hidden_RD)
        return (totals[0] + losses_R @ weights_R, totals[1] + head_slopes_VD), hidden_slopes_DR

    zeros = (jnp.zeros(()), jnp.zeros(padded_VD.shape, jnp.float32))
    (loss, head_slopes_VD), hidden_slopes_CDR = jax.lax.scan(add, zeros, (hidden_CRD, targets_CR, weights_CR))
    hidden_slopes_CRD = jnp.swapaxes(hidden_slopes_CDR, 1, 2)
    return loss, (hidden_slopes_CRD.astype(hidden_CRD.dtype), head_slopes_VD[: len(head_VD)].astype(head_VD.dtype))


def _scale_gradients(
    dtype: jnp.dtype, vocab_padding: int, slopes: tuple[jax.Array, jax.Array], slope: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    hidden_slopes_CRD, head_slopes_VD = slopes
    scaled_VD = slope.astype(head_slopes_VD.dtype) * head_slopes_VD
    return slope.astype(hidden_slopes_CRD.dtype) * hidden_slopes_CRD, scaled_VD, None, None


_loss.defvjp(_loss_and_gradients, _scale_gradients)


def _losses_and_shares(
    hidden_RD: jax.Array, padded_VD: jax.Array, targets_R: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """Return the loss of each row (R) and softmax of its logits (V, R), both float32; padded tokens have no share.

    The vocabulary comes first: XLA's products on the CPU are up to twice as fast so.
    """
    logits_VR = _product("vd,rd->vr", padded_VD, hidden_RD)
    if len(padded_VD) > vocab_size:
        logits_VR = jnp.where((jnp.arange(len(padded_VD)) < vocab_size)[:, None], logits_VR, -jnp.inf)
    largest_1R = logits_VR.max(axis=0, keepdims=True)
    exponentials_VR = jnp.exp(logits_VR - largest_1R)
    sums_1R = exponentials_VR.sum(axis=0, keepdims=True)
    chosen_1R = jnp.take_along_axis(logits_VR, targets_R[None], axis=0)
    return (jnp.log(sums_1R) + largest_1R - chosen_1R)[0], exponentials_VR / sums_1R


def _pad(head_VD: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(head_VD, ((0, rows), (0, 0)))


def _product(axes: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(axes, left, right, preferred_element_type=jnp.float32)
