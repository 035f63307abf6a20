"""Causal self-attention: cuDNN's where it can serve, elsewhere plain XLA in blocks of queries.

A block of queries meets only the keys that come before its end, so that three eighths of the scores are never computed;
and the backward pass computes the weights of a block anew from their log-sum-exp, so that no (T, T) array is kept.
Both ideas are those of FlashAttention-2, https://arxiv.org/abs/2307.08691.

Suffixes of array names: as in model.py, and S for the positions that are looked at, Q for the queries of a block.
"""

from functools import partial

import jax
import jax.numpy as jnp

BLOCKS = 4  # of queries: more would skip little more and compile for longer
SMALLEST_BLOCK = 32  # queries


def causal_attention(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array) -> jax.Array:
    """Mix values by softmax(q · k / √H) over each position and those before it; returns (B, T, N, H)."""
    if implementation(q_BTNH.dtype, q_BTNH.shape[-1], jax.default_backend()) == "cudnn":
        return jax.nn.dot_product_attention(q_BTNH, k_BTNH, v_BTNH, is_causal=True, implementation="cudnn")
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BTNH, v_BTNH))
    return jnp.swapaxes(_blockwise(*heads_first), 1, 2)


def implementation(dtype: jax.typing.DTypeLike, head_width: int, platform: str) -> str:
    """Choose "cudnn" by name where it can serve, else "blocks": left to itself, JAX takes plain XLA on a GPU too."""
    fits = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head_width % 8 == 0 and head_width <= 128
    return "cudnn" if fits and platform == "gpu" else "blocks"


def describe_attention(dtype: jax.typing.DTypeLike, head_width: int, drop_rate: float, platform: str) -> str:
    """Say in one line which attention is used, and why not cuDNN's."""
    if drop_rate:
        return "attention in plain XLA with all of its weights in memory: drop_rate drops some, which cuDNN's does not"
    if implementation(dtype, head_width, platform) == "cudnn":
        return "attention by cuDNN"
    if platform != "gpu":
        return "attention in plain XLA, in blocks of queries: there is no cuDNN on this device"
    missing = (
        'it takes precision "bfloat16"' if jnp.dtype(dtype) == jnp.float32 else "head width: multiples of 8 up to 128"
    )
    return f"attention in plain XLA, in blocks of queries, which is slower than cuDNN's: {missing}"


def causal_weights(q_BTNH: jax.Array, k_BSNH: jax.Array) -> jax.Array:
    """Return softmax attention weights (B, N, T, S) in float32, zero above the diagonal: the plain definition."""
    scores_BNTS = _product("btnh,bsnh->bnts", q_BTNH * q_BTNH.shape[-1] ** -0.5, k_BSNH)
    seen_TS = jnp.tril(jnp.ones(scores_BNTS.shape[-2:], bool))
    return jax.nn.softmax(jnp.where(seen_TS[None, None], scores_BNTS, -jnp.inf), axis=-1)


def cached_attention(q_BTNH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, first: jax.Array) -> jax.Array:
    """Mix cached values as `causal_attention` does, for the positions from `first` on; returns (B, T, N, H).

    Keys and values of those positions, and of all before them, are in the cache; what stands behind is not looked at.
    """
    scores_BNTS = _product("btnh,bnsh->bnts", q_BTNH * q_BTNH.shape[-1] ** -0.5, k_BNSH)
    seen_TS = jnp.arange(k_BNSH.shape[2])[None] <= first + jnp.arange(q_BTNH.shape[1])[:, None]
    weights_BNTS = jax.nn.softmax(jnp.where(seen_TS[None, None], scores_BNTS, -jnp.inf), axis=-1)
    return _product("bnts,bnsh->btnh", weights_BNTS.astype(v_BNSH.dtype), v_BNSH).astype(v_BNSH.dtype)


@jax.custom_vjp
def _blockwise(q_BNTH: jax.Array, k_BNTH: jax.Array, v_BNTH: jax.Array) -> jax.Array:
    return _forward(q_BNTH, k_BNTH, v_BNTH)[0]


