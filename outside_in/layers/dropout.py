"""Dropout whose masks belong to sequences: they are the same however the sequences of a global step are divided.

Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting" (2014).
"""

import jax
import jax.numpy as jnp


class Dropout:
    """The dropout masks of one forward pass, from a key per sequence.

    Every call draws new ones.
    """

    def __init__(self, keys_B: jax.Array) -> None:
        self._keys_B = keys_B
        self._uses = 0

    def __call__(self, x: jax.Array, rate: float) -> jax.Array:
        """Drop a share `rate` of (B, …), and scale the rest."""
        if rate == 0:
            return x
        assert len(x) == len(self._keys_B), f"dropout: expected {len(self._keys_B)} sequences, got {len(x)}"
        self._uses += 1
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(self._keys_B, self._uses)
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys_B)
        return jnp.where(kept, x / (1 - rate), 0)
