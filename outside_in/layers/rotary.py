"""Rotary positions: RoFormer, https://arxiv.org/abs/2104.09864, with the halves of a head as in Llama's code."""

import jax
import jax.numpy as jnp

BASE = 10_000.0  # the slowest pair turns once in about 2π · BASE positions


def rotate(x_BTNH: jax.Array, positions_T: jax.Array) -> jax.Array:
    """Turn the pairs (i, i + H/2) of queries or keys by angles that grow with their positions.

    Then q · k depends on how far apart the two are. Angles, sines and products are float32.
    """
    half = x_BTNH.shape[-1] // 2
    frequencies_h = BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles_T1h = positions_T.astype(jnp.float32)[:, None, None] * frequencies_h[None, None]
    cos, sin = jnp.cos(angles_T1h)[None], jnp.sin(angles_T1h)[None]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
