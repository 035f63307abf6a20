"""What one reaches for when training misbehaves: parameter hashes and sanity lines."""

import hashlib
import math

import jax
from flax import nnx

from weights import named_arrays


def parameter_hashes(model: nnx.Module) -> dict[str, str]:
    """Hash every parameter: dot-joined name → 16 hex digits of BLAKE2, the same on every machine."""
    arrays = jax.device_get(named_arrays(nnx.state(model, nnx.Param)))
    return {name: hashlib.blake2b(array.tobytes(), digest_size=8).hexdigest() for name, array in arrays.items()}


def check_parameters_changed(before: dict[str, str], after: dict[str, str]) -> None:
    """Raise RuntimeError when no parameter differs between two sets of hashes."""
    if before == after:
        raise RuntimeError(
            "the first update changed no parameter; usual causes: a mutating step under jax.jit instead of nnx.jit, "
            "a learning rate too small for float32, gradients that are all zero"
        )


def first_loss_line(loss: float, vocab_size: int) -> str:
    """Compare the first loss with that of a uniform guess."""
    uniform = math.log(vocab_size)
    line = f"first loss {loss:.4f}; a uniform guess over {vocab_size:,} tokens is {uniform:.4f}"
    if not abs(loss - uniform) <= 0.5:
        line += "; WARNING: they should be close: look at the initialisation, the targets, the loss"
    return line
