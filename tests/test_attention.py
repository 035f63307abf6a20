"""Attention in blocks against the plain definition and JAX's own, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import BLOCKS, SMALLEST_BLOCK, causal_attention, causal_weights, describe_attention, implementation

LENGTHS = [1, 7, SMALLEST_BLOCK, SMALLEST_BLOCK + 1, BLOCKS * SMALLEST_BLOCK, 3 * BLOCKS * SMALLEST_BLOCK - 5]


def random_heads(length, count=4, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(length), (count, 2, length, 3, 8)).astype(dtype)


def plain_attention(q, k, v):
    """In float64, with NumPy alone."""
    q, k, v = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True) @ v).transpose(0, 2, 1, 3)


@pytest.mark.parametrize("length", LENGTHS)
def test_attention_in_blocks_is_the_plain_definition(length):
    q, k, v, _ = random_heads(length)
    np.testing.assert_allclose(causal_attention(q, k, v), plain_attention(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_its_gradients_are_those_of_automatic_differentiation(length):
    q, k, v, slopes = random_heads(length)

    def autodiff(q, k, v):
        return jnp.einsum("bnts,bsnh->btnh", causal_weights(q, k), v)

    ours, expected = (jax.vjp(function, q, k, v)[1](slopes) for function in (causal_attention, autodiff))
    for name, gradient, reference in zip("qkv", ours, expected):
        np.testing.assert_allclose(gradient, reference, rtol=1e-4, atol=1e-5, err_msg=name)


def test_large_scores_stay_finite():
    q, k, v, slopes = random_heads(70)
    value, gradients = jax.vjp(causal_attention, 1e4 * q, 1e4 * k, v)
    assert all(np.isfinite(x).all() for x in (value, *gradients(slopes)))


def test_half_precision_stays_near_float32():
    heads = random_heads(70, dtype=jnp.bfloat16)
    value, gradients = jax.vjp(causal_attention, *heads[:3])
    exact, exact_gradients = jax.vjp(causal_attention, *heads[:3].astype(jnp.float32))
    ours, expected = (value, *gradients(heads[3])), (exact, *exact_gradients(heads[3].astype(jnp.float32)))
    for half, single in zip(ours, expected):
        assert half.dtype == jnp.bfloat16
        assert float(jnp.abs(half - single).max()) < 0.02 * float(jnp.abs(single).max())


def test_no_array_of_positions_by_positions_is_kept_for_the_backward_pass():
    q, k, v, _ = random_heads(256)
    residuals = jax.tree.leaves(jax.vjp(causal_attention, q, k, v)[1])
    assert max(array.size for array in residuals) == q.size


def test_layers_on_layers_do_not_keep_their_weights_either():
    """They are computed anew, and not before they are needed, which XLA would do if it could."""

    def bytes_of(layers):
        def mixed(x):
            for _ in range(layers):
                x = causal_attention(x, x, x)
            return x.sum()

        compiled = jax.jit(jax.grad(mixed)).lower(jnp.zeros((1, 256, 4, 8))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    weights_bytes = 4 * 4 * 256 * 256
    assert bytes_of(9) - bytes_of(3) < 6 * weights_bytes / 2


def test_the_plain_weights_serve_jax_own_attention():
    q, k, v, _ = random_heads(7)
    fused = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(jnp.einsum("bnts,bsnh->btnh", causal_weights(q, k), v), fused, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "head_width", "platform", "expected"),
    [
        ("bfloat16", 64, "gpu", "cudnn"),
        ("bfloat16", 128, "gpu", "cudnn"),
        ("bfloat16", 60, "gpu", "blocks"),
        ("bfloat16", 136, "gpu", "blocks"),
        ("float32", 64, "gpu", "blocks"),
        ("bfloat16", 64, "cpu", "blocks"),
    ],
)
def test_cudnn_is_chosen_by_name_where_it_can_serve(dtype, head_width, platform, expected):
    assert implementation(dtype, head_width, platform) == expected
    assert ("by cuDNN" in describe_attention(dtype, head_width, 0.0, platform)) == (expected == "cudnn")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("float32", 64, 0.0, "gpu"), 'precision "bfloat16"'),
        (("bfloat16", 60, 0.0, "gpu"), "multiples of 8"),
        (("float32", 64, 0.0, "cpu"), "no cuDNN"),
        (("bfloat16", 64, 0.1, "gpu"), "drop_rate"),
    ],
)
def test_the_reason_for_another_attention_is_said(arguments, reason):
    assert reason in describe_attention(*arguments)
