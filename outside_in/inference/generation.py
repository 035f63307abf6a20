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
ALL = float("inf")  # as `top_p`: every token

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
    return generate_all(model, [prompt_ids], num_tokens, num_samples, **options)[0]


def generate_all(
    model: GPTModel, prompts: list[list[int]], num_tokens: int, num_samples: int = 1, **options: Any
) -> np.ndarray:
    """Return what `stream_all` yields as one array, (prompts, num_samples, at most num_tokens), int32."""
    parts = stream_all(model, prompts, num_tokens, num_samples, **options)
    rows = np.concatenate([np.zeros((len(prompts) * num_samples, 0), np.int32), *parts], axis=1)
    return rows.reshape(len(prompts), num_samples, -1)


def stream(
    model: GPTModel, prompt_ids: list[int], num_tokens: int, num_samples: int = 1, **options: Any
) -> Iterator[np.ndarray]:
    """Yield completions of a prompt as they come, (num_samples, some); see `stream_all`."""
    return stream_all(model, [prompt_ids], num_tokens, num_samples, **options)


def stream_all(
    model: GPTModel,
    prompts: list[list[int]],
    num_tokens: int,
    num_samples: int = 1,
    *,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop_id: int | None = None,
    size: int | None = None,
) -> Iterator[np.ndarray]:
    """Yield `num_samples` completions of each prompt as they come, (prompts · num_samples, some).

    Each has `num_tokens` tokens, or fewer if all have chosen `stop_id`; a sample that has chosen it gets nothing else.
    A sample depends on its prompt, the seed and its index, not on how many prompts and samples there are.

    Of a prompt longer than the context, the last tokens are used. When a text fills the context, only its second half
    is kept: positions are absolute, so the cache cannot move on by one.

    `size` is that of the cache, by default as small as it can be; with a given one, `num_tokens` has no part in what is
    compiled.
    """
    assert all(prompts), "a completion needs a prompt of at least one token"
    graph, params = nnx.split(model)
    context_length = model.config.context_length
    sampling, stop = _simplest(sampling), NO_TOKEN if stop_id is None else stop_id
    texts = [np.array(prompt_ids[-context_length:], np.int32) for prompt_ids in prompts]
    size = size or _padded(max(map(len, texts)) + num_tokens, context_length)
    samples = np.tile(np.arange(num_samples, dtype=np.int32), len(prompts))
    ended, cache, made = np.zeros(len(samples), bool), None, 0
    while made < num_tokens and not ended.all():
        if max(map(len, texts)) > context_length:
            texts = [text[-max(1, context_length // 2) :] if len(text) > context_length else text for text in texts]
            cache = None
        if cache is None:
            copies = len(samples) // len(texts)  # all samples of a prompt begin with the same text
            cache = prefill(graph, params, _prompts_to_read(texts, size), size, copies)
            texts = [text for text in texts for _ in range(copies)]
        count = min(TOKENS_PER_CALL, num_tokens - made, context_length + 1 - max(map(len, texts)))
        ends = TextEnds(np.array([text[-1] for text in texts]), _positions(texts), samples, made, ended)
        cache, new_BC = decode(graph, params, cache, ends, count, Choice(sampling, seed, stop))
        new = np.asarray(new_BC)[:, :count]
        stops = (new == stop) & ~ended[:, None]
        lengths = np.where(stops.any(axis=1), stops.argmax(axis=1) + 1, count) * ~ended
        new = new[:, : lengths.max()]  # nothing after the end of the last sample
        ended |= stops.any(axis=1)
        made += new.shape[1]
        texts = [np.concatenate(both) for both in zip(texts, new, strict=True)]
        yield new


def _simplest(sampling: Sampling) -> Sampling:
    """Leave out what has no effect, so that it is not compiled."""
    is_drawn = sampling.temperature is not None and sampling.temperature >= MIN_FLOAT32
    all_of_it = sampling.top_p == 1  # to rounding, a sum of float32 would end before its last terms
    return replace(
        sampling,
        temperature=sampling.temperature if is_drawn else None,
        top_p=None if all_of_it else sampling.top_p,
    )


def _prompts_to_read(texts: list[np.ndarray], size: int) -> np.ndarray:
    """Return the texts (B, P), padded, each without its last token, the first that the loop takes."""
    prompts = np.zeros((len(texts), _padded(max(map(len, texts)) - 1, size)), np.int32)
    for row, text in zip(prompts, texts, strict=True):
        row[: len(text) - 1] = text[:-1]
    return prompts


def _positions(texts: list[np.ndarray]) -> Any:
    """Return the position of the last token of the texts: one for all, or (B,) where they differ."""
    positions = np.array([len(text) - 1 for text in texts], np.int32)
    return int(positions[0]) if (positions == positions[0]).all() else positions


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
        # Sorting takes as long as a small model: a program that can do both skips it where all are kept.
        restricted = jnp.float32(sampling.top_p) < ALL
        logits_BV = jax.lax.cond(restricted, _likeliest, lambda logits_BV, _: logits_BV, logits_BV, sampling.top_p)
    return logits_BV


def _likeliest(logits_BV: jax.Array, top_p: jax.Array) -> jax.Array:
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    shares_BV = jax.nn.softmax(sorted_BV, axis=-1)
    likelier_BV = jnp.cumsum(shares_BV, axis=-1) - shares_BV
    least_B1 = jnp.where(likelier_BV < top_p, sorted_BV, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


def _padded(length: int, max_length: int) -> int:
    """Round a length up to a power of two: few shapes compile."""
    return min(max_length, max(MIN_SIZE, 1 << (length - 1).bit_length()))


class TextEnds(NamedTuple):
    """The last token of each text, and its position."""

    last: Any  # (B,), token ids
    position: Any  # of these; (B,) where the texts are of different lengths
    sample: Any  # (B,), the index of each among those of its prompt
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

    def attend(q_BPNH: jax.Array, k_BPNH: jax.Array, v_BPNH: jax.Array, window: int | None = None) -> jax.Array:
        cache.append((keep(k_BPNH), keep(v_BPNH)))
        return causal_attention(q_BPNH, k_BPNH, v_BPNH, window)

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

    def add(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        cache, last_B, ended_B, tokens_BC = carry
        logits_BV, cache = next_logits(nnx.merge(graph, params), cache, last_B, ends.position + i)
        if sampling.vocab_size is not None:
            logits_BV = logits_BV[:, : sampling.vocab_size]
        if sampling.temperature is None:
            chosen_B = logits_BV.argmax(axis=-1)
        else:
            keys_B = jax.vmap(lambda sample: _key(seed, sample, ends.made + i))(ends.sample)
            logits_BV -= logits_BV.max(axis=-1, keepdims=True)  # so that no temperature makes the largest infinite
            chosen_B = jax.vmap(jax.random.categorical)(keys_B, restrict(logits_BV, sampling))
        chosen_B = jnp.where(ended_B, stop_id, chosen_B).astype(jnp.int32)
        return cache, chosen_B, ended_B | (chosen_B == stop_id), tokens_BC.at[:, i].set(chosen_B)

    tokens_BC = jnp.zeros((len(ends.last), TOKENS_PER_CALL), jnp.int32)
    cache, _, _, tokens_BC = jax.lax.fori_loop(0, count, add, (cache, ends.last, ends.ended, tokens_BC))
    return cache, tokens_BC


def next_logits(model: GPTModel, cache: Cache, last_B: jax.Array, position: jax.Array) -> tuple[jax.Array, Cache]:
    """Return the logits (B, V), float32, after the token at `position`, one for all or (B,).

    Also returns the cache with that token added.
    """
    if jnp.ndim(position):
        return jax.vmap(partial(_next_logits_of_one, model))(cache, last_B, position)
    old, new = iter(cache), []

    def attend(q_B1NH: jax.Array, k_B1NH: jax.Array, v_B1NH: jax.Array, window: int | None = None) -> jax.Array:
        keys_BNSH, values_BNSH = (
            jax.lax.dynamic_update_slice_in_dim(x_BNSH, jnp.swapaxes(x_B1NH, 1, 2), position, axis=2)
            for x_BNSH, x_B1NH in zip(next(old), (k_B1NH, v_B1NH))
        )
        new.append((keys_BNSH, values_BNSH))
        return cached_attention(q_B1NH, keys_BNSH, values_BNSH, position, window)

    hidden_B1D = model.hidden_states(last_B[:, None], first_position=position, attend=attend)
    return model.unembed(hidden_B1D)[:, 0].astype(jnp.float32), new


def _next_logits_of_one(model: GPTModel, cache: Cache, last: jax.Array, position: jax.Array) -> tuple[jax.Array, Cache]:
    batch = jax.tree.map(lambda x: x[None], cache)
    return jax.tree.map(lambda x: x[0], next_logits(model, batch, last[None], position))


def _key(seed: jax.Array, sample: jax.Array, i: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), i)
