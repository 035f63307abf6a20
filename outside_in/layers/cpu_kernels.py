"""Attention and norms for CPUs, where XLA's plain forms are slow.

Measured in whole training steps of GPT-2 small (docs/experiments.md): attention saves 31%, layer norm 6%.

Suffixes of array names: as in model.py, and S for the positions that are looked at, Q for the queries of a block.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

BLOCKS = 4  # of queries: more would skip little more and compile for longer
MIN_BLOCK = 32  # queries
_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def blockwise_attention(
    q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, window: int | None = None
) -> jax.Array:
    """Compute causal attention in blocks of queries; returns (B, T, N, H).

    A block meets only the keys before its end, so three eighths of the scores are never computed; of a window, only
    those that its first query sees, and what comes after. No (T, T) array is
    kept: the backward pass computes the weights of a block again from their log-sum-exp. Both ideas are those of
    FlashAttention-2, https://arxiv.org/abs/2307.08691.
    """
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BTNH, v_BTNH))
    return jnp.swapaxes(_attention(*heads_first, window), 1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q_BNTH: jax.Array, k_BNTH: jax.Array, v_BNTH: jax.Array, window: int | None) -> jax.Array:
    return _attention_forward(q_BNTH, k_BNTH, v_BNTH, window)[0]


def _attention_forward(
    q_BNTH: jax.Array, k_BNTH: jax.Array, v_BNTH: jax.Array, window: int | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    scaled_BNTH = q_BNTH * q_BNTH.shape[-1] ** -0.5
    outs, log_sums = [], []
    for queries, keys in _blocks(q_BNTH.shape[2], window):
        scores_BNQS = _product("bnqh,bnsh->bnqs", scaled_BNTH[:, :, queries], k_BNTH[:, :, keys])
        scores_BNQS = jnp.where(_mask(queries, keys, window)[None, None], scores_BNQS, -jnp.inf)
        largest_BNQ1 = scores_BNQS.max(axis=-1, keepdims=True)
        weights_BNQS = jnp.exp(scores_BNQS - largest_BNQ1)
        sums_BNQ1 = weights_BNQS.sum(axis=-1, keepdims=True)
        out_BNQH = _product("bnqs,bnsh->bnqh", weights_BNQS.astype(v_BNTH.dtype), v_BNTH[:, :, keys]) / sums_BNQ1
        outs.append(out_BNQH.astype(v_BNTH.dtype))
        log_sums.append((largest_BNQ1 + jnp.log(sums_BNQ1))[..., 0])
    out_BNTH, log_sums_BNT = jnp.concatenate(outs, axis=2), jnp.concatenate(log_sums, axis=2)
    return out_BNTH, (scaled_BNTH, k_BNTH, v_BNTH, out_BNTH, log_sums_BNT)


def _attention_backward(
    window: int | None, saved: tuple[jax.Array, ...], d_out_BNTH: jax.Array
) -> tuple[jax.Array, ...]:
    """Return the gradients of queries, keys and values; here the keys come first, which XLA's products prefer."""
    scaled_BNTH, k_BNTH, v_BNTH, out_BNTH, log_sums_BNT = saved
    scaled_BNTH, k_BNTH, v_BNTH = (wait_for(x, d_out_BNTH[..., :1]) for x in (scaled_BNTH, k_BNTH, v_BNTH))
    length, width = k_BNTH.shape[2:]
    common_BNT = (d_out_BNTH * out_BNTH).astype(jnp.float32) @ jnp.ones(width)  # a product, as in `layer_norm`
    d_q, d_k_BNTH, d_v_BNTH = [], jnp.zeros(k_BNTH.shape), jnp.zeros(v_BNTH.shape)
    for queries, keys in _blocks(length, window):
        q_BNQH, d_out_BNQH = scaled_BNTH[:, :, queries], d_out_BNTH[:, :, queries]
        k_BNSH, v_BNSH = k_BNTH[:, :, keys], v_BNTH[:, :, keys]
        logs_BNSQ = _product("bnsh,bnqh->bnsq", k_BNSH, q_BNQH) - log_sums_BNT[:, :, None, queries]
        weights_BNSQ = jnp.exp(jnp.where(_mask(queries, keys, window).T[None, None], logs_BNSQ, -jnp.inf))
        d_weights_BNSQ = _product("bnsh,bnqh->bnsq", v_BNSH, d_out_BNQH)
        d_scores_BNSQ = (weights_BNSQ * (d_weights_BNSQ - common_BNT[:, :, None, queries])).astype(k_BNTH.dtype)
        d_q.append(_product("bnsq,bnsh->bnqh", d_scores_BNSQ, k_BNSH))
        around = [(0, 0), (0, 0), (keys.start, length - keys.stop), (0, 0)]
        d_k_BNTH += jnp.pad(_product("bnsq,bnqh->bnsh", d_scores_BNSQ, q_BNQH), around)
        weights_BNSQ = weights_BNSQ.astype(v_BNTH.dtype)
        d_v_BNTH += jnp.pad(_product("bnsq,bnqh->bnsh", weights_BNSQ, d_out_BNQH), around)
    d_q_BNTH = jnp.concatenate(d_q, axis=2) * width**-0.5
    return tuple(x.astype(k_BNTH.dtype) for x in (d_q_BNTH, d_k_BNTH, d_v_BNTH))


