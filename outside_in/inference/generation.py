"""Completions, with the keys and values of earlier tokens in a cache.

The prompt takes one pass, then comes one token after another.

Suffixes of array names: as in model.py; S positions of the cache, P those of a padded prompt, C tokens of a call.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import GPTModel
from outside_in.config_files import MIN_FLOAT32
from outside_in.layers.attention import cached_attention
from outside_in.layers.kernels import causal_attention

TOKENS_PER_CALL = 8  # of the compiled loop: enough to hide its start, few enough to be read as they come
MIN_SIZE = 16  # positions: what is shorter is not compiled for itself
NO_TOKEN = -1

Cache = list[tuple[jax.Array, jax.Array]]  # keys and values of each layer, (B, N, S, H)


@partial(jax.tree_util.register_dataclass, data_fields=["temperature", "top_p"], meta_fields=["top_k", "vocab_size"])
@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    It is the likeliest (`temperature` None, 0, or what float32 makes 0), or drawn at a temperature. `top_k` keeps that
    many of the likeliest tokens, then `top_p` the likeliest ones whose probabilities add up to it.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    vocab_size: int | None = None  # ids from here on, which the tokenizer lacks, are never chosen


def generate(
    model: GPTModel, prompt_ids: list[int], num_tokens: int, num_samples: int = 1, **options: Any
) -> np.ndarray:
    """Return what `stream` yields as one array, (num_samples, at most num_tokens), int32."""
    parts = stream(model, prompt_ids, num_tokens, num_samples, **options)
    return np.concatenate([np.zeros((num_samples, 0), np.int32), *parts], axis=1)


def stream(
    model: GPTModel,
    prompt_ids: list[int],
    num_tokens: int,
    num_samples: int = 1,
    *,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop_id: int | None = None,
) -> Iterator[np.ndarray]:
    """Yield `num_samples` completions of a prompt as they come, (num_samples, some).

    Each has `num_tokens` tokens, or fewer if all have chosen `stop_id`; a sample that has chosen it gets nothing else.
    A sample depends on the seed and its index, not on how many there are.

    Of a prompt longer than the context, the last tokens are used. When a text fills the context, only its second half
    is kept: positions are absolute, so the cache cannot move on by one.
    """
    assert prompt_ids, "a completion needs a prompt of at least one token"
    graph, params = nnx.split(model)
    context_length = model.config.context_length
    is_drawn = sampling.temperature is not None and sampling.temperature >= MIN_FLOAT32
    all_of_it = sampling.top_p == 1  # to rounding, a sum of float32 would end before its last terms
    sampling = replace(
        sampling,
        temperature=sampling.temperature if is_drawn else None,
        top_p=None if all_of_it else sampling.top_p,
    )
    text = np.array([prompt_ids[-context_length:]], np.int32)
    size = _padded(text.shape[1] + num_tokens, context_length)
    ended, cache, made = np.zeros(num_samples, bool), None, 0
    while made < num_tokens and not ended.all():
        if text.shape[1] > context_length:
            text, cache = text[:, -max(1, context_length // 2) :], None
        if cache is None:
            read = text.shape[1] - 1  # the last token is the first that the loop takes
            prompt = np.pad(text[:, :read], ((0, 0), (0, _padded(read, size) - read)))
            cache = prefill(graph, params, prompt, size, num_samples // len(text))
            text = np.repeat(text, num_samples // len(text), axis=0)  # all samples begin with the same one
        count = min(TOKENS_PER_CALL, num_tokens - made, context_length + 1 - text.shape[1])
        ends = TextEnds(text[:, -1], text.shape[1] - 1, made, ended)
        stop = NO_TOKEN if stop_id is None else stop_id
        cache, new_BC = decode(graph, params, cache, ends, count, Choice(sampling, seed, stop))
        new = np.asarray(new_BC)[:, :count]
        stops = (new == stop) & ~ended[:, None]
        lengths = np.where(stops.any(axis=1), stops.argmax(axis=1) + 1, count) * ~ended
        new = new[:, : lengths.max()]  # nothing after the end of the last sample
        ended |= stops.any(axis=1)
        made += new.shape[1]
        text = np.concatenate([text, new], axis=1)
        yield new


def likeliest_outputs(model: GPTModel, token_ids: list[int], vocab_size: int | None = None) -> list[int]:
    """Return the likeliest output, below `vocab_size`, at every position.

    Text longer than the context is read in pieces.
    """
    length = model.config.context_length
    logits = nnx.jit(lambda model, tokens: model(tokens))
    pieces = [token_ids[start : start + length] for start in range(0, len(token_ids), length)]
    return [
        int(i)
        for piece in pieces
        for i in np.asarray(logits(model, np.array([piece])))[0, :, :vocab_size].argmax(axis=-1)
    ]


def restrict(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Return logits (B, V) at the temperature, -inf for excluded tokens."""
    assert sampling.temperature is not None, "the likeliest token is not drawn"
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None:
        kth_B1 = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if sampling.top_p is not None:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        shares_BV = jax.nn.softmax(sorted_BV, axis=-1)
        likelier_BV = jnp.cumsum(shares_BV, axis=-1) - shares_BV
        least_B1 = jnp.where(likelier_BV < sampling.top_p, sorted_BV, jnp.inf).min(axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


def _padded(length: int, max_length: int) -> int:
    """Round a length up to a power of two: few shapes compile."""
    return min(max_length, max(MIN_SIZE, 1 << (length - 1).bit_length()))


class TextEnds(NamedTuple):
    """The last token of each text, and its position."""

    last: Any  # (B,), token ids
    position: Any  # of these
    made: Any  # how many tokens were generated before
    ended: Any  # (B,), whether `stop_id` was among them


class Choice(NamedTuple):
    """How the next token is chosen."""

    sampling: Sampling
    seed: Any
    stop_id: Any


@partial(jax.jit, static_argnums=(0, 3, 4))
def prefill(graph: nnx.GraphDef, params: nnx.State, tokens_BP: jax.Array, size: int, copies: int) -> Cache:
    """Return a cache of `size` positions, filled by a prompt.

    What padded tokens leave in it is overwritten before it can be attended to.
    """
    model, cache = nnx.merge(graph, params), []

    def keep(new_BPNH: jax.Array) -> jax.Array:
        room = [(0, 0), (0, 0), (0, size - tokens_BP.shape[1]), (0, 0)]
        return jnp.repeat(jnp.pad(jnp.swapaxes(new_BPNH, 1, 2), room), copies, axis=0)

    def attend(q_BPNH: jax.Array, k_BPNH: jax.Array, v_BPNH: jax.Array) -> jax.Array:
        cache.append((keep(k_BPNH), keep(v_BPNH)))
        return causal_attention(q_BPNH, k_BPNH, v_BPNH)

    model.hidden_states(tokens_BP, attend=attend)
    return cache


@partial(jax.jit, static_argnums=0, donate_argnames="cache")
def decode(
    graph: nnx.GraphDef,
    params: nnx.State,
    cache: Cache,
    ends: TextEnds,
    count: jax.Array,
    choice: Choice,
) -> tuple[Cache, jax.Array]:
    """Generate `count` tokens after the texts; returns the cache and (B, TOKENS_PER_CALL)."""
    sampling, seed, stop_id = choice
    samples_B = jnp.arange(len(ends.last))

    def add(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        cache, last_B, ended_B, tokens_BC = carry
        logits_BV, cache = next_logits(nnx.merge(graph, params), cache, last_B, ends.position + i)
        if sampling.vocab_size is not None:
            logits_BV = logits_BV[:, : sampling.vocab_size]
        if sampling.temperature is None:
            chosen_B = logits_BV.argmax(axis=-1)
        else:
            keys_B = jax.vmap(lambda sample: _key(seed, sample, ends.made + i))(samples_B)
            logits_BV -= logits_BV.max(axis=-1, keepdims=True)  # so that no temperature makes the largest infinite
            chosen_B = jax.vmap(jax.random.categorical)(keys_B, restrict(logits_BV, sampling))
        chosen_B = jnp.where(ended_B, stop_id, chosen_B).astype(jnp.int32)
        return cache, chosen_B, ended_B | (chosen_B == stop_id), tokens_BC.at[:, i].set(chosen_B)

    tokens_BC = jnp.zeros((len(ends.last), TOKENS_PER_CALL), jnp.int32)
    cache, _, _, tokens_BC = jax.lax.fori_loop(0, count, add, (cache, ends.last, ends.ended, tokens_BC))
    return cache, tokens_BC


def next_logits(model: GPTModel, cache: Cache, last_B: jax.Array, position: jax.Array) -> tuple[jax.Array, Cache]:
    """Return the logits (B, V), float32, after the token at `position`.

    Also returns the cache with that token added.
    """
    old, new = iter(cache), []

    def attend(q_B1NH: jax.Array, k_B1NH: jax.Array, v_B1NH: jax.Array) -> jax.Array:
        keys_BNSH, values_BNSH = (
            jax.lax.dynamic_update_slice_in_dim(x_BNSH, jnp.swapaxes(x_B1NH, 1, 2), position, axis=2)
            for x_BNSH, x_B1NH in zip(next(old), (k_B1NH, v_B1NH))
        )
        new.append((keys_BNSH, values_BNSH))
        return cached_attention(q_B1NH, keys_BNSH, values_BNSH, position)

    hidden_B1D = model.hidden_states(last_B[:, None], first_position=position, attend=attend)
    return model.unembed(hidden_B1D)[:, 0].astype(jnp.float32), new


def _key(seed: jax.Array, sample: jax.Array, i: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), i)
