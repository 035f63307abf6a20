"""Cross-entropy of next-token prediction, in nats."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Average -log softmax(logits)[target] over all positions, in float32 whatever the logits' type.

    Takes logits (…, V) and target ids (…) of any integer type, each below V. Returns a scalar.
    """
    logits = logits_BTV.reshape(-1, logits_BTV.shape[-1]).astype(jnp.float32)
    targets = targets_BT.reshape(-1).astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
