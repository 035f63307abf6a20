"""Linear layers with GPT-2's initial weights."""

import jax
from flax import nnx
from jax.typing import DTypeLike

from outside_in.model_config import ModelConfig

INIT_STD = 0.02


def initializer(std: float) -> nnx.Initializer:
    return jax.nn.initializers.normal(std)


def residual_std(config: ModelConfig) -> float:
    """Return the initial std of a layer that adds to the residual stream."""
    return INIT_STD / (2 * config.n_layers) ** 0.5


def linear(
    inputs: int, outputs: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs, std: float = INIT_STD
) -> nnx.Linear:
    """Build a linear layer: normal weights, biases 0, computing in `dtype`."""
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=initializer(std), dtype=dtype, rngs=rngs)
