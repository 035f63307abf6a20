"""What is computed in another way on each kind of device.

On an NVIDIA GPU attention is cuDNN's where it can serve, and the vocabulary is padded; on a CPU attention and norms are
those of `cpu_kernels.py`; everywhere else they are the plain ones of JAX and Flax.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from outside_in.layers.attention import repeat_heads
from outside_in.layers.cpu_kernels import blockwise_attention, layer_norm, rms_norm
from outside_in.runtime import target

EPSILON = 1e-5  # of norms
VOCAB_MULTIPLE = {"gpu": 128}  # tensor cores like round numbers: 50,257 becomes 50,304


def causal_attention(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, window: int | None = None) -> jax.Array:
    """Return causal softmax attention, (B, T, N, H).

    Each position averages the values up to its own, of the last `window` if given, by softmax(q · k / √H). Computes in
    the type of the values. Keys and values may have fewer heads, each for as many queries in a row.
    """
    q_BTNH, k_BTNH = (x.astype(v_BTNH.dtype) for x in (q_BTNH, k_BTNH))
    chosen = choose_attention(q_BTNH.dtype, q_BTNH.shape[-1], target.platform())
    if chosen == "blocks":
        k_BTNH, v_BTNH = (repeat_heads(x, q_BTNH.shape[2], 2) for x in (k_BTNH, v_BTNH))
        return blockwise_attention(q_BTNH, k_BTNH, v_BTNH, window)
    left_and_right = None if window is None or window >= q_BTNH.shape[1] else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTNH, v_BTNH, is_causal=True, implementation=chosen, local_window_size=left_and_right
    )


def choose_attention(dtype: DTypeLike, head_width: int, platform: str) -> Literal["blocks", "cudnn", "xla"]:
    """Choose "cudnn" by name where it can serve: left to itself, JAX takes "xla" on a GPU too. "blocks" on CPUs."""
    if platform == "cpu":
        return "blocks"
    fits = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head_width % 8 == 0 and head_width <= 128
    return "cudnn" if fits and platform == "gpu" else "xla"


def describe_attention(dtype: DTypeLike, head_width: int, drop_rate: float, platform: str) -> str:
    """Say in one line which attention is used, and why not cuDNN's."""
    if drop_rate:
        return "attention in plain XLA with all of its weights in memory: drop_rate drops some, which cuDNN's does not"
    chosen = choose_attention(dtype, head_width, platform)
    if chosen == "cudnn":
        return "attention by cuDNN"
    if chosen == "blocks":
        return "attention in plain XLA, in blocks of queries: there is no cuDNN on this device"
    missing = (
        'it takes precision "bfloat16"' if jnp.dtype(dtype) == jnp.float32 else "head width: multiples of 8 up to 128"
    )
    return f"attention in plain XLA, which is slower than cuDNN's: {missing}"


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` over the last axis: its parameters, its definition."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        super().__init__(width, epsilon=EPSILON, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize (…, D)."""
        if target.platform() != "cpu":
            return super().__call__(x)
        assert self.scale is not None and self.bias is not None  # Flax's norms may do without
        return _by_rows(layer_norm, x, self.scale[...], self.bias[...])


class RMSNorm(nnx.RMSNorm):
    """`nnx.RMSNorm` over the last axis, https://arxiv.org/abs/1910.07467: its parameter, its definition."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        super().__init__(width, epsilon=EPSILON, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize (…, D)."""
        if target.platform() != "cpu":
            return super().__call__(x)
        assert self.scale is not None  # Flax's norms may do without
        return _by_rows(rms_norm, x, self.scale[...])


def _by_rows(norm: Callable[..., jax.Array], x: jax.Array, *parameters: jax.Array) -> jax.Array:
    """Call a norm of rows (M, D), in float32 or wider, for (…, D)."""
    dtype = jnp.result_type(x, *parameters)
    arrays = (x.reshape(-1, x.shape[-1]), *parameters)
    arrays = (array.astype(jnp.promote_types(dtype, jnp.float32)) for array in arrays)
    return norm(*arrays, EPSILON).reshape(x.shape).astype(dtype)


def vocabulary_product(x_MD: jax.Array, table_VD: jax.Array) -> jax.Array:
    """Return x @ table.T, (M, V).

    Inside, rows of zeros are added to the table, so that their number is a multiple that tensor cores like.
    """
    padding = -len(table_VD) % VOCAB_MULTIPLE.get(target.platform(), 1)
    return (x_MD @ jnp.pad(table_VD, ((0, padding), (0, 0))).T)[:, : len(table_VD)]
