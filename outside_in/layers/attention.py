"""Causal self-attention by its definition: with its weights at hand, and over a cache. `kernels.py` has the fast ones.

Suffixes of array names: as in model.py, and S for the positions that are looked at.
"""

from functools import partial

import jax
import jax.numpy as jnp

_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def causal_weights(q_BTNH: jax.Array, k_BSNH: jax.Array, window: int | None = None) -> jax.Array:
    """Return softmax weights (B, N, T, S), float32, zero above the diagonal and before the window."""
    k_BSNH = repeat_heads(k_BSNH, q_BTNH.shape[2], 2)
    scores_BNTS = _product("btnh,bsnh->bnts", q_BTNH * q_BTNH.shape[-1] ** -0.5, k_BSNH)
    mask_TS = jnp.tril(jnp.ones(scores_BNTS.shape[-2:], bool))
    if window is not None:
        mask_TS &= ~jnp.tril(mask_TS, -window)
    return jax.nn.softmax(jnp.where(mask_TS[None, None], scores_BNTS, -jnp.inf), axis=-1)


def cached_attention(
    q_BTNH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, first: jax.Array, window: int | None = None
) -> jax.Array:
    """Mix cached values as `causal_attention` does, for the positions from `first` on; returns (B, T, N, H).

    Keys and values of those positions, and of all before them, are in the cache; what stands behind is not looked at,
    nor what is before the last `window` positions.
    """
    k_BNSH, v_BNSH = (repeat_heads(x, q_BTNH.shape[2], 1) for x in (k_BNSH, v_BNSH))
    scores_BNTS = _product("btnh,bnsh->bnts", q_BTNH * q_BTNH.shape[-1] ** -0.5, k_BNSH)
    queries_T1, keys_1S = first + jnp.arange(q_BTNH.shape[1])[:, None], jnp.arange(k_BNSH.shape[2])[None]
    mask_TS = keys_1S <= queries_T1
    if window is not None:
        mask_TS &= keys_1S > queries_T1 - window
    weights_BNTS = jax.nn.softmax(jnp.where(mask_TS[None, None], scores_BNTS, -jnp.inf), axis=-1)
    return _product("bnts,bnsh->btnh", weights_BNTS.astype(v_BNSH.dtype), v_BNSH).astype(v_BNSH.dtype)


def repeat_heads(x: jax.Array, heads: int, axis: int) -> jax.Array:
    """Repeat heads of keys or values, so that every query head has one."""
    return x if x.shape[axis] == heads else jnp.repeat(x, heads // x.shape[axis], axis=axis)