def _forward(q_BNTH: jax.Array, k_BNTH: jax.Array, v_BNTH: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    scaled_BNTH = q_BNTH * q_BNTH.shape[-1] ** -0.5
    mixed, log_sums = [], []
    for start, end in _blocks(q_BNTH.shape[2]):
        scores_BNQS = _product("bnqh,bnsh->bnqs", scaled_BNTH[:, :, start:end], k_BNTH[:, :, :end])
        scores_BNQS = jnp.where(_seen(start, end)[None, None], scores_BNQS, -jnp.inf)
        largest_BNQ1 = scores_BNQS.max(axis=-1, keepdims=True)
        weights_BNQS = jnp.exp(scores_BNQS - largest_BNQ1)
        sums_BNQ1 = weights_BNQS.sum(axis=-1, keepdims=True)
        mixed_BNQH = _product("bnqs,bnsh->bnqh", weights_BNQS.astype(v_BNTH.dtype), v_BNTH[:, :, :end]) / sums_BNQ1
        mixed.append(mixed_BNQH.astype(v_BNTH.dtype))
        log_sums.append((largest_BNQ1 + jnp.log(sums_BNQ1))[..., 0])
    mixed_BNTH, log_sums_BNT = jnp.concatenate(mixed, axis=2), jnp.concatenate(log_sums, axis=2)
    return mixed_BNTH, (scaled_BNTH, k_BNTH, v_BNTH, mixed_BNTH, log_sums_BNT)


def _backward(saved: tuple[jax.Array, ...], slopes_BNTH: jax.Array) -> tuple[jax.Array, ...]:
    """Return the gradients of queries, keys and values; here the keys come first, which XLA's products prefer."""
    scaled_BNTH, k_BNTH, v_BNTH, mixed_BNTH, log_sums_BNT = saved
    # Changes nothing, but has to wait for the slopes: else XLA keeps weights and blocks of keys from the forward pass.
    scaled_BNTH, k_BNTH, v_BNTH = (x + 0 * slopes_BNTH[..., :1] for x in (scaled_BNTH, k_BNTH, v_BNTH))
    length, width = k_BNTH.shape[2:]
    common_BNT = (slopes_BNTH * mixed_BNTH).astype(jnp.float32) @ jnp.ones(width)  # a sum: 10 × slower on the CPU
    q_slopes, k_slopes_BNTH, v_slopes_BNTH = [], jnp.zeros(k_BNTH.shape), jnp.zeros(v_BNTH.shape)
    for start, end in _blocks(length):
        block = slice(start, end)
        q_BNQH, slopes_BNQH = scaled_BNTH[:, :, block], slopes_BNTH[:, :, block]
        k_BNSH, v_BNSH = k_BNTH[:, :, :end], v_BNTH[:, :, :end]
        logs_BNSQ = _product("bnsh,bnqh->bnsq", k_BNSH, q_BNQH) - log_sums_BNT[:, :, None, block]
        weights_BNSQ = jnp.exp(jnp.where(_seen(start, end).T[None, None], logs_BNSQ, -jnp.inf))
        mixed_slopes_BNSQ = _product("bnsh,bnqh->bnsq", v_BNSH, slopes_BNQH) - common_BNT[:, :, None, block]
        score_slopes_BNSQ = (weights_BNSQ * mixed_slopes_BNSQ).astype(k_BNTH.dtype)
        q_slopes.append(_product("bnsq,bnsh->bnqh", score_slopes_BNSQ, k_BNSH))
        to_the_end = [(0, 0), (0, 0), (0, length - end), (0, 0)]
        k_slopes_BNTH += jnp.pad(_product("bnsq,bnqh->bnsh", score_slopes_BNSQ, q_BNQH), to_the_end)
        weights_BNSQ = weights_BNSQ.astype(v_BNTH.dtype)
        v_slopes_BNTH += jnp.pad(_product("bnsq,bnqh->bnsh", weights_BNSQ, slopes_BNQH), to_the_end)
    q_slopes_BNTH = jnp.concatenate(q_slopes, axis=2) * width**-0.5
    return tuple(x.astype(k_BNTH.dtype) for x in (q_slopes_BNTH, k_slopes_BNTH, v_slopes_BNTH))


_blockwise.defvjp(_forward, _backward)


def _blocks(length: int) -> list[tuple[int, int]]:
    """Cut the positions of queries into blocks: where each starts and ends."""
    size = max(SMALLEST_BLOCK, -(-length // BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _seen(start: int, end: int) -> jax.Array:
    """Say which of the first `end` positions each query of a block sees, (Q, S)."""
    return jnp.arange(start, end)[:, None] >= jnp.arange(end)[None]


_product = partial(jnp.einsum, preferred_element_type=jnp.float32)
