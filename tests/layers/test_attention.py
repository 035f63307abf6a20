"""Attention in blocks against the plain definition and JAX's own, values and gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from outside_in.layers.attention import causal_weights
from outside_in.layers.cpu_kernels import BLOCKS, MIN_BLOCK, blockwise_attention, wait_for

LENGTHS = [1, 7, MIN_BLOCK, MIN_BLOCK + 1, BLOCKS * MIN_BLOCK, 3 * BLOCKS * MIN_BLOCK - 5]


def random_heads(length, count=4, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(length), (count, 2, length, 3, 8)).astype(dtype)


def plain_attention(q, k, v, window=None):
    """In float64, with NumPy alone."""
    q, k, v = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    seen = np.tril(np.ones(scores.shape[-2:], bool))
    seen = seen if window is None else np.triu(seen, 1 - window)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True) @ v).transpose(0, 2, 1, 3)


@pytest.mark.parametrize("length", LENGTHS)
def test_attention_in_blocks_is_the_plain_definition(length):
    q, k, v, _ = random_heads(length)
    np.testing.assert_allclose(blockwise_attention(q, k, v), plain_attention(q, k, v), rtol=1e-5, atol=1e-5)


WINDOWS = [(7, 1), (7, 3), (MIN_BLOCK + 1, MIN_BLOCK), (3 * BLOCKS * MIN_BLOCK - 5, 50), (70, 70), (70, 1000)]


@pytest.mark.parametrize(("length", "window"), WINDOWS)
def test_a_window_is_the_latest_positions_and_itself(length, window):
    q, k, v, d_out = random_heads(length)
    expected = plain_attention(q, k, v, window)
    np.testing.assert_allclose(blockwise_attention(q, k, v, window), expected, rtol=1e-5, atol=1e-5)
    xla = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=(window - 1, 0))
    np.testing.assert_allclose(xla, expected, rtol=1e-5, atol=1e-5)

    def autodiff(q, k, v):
        return jnp.einsum("bnts,bsnh->btnh", causal_weights(q, k, window), v)

    np.testing.assert_allclose(autodiff(q, k, v), expected, rtol=1e-5, atol=1e-5)
    ours = jax.vjp(lambda *x: blockwise_attention(*x, window), q, k, v)[1](d_out)
    for name, gradient, reference in zip("qkv", ours, jax.vjp(autodiff, q, k, v)[1](d_out)):
        np.testing.assert_allclose(gradient, reference, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_window_computes_no_scores_before_it():
    q, k, v, _ = random_heads(BLOCKS * MIN_BLOCK)

    def operations(window):
        text = str(jax.make_jaxpr(lambda *x: blockwise_attention(*x, window))(q, k, v))
        return sorted(
            int(size) for size in re.findall(rf"f32\[2,3,{MIN_BLOCK},(\d+)\] = dot_general", text) if size != "8"
        )

    assert operations(None) == [MIN_BLOCK * block for block in range(1, BLOCKS + 1)]
    assert operations(2) == [MIN_BLOCK] + [MIN_BLOCK + 1] * (BLOCKS - 1)


@pytest.mark.parametrize("length", LENGTHS)
def test_its_gradients_are_those_of_automatic_differentiation(length):
    q, k, v, d_out = random_heads(length)

    def autodiff(q, k, v):
        return jnp.einsum("bnts,bsnh->btnh", causal_weights(q, k), v)

    ours, expected = (jax.vjp(function, q, k, v)[1](d_out) for function in (blockwise_attention, autodiff))
    for name, gradient, reference in zip("qkv", ours, expected):
        np.testing.assert_allclose(gradient, reference, rtol=1e-4, atol=1e-5, err_msg=name)


def test_large_scores_stay_finite():
    q, k, v, d_out = random_heads(70)
    value, gradients = jax.vjp(blockwise_attention, 1e4 * q, 1e4 * k, v)
    assert all(np.isfinite(x).all() for x in (value, *gradients(d_out)))


def test_half_precision_stays_near_float32():
    heads = random_heads(70, dtype=jnp.bfloat16)
    value, gradients = jax.vjp(blockwise_attention, *heads[:3])
    exact, exact_gradients = jax.vjp(blockwise_attention, *heads[:3].astype(jnp.float32))
    ours, expected = (value, *gradients(heads[3])), (exact, *exact_gradients(heads[3].astype(jnp.float32)))
    for half, single in zip(ours, expected):
        assert half.dtype == jnp.bfloat16
        assert float(jnp.abs(half - single).max()) < 0.02 * float(jnp.abs(single).max())


def test_no_array_of_positions_by_positions_is_kept_for_the_backward_pass():
    q, k, v, _ = random_heads(256)
    residuals = jax.tree.leaves(jax.vjp(blockwise_attention, q, k, v)[1])
    assert max(array.size for array in residuals) == q.size


def test_layers_on_layers_do_not_keep_their_weights_either():
    """They are computed anew, and not before they are needed, which XLA would do if it could."""

    def bytes_of(layers):
        def mixed(x):
            for _ in range(layers):
                x = blockwise_attention(x, x, x)
            return x.sum()

        compiled = jax.jit(jax.grad(mixed)).lower(jnp.zeros((1, 256, 4, 8))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    weights_bytes = 4 * 4 * 256 * 256
    assert bytes_of(9) - bytes_of(3) < 6 * weights_bytes / 2


def test_the_plain_weights_serve_jax_own_attention():
    q, k, v, _ = random_heads(7)
    fused = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(jnp.einsum("bnts,bsnh->btnh", causal_weights(q, k), v), fused, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [1.0, jnp.inf, -jnp.inf, jnp.nan])
def test_waiting_for_a_gradient_changes_nothing_whatever_it_is(value):
    x = jnp.arange(-3.0, 5.0)
    np.testing.assert_array_equal(jax.jit(wait_for)(x, jnp.full(8, value)), x)
