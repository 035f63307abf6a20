"""Cross-entropy of next-token prediction, in nats: the plain definition, and the fused one that is fast.

The fused one takes a few rows at a time and computes their logits, their loss and both gradients of the output head
while those logits are at hand, so that no array of (tokens, vocabulary) ever exists. The idea is that of "Cut Your
Losses in Large-Vocabulary Language Models", https://arxiv.org/abs/2411.09009.

Suffixes of array names: as in model.py; R rows of a chunk, C chunks, P the vocabulary as padded for products.
"""

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
    prepared_PD: jax.Array | None = None,
    rows_per_chunk: int | None = None,
) -> jax.Array:
    """Return `cross_entropy(hidden @ head.T, targets)` without ever holding all logits.

    Takes hidden states (…, D), the output head (V, D), and target ids (…) of any integer type, each below V. Products
    are computed in the type of `prepared_PD`, the head by `prepare_head`, or in float32; their sums, the log-sum-exp
    and the loss are float32; gradients have the types of what they belong to. The rows of a chunk are chosen for the
    device unless given. Returns a scalar.
    """
    chex.assert_type(targets_BT, int, custom_message="target ids")
    chex.assert_shape(targets_BT, hidden_BTD.shape[:-1], custom_message="target ids, against hidden states")
    chex.assert_shape(head_VD, (None, hidden_BTD.shape[-1]), custom_message="the output head, against hidden states")
    if prepared_PD is None:
        prepared_PD = prepare_head(head_VD)
    prepared_PD = jax.lax.stop_gradient(prepared_PD)
    return _loss(head_VD, prepared_PD, *_chunks(hidden_BTD, targets_BT, len(head_VD), rows_per_chunk))


def fused_losses(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, rows_per_chunk: int | None = None
) -> jax.Array:
    """Return the loss of every target on its own, (…), float32, of which `fused_cross_entropy` is the mean."""
    prepared_PD = prepare_head(head_VD, hidden_BTD.dtype)

    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _losses(chunk[0], prepared_PD, chunk[1], len(head_VD))[0]

    hidden_CRD, targets_CR, _ = _chunks(hidden_BTD, targets_BT, len(head_VD), rows_per_chunk)
    return jax.lax.map(of_chunk, (hidden_CRD, targets_CR)).reshape(-1)[: targets_BT.size].reshape(targets_BT.shape)


