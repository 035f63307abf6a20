"""Activations of feed-forward layers. What they would keep for the backward pass is computed again from their input."""

from functools import partial

import jax

gelu = jax.checkpoint(partial(jax.nn.gelu, approximate=True))  # GPT-2's tanh form


@jax.checkpoint
def relu2(x: jax.Array) -> jax.Array:
    """Return ReLU squared, of Primer, https://arxiv.org/abs/2109.08668."""
    return jax.numpy.square(jax.nn.relu(x))


@jax.checkpoint
def swiglu(gate: jax.Array, x: jax.Array) -> jax.Array:
    """Return SiLU(gate) · x, of "GLU Variants Improve Transformer", https://arxiv.org/abs/2002.05202."""
    return jax.nn.silu(gate) * x