_attention.defvjp(_attention_forward, _attention_backward)


def wait_for(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Return x as it is, but not before a gradient is known.

    Else XLA's CPU backend computes early, and keeps for all layers, what is to be computed again: it undoes
    `jax.checkpoint`. What is added is whether the gradient is greater than infinity: 0 for every number, and for NaN.
    """
    return x + (gradient > jnp.inf).astype(x.dtype)


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Cut the queries into blocks: the positions of each, and of the keys that it meets."""
    size = max(MIN_BLOCK, -(-length // BLOCKS))
    for start in range(0, length, size):
        end = min(start + size, length)
        yield slice(start, end), slice(0 if window is None else max(0, start - window + 1), end)


def _mask(queries: slice, keys: slice, window: int | None) -> jax.Array:
    """Return which keys each query sees, (Q, S)."""
    queries_Q1, keys_1S = jnp.arange(queries.start, queries.stop)[:, None], jnp.arange(keys.start, keys.stop)[None]
    mask_QS = queries_Q1 >= keys_1S
    return mask_QS if window is None else mask_QS & (queries_Q1 - keys_1S < window)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x_MD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float) -> jax.Array:
    """Normalize the rows of x. The sums over rows are products: XLA fuses other work into plain ones, and gets slow."""
    return _layer_norm_forward(x_MD, scale_D, bias_D, epsilon)[0]


def _layer_norm_forward(
    x_MD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    centred_MD = x_MD - _row_mean(x_MD)
    inverse_std_M1 = jax.lax.rsqrt(_row_mean(centred_MD * centred_MD) + epsilon)
    normed_MD = centred_MD * inverse_std_M1
    return normed_MD * scale_D[None] + bias_D[None], (normed_MD, inverse_std_M1, scale_D)


def _layer_norm_backward(
    epsilon: float, saved: tuple[jax.Array, ...], d_out_MD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    normed_MD, inverse_std_M1, scale_D = saved
    d_normed_MD = d_out_MD * scale_D[None]
    mean_M1, along_M1 = _row_mean(d_normed_MD), _row_mean(d_normed_MD * normed_MD)
    d_x_MD = inverse_std_M1 * (d_normed_MD - mean_M1 - normed_MD * along_M1)
    return d_x_MD, (d_out_MD * normed_MD).sum(axis=0), d_out_MD.sum(axis=0)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x_MD: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    """Divide the rows of x by the roots of their mean squares. Its sums are products, as in `layer_norm`."""
    return _rms_norm_forward(x_MD, scale_D, epsilon)[0]


def _rms_norm_forward(x_MD: jax.Array, scale_D: jax.Array, epsilon: float) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    inverse_M1 = jax.lax.rsqrt(_row_mean(x_MD * x_MD) + epsilon)
    normed_MD = x_MD * inverse_M1
    return normed_MD * scale_D[None], (normed_MD, inverse_M1, scale_D)


def _rms_norm_backward(
    epsilon: float, saved: tuple[jax.Array, ...], d_out_MD: jax.Array
) -> tuple[jax.Array, jax.Array]:
    normed_MD, inverse_M1, scale_D = saved
    d_normed_MD = d_out_MD * scale_D[None]
    d_x_MD = inverse_M1 * (d_normed_MD - normed_MD * _row_mean(d_normed_MD * normed_MD))
    return d_x_MD, (d_out_MD * normed_MD).sum(axis=0)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def _row_mean(x_MD: jax.Array) -> jax.Array:
    return (x_MD @ jnp.full(x_MD.shape[-1], 1 / x_MD.shape[-1], x_MD.dtype))[:, None]