def add_head_gradient(
    total_VD: jax.Array,
    prepared_PD: jax.Array,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    share: float,
    rows_per_chunk: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `fused_cross_entropy`, and the gradients of `share` times it, as a step over many microbatches wants them.

    That of the hidden states comes as (…, D); that of the head is added to `total_VD`, float32, which saves writing,
    scaling and adding an array of that size for each microbatch.
    """
    chunks = _chunks(hidden_BTD, targets_BT, len(total_VD), rows_per_chunk)
    loss, hidden_slopes_CRD, total_VD = _loss_and_gradients(total_VD, prepared_PD, *chunks, share)
    hidden_slopes_MD = hidden_slopes_CRD.reshape(-1, hidden_BTD.shape[-1])[: targets_BT.size]
    return loss, hidden_slopes_MD.reshape(hidden_BTD.shape), total_VD


def prepare_head(head_VD: jax.Array, dtype: DTypeLike = jnp.float32, vocab_multiple: int | None = None) -> jax.Array:
    """Return the output head as products take it, (P, D): in `dtype`, with rows of zeros up to a round number of them.

    It serves for as long as the head stays the same; padded tokens have no share. The multiple is chosen for the device
    unless given.
    """
    padding = -len(head_VD) % (vocab_multiple or VOCAB_MULTIPLE.get(jax.default_backend(), 1))
    return jnp.pad(head_VD.astype(dtype), ((0, padding), (0, 0)))


def chunk_size(vocab_size: int, platform: str) -> int:
    """Return how many rows of logits a device takes at a time, a power of two."""
    rows = LOGIT_BYTES.get(platform, LOGIT_BYTES["gpu"]) // (4 * vocab_size)
    return 2 ** max(rows.bit_length() - 1, 0)


def _chunks(
    hidden_BTD: jax.Array, targets_BT: jax.Array, vocab_size: int, rows_per_chunk: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cut rows into chunks: hidden states (C, R, D), targets and weights (C, R); rows of padding weigh nothing."""
    hidden_MD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    rows = len(hidden_MD)
    chunks = -(-rows // (rows_per_chunk or chunk_size(vocab_size, jax.default_backend())))
    chunks = max(chunks, min(2, rows))  # also of few rows never all logits
    padding = -rows % chunks

    def split(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(chunks, -1, *x.shape[1:])

    weights_M = jnp.full(rows, 1 / rows, jnp.float32)
    return split(hidden_MD), split(targets_BT.reshape(-1).astype(jnp.int32)), split(weights_M)


@jax.custom_vjp
def _loss(
    head_VD: jax.Array, prepared_PD: jax.Array, hidden_CRD: jax.Array, targets_CR: jax.Array, weights_CR: jax.Array
) -> jax.Array:
    """Sum the weighted losses of all rows: what runs when nobody asks for gradients."""

    def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        hidden_RD, targets_R, weights_R = chunk
        losses_R, *_ = _losses(hidden_RD.astype(prepared_PD.dtype), prepared_PD, targets_R, len(head_VD))
        return total + losses_R @ weights_R, None

    return jax.lax.scan(add, jnp.zeros(()), (hidden_CRD, targets_CR, weights_CR))[0]


def _loss_and_gradients(
    total_VD: jax.Array,
    prepared_PD: jax.Array,
    hidden_CRD: jax.Array,
    targets_CR: jax.Array,
    weights_CR: jax.Array,
    share: float = 1.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the weighted loss, and the gradients of `share` times it: of hidden states, and of the head plus a total.

    d loss / d logits is weight · (exponential / sum - 1 at the target). Exponentials go into the products as they are,
    without those of the targets, whose slopes are what the others' sum up to: nothing is lost where a target is all but
    certain. The rest is done to rows of hidden states and of the head.
    """
    dtype, vocab_size = prepared_PD.dtype, len(total_VD)

    def add(totals: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, ...]) -> tuple[Any, tuple[jax.Array, ...]]:
        hidden_RD, targets_R, weights_R = chunk
        hidden_RD = hidden_RD.astype(dtype)
        losses_R, others_RP, their_sums_R1, sums_R1 = _losses(hidden_RD, prepared_PD, targets_R, vocab_size)
        others_RP, weighted_R1 = others_RP.astype(dtype), share * weights_R[:, None] / sums_R1
        target_slopes_R1 = their_sums_R1 * weighted_R1
        hidden_slopes_RD = _product("rp,pd->rd", others_RP, prepared_PD) * weighted_R1
        hidden_slopes_RD -= prepared_PD[targets_R] * target_slopes_R1
        head_slopes_PD = _product("rp,rd->pd", others_RP, (hidden_RD * weighted_R1).astype(dtype))
        totals = totals[0] + losses_R @ weights_R, totals[1] + head_slopes_PD[:vocab_size]
        return totals, (hidden_slopes_RD, hidden_RD * target_slopes_R1)

    (loss, total_VD), (hidden_slopes_CRD, target_slopes_CRD) = jax.lax.scan(
        add, (jnp.zeros(()), total_VD), (hidden_CRD, targets_CR, weights_CR)
    )
    return loss, hidden_slopes_CRD.astype(hidden_CRD.dtype), total_VD.at[targets_CR].add(-target_slopes_CRD)


def _forward(head_VD: jax.Array, *others: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    zeros_VD = jnp.zeros(head_VD.shape, jnp.float32)
    loss, hidden_slopes_CRD, head_slopes_VD = _loss_and_gradients(zeros_VD, *others)
    return loss, (hidden_slopes_CRD, head_slopes_VD.astype(head_VD.dtype))


def _backward(slopes: tuple[jax.Array, jax.Array], slope: jax.Array) -> tuple[Any, ...]:
    hidden_slopes_CRD, head_slopes_VD = (slope.astype(x.dtype) * x for x in slopes)
    return head_slopes_VD, None, hidden_slopes_CRD, None, None


_loss.defvjp(_forward, _backward)


def _losses(
    hidden_RD: jax.Array, prepared_PD: jax.Array, targets_R: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return the loss of each row (R), and exp(logit - the row's largest), all float32.

    The exponentials (R, P) are 0 at targets and where padded; their sums follow, without the targets' and with them,
    each (R, 1).
    """
    logits_RP = _product("rd,pd->rp", hidden_RD, prepared_PD)
    ids_1P = jnp.arange(len(prepared_PD))[None]
    if len(prepared_PD) > vocab_size:
        logits_RP = jnp.where(ids_1P < vocab_size, logits_RP, -jnp.inf)
    largest_R1 = logits_RP.max(axis=1, keepdims=True)
    chosen_R1 = jnp.take_along_axis(logits_RP, targets_R[:, None], axis=1)
    others_RP = jnp.where(ids_1P == targets_R[:, None], 0, jnp.exp(logits_RP - largest_R1))
    their_sums_R1 = others_RP.sum(axis=1, keepdims=True)
    sums_R1 = their_sums_R1 + jnp.exp(chosen_R1 - largest_R1)
    return (jnp.log(sums_R1) + largest_R1 - chosen_R1)[:, 0], others_RP, their_sums_R1, sums_R1


def _product(axes: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(axes, left, right, preferred_element_type=jnp.float32)
