"""Value embeddings, as in modded-nanogpt, https://github.com/KellerJordan/modded-nanogpt: a table beside attention."""

import jax
import jax.numpy as jnp
from flax import nnx

from outside_in.layers.linear import INIT_STD, initializer


class ValueEmbedding(nnx.Module):
    """Adds to the values, by the token, a row of a table of their own times a learned number.

    Rows start as those of the token embedding do, the number at 1.
    """

    def __init__(self, vocab_size: int, width: int, rngs: nnx.Rngs) -> None:
        self.table = nnx.Embed(vocab_size, width, embedding_init=initializer(INIT_STD), rngs=rngs)
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, v_BTNH: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        rows_BTNH = self.table(tokens_BT.astype(jnp.int32)).reshape(v_BTNH.shape)
        return (v_BTNH + self.scale[...] * rows_BTNH).astype(v_BTNH.dtype)
