"""Layer norm with a backward pass of its own, in float32.

Ba, Kiros and Hinton, "Layer Normalization", https://arxiv.org/abs/1607.06450. The parameters and the definition are
those of `nnx.LayerNorm`. Left to automatic differentiation, XLA's CPU backend takes ten times as long backward: it
fuses a product into the sum over a row, and loses all speed there.

Suffixes of array names: as in model.py, and M for rows.
"""

import jax
import jax.numpy as jnp
from flax import nnx

EPSILON = 1e-5


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` over the last axis, whose gradient is computed as it should be."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        super().__init__(width, epsilon=EPSILON, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise (…, D), float32."""
        assert self.scale is not None and self.bias is not None  # Flax's norms may do without
        return _normalize(x.reshape(-1, x.shape[-1]), self.scale[...], self.bias[...]).reshape(x.shape)


@jax.custom_vjp
def _normalize(x_MD: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> jax.Array:
    return _forward(x_MD, scale_D, bias_D)[0]


def _forward(x_MD: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    centred_MD = x_MD - _row_mean(x_MD)
    inverse_M1 = jax.lax.rsqrt(_row_mean(centred_MD * centred_MD) + EPSILON)
    normed_MD = centred_MD * inverse_M1
    return normed_MD * scale_D[None] + bias_D[None], (normed_MD, inverse_M1, scale_D)


def _backward(saved: tuple[jax.Array, ...], slopes_MD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    normed_MD, inverse_M1, scale_D = saved
    scaled_MD = slopes_MD * scale_D[None]
    x_slopes_MD = inverse_M1 * (scaled_MD - _row_mean(scaled_MD) - normed_MD * _row_mean(scaled_MD * normed_MD))
    return x_slopes_MD, (slopes_MD * normed_MD).sum(axis=0), slopes_MD.sum(axis=0)


_normalize.defvjp(_forward, _backward)


def _row_mean(x_MD: jax.Array) -> jax.Array:
    """Return the mean of each row, (M, 1); on the CPU as a product, which nothing is fused into."""
    if jax.default_backend() != "cpu":
        return x_MD.mean(axis=-1, keepdims=True)
    return (x_MD @ jnp.full(x_MD.shape[-1], 1 / x_MD.shape[-1]))[:, None]
