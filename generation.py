"""Completions: sample one token after another from a model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import GPTModel


def generate(
    model: GPTModel,
    prompt_ids: list[int],
    *,
    num_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    num_samples: int = 1,
) -> np.ndarray:
    """Continue a prompt by `num_tokens` tokens, `num_samples` times.

    Temperature 0 takes the likeliest token; otherwise tokens are sampled, from the `top_k` likeliest where given.
    A text longer than the model's context is cropped on the left, also while it grows.

    Returns the new token ids, (num_samples, num_tokens), int32.
    """
    assert prompt_ids, "a completion needs a prompt of at least one token"
    text = np.tile(np.array(prompt_ids, np.int32), (num_samples, 1))
    # One compiled shape serves all tokens: the smallest power of two that holds the text, at most the context.
    needed = len(prompt_ids) + num_tokens
    window = min(model.config.context_length, 1 << (needed - 1).bit_length())
    for number in range(num_tokens):
        visible = text[:, -window:]
        padded = np.pad(visible, ((0, 0), (0, window - visible.shape[1])))  # on the right, where nothing looks
        keys = _sample_keys(seed, num_samples, number)
        new = _next_token(model, padded, visible.shape[1] - 1, keys, temperature, top_k)
        text = np.concatenate([text, np.asarray(new)[:, None]], axis=1)
    return text[:, len(prompt_ids) :]


def _sample_keys(seed: int, num_samples: int, number: int) -> jax.Array:
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(num_samples))
    return jax.vmap(partial(jax.random.fold_in, data=number))(keys)


@partial(nnx.jit, static_argnames=("temperature", "top_k"))
def _next_token(
    model: GPTModel, tokens_BT: jax.Array, last: jax.Array, keys: jax.Array, temperature: float, top_k: int | None
) -> jax.Array:
    """Choose the token after position `last`, (B,)."""
    hidden_BTD = model.hidden_states(tokens_BT)
    logits_BV = model.unembed(jnp.take(hidden_BTD, last, axis=1)).astype(jnp.float32)
    if temperature == 0:
        return logits_BV.argmax(axis=-1).astype(jnp.int32)
    if top_k is not None:
        kth_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    return jax.vmap(jax.random.categorical)(keys, logits_BV / temperature).astype(jnp.int32)
