import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loss import chunk_size, cross_entropy, fused_cross_entropy, prepare_head


def reference(logits, targets):
    logits = np.float64(logits)
    shifted = logits - logits.max(-1, keepdims=True)
    log_shares = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_shares, np.int64(targets)[..., None], -1).mean()


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("shape", [(2, 5), (7,)])
def test_the_loss_is_that_of_float64_numpy(scale, shape):
    logits = scale * jax.random.normal(jax.random.key(0), (*shape, 101))
    targets = np.random.default_rng(0).integers(0, 101, shape).astype(np.uint16)
    assert cross_entropy(logits, targets) == pytest.approx(reference(logits, targets), rel=1e-5)


def test_the_gradient_is_the_one_of_finite_differences():
    logits = jax.random.normal(jax.random.key(0), (3, 11))
    targets = jnp.array([0, 5, 10])
    direction = jax.random.normal(jax.random.key(1), logits.shape)
    step = 1e-4
    difference = reference(logits + step * direction, targets) - reference(logits - step * direction, targets)
    slope = jnp.vdot(jax.grad(cross_entropy)(logits, targets), direction)
    assert slope == pytest.approx(difference / (2 * step), rel=1e-3)


def test_half_precision_logits_are_summed_in_float32():
    logits = jnp.zeros((4, 50257), jnp.bfloat16)
    loss = cross_entropy(logits, jnp.zeros(4, jnp.uint16))
    assert loss.dtype == jnp.float32
    assert loss == pytest.approx(np.log(50257), rel=1e-6)


def problem(rows=(3, 7), width=8, vocab=101, scale=1.0):
    hidden = scale * jax.random.normal(jax.random.key(0), (*rows, width))
    head = jax.random.normal(jax.random.key(1), (vocab, width))
    targets = np.random.default_rng(0).integers(0, vocab, rows).astype(np.uint16)
    return hidden, head, targets


def in_float64(hidden, head, targets):
    """Return the loss and its gradients by hidden states and head, from their definition."""
    hidden, head, targets = np.float64(hidden), np.float64(head), np.int64(targets)
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = flat @ head.T
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    slopes = (shares - np.eye(len(head))[targets.ravel()]) / len(flat)
    return reference(logits, targets.ravel()), (slopes @ head).reshape(hidden.shape), slopes.T @ flat


def fused(hidden, head, targets, rows_per_chunk=None, **options):
    """Return what the fused loss gives for the same, and what it gives when no gradient is asked for."""

    @jax.jit
    def loss(hidden, head, targets):
        return fused_cross_entropy(hidden, head, targets, prepare_head(head, **options), rows_per_chunk)

    value, slopes = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head, targets)
    return loss(hidden, head, targets), value, *slopes


@pytest.mark.parametrize("rows_per_chunk", [None, 1, 4, 10, 20, 21, 1000])
@pytest.mark.parametrize("rows", [(3, 7), (1, 1), (2, 1, 5), (13,)], ids=str)
def test_the_fused_loss_and_its_gradients_are_those_of_float64(rows, rows_per_chunk):
    loss, hidden_slopes, head_slopes = in_float64(*problem(rows))
    alone, value, *slopes = fused(*problem(rows), rows_per_chunk=rows_per_chunk)
    assert alone == pytest.approx(loss, rel=1e-6)
    assert value == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(slopes[0], hidden_slopes, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(slopes[1], head_slopes, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("vocab_multiple", [1, 2, 101, 128])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_padded_vocabulary_changes_nothing(dtype, vocab_multiple):
    hidden, head, targets = problem()
    hidden = -10 * jnp.abs(hidden)  # with a head above 0, the padding's logits, 0, would be by far the largest
    options = {"rows_per_chunk": 4, "dtype": dtype}
    expected = fused(hidden, jnp.abs(head), targets, vocab_multiple=1, **options)
    padded = fused(hidden, jnp.abs(head), targets, vocab_multiple=vocab_multiple, **options)
    for ours, plain in zip(padded, expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)


def test_few_rows_are_cut_too():
    hidden, head, targets = problem((6,))
    text = jax.jit(fused_cross_entropy).lower(hidden, head, targets).as_text()
    assert "tensor<3x101xf32>" in text and "tensor<6x101xf32>" not in text


@pytest.mark.parametrize("sign", [1, -1])
def test_the_fused_loss_takes_extreme_logits(sign):
    hidden, head, targets = problem(scale=sign * 1e4)
    loss, hidden_slopes, head_slopes = in_float64(hidden, head, targets)
    alone, value, *slopes = fused(hidden, head, targets, rows_per_chunk=4)
    assert alone == pytest.approx(loss, rel=1e-5)
    assert value == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(slopes[0], hidden_slopes, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(slopes[1], head_slopes, rtol=1e-4, atol=1e-2)


def test_a_target_that_is_all_but_certain_has_a_gradient_in_half_precision_too():
    """1 - share is 3e-4 here; taken between two bfloat16 numbers it would be 0."""
    head = jnp.array([[8.0], [0.0]])
    _, value, hidden_slopes, _ = fused(jnp.ones((1, 1)), head, jnp.zeros(1, jnp.uint16), dtype=jnp.bfloat16)
    assert value == pytest.approx(np.log1p(np.exp(-8)), rel=1e-3)
    assert hidden_slopes[0, 0] == pytest.approx(-8 / (1 + np.exp(8)), rel=1e-2)


def test_half_precision_products_give_the_loss_and_float32_gradients_within_its_rounding():
    hidden, head, targets = (x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x for x in problem((4, 50)))
    loss, hidden_slopes, head_slopes = in_float64(hidden, head, targets)
    _, value, *slopes = fused(hidden.astype(jnp.float32), head.astype(jnp.float32), targets, dtype=jnp.bfloat16)
    assert value == pytest.approx(loss, rel=1e-5)
    for found, expected in zip(slopes, (hidden_slopes, head_slopes), strict=True):
        assert found.dtype == jnp.float32
        assert np.linalg.norm(found - expected) < 4e-3 * np.linalg.norm(expected)


def test_gradients_scale_with_what_follows_the_loss():
    def scaled(head):
        hidden, _, targets = problem()
        return 3 * fused_cross_entropy(hidden, head, targets) + 1

    hidden, head, targets = problem()
    np.testing.assert_allclose(jax.grad(scaled)(head), 3 * in_float64(hidden, head, targets)[2], rtol=1e-4, atol=1e-7)


def test_a_tied_head_adds_both_gradients():
    table = jax.random.normal(jax.random.key(0), (101, 8))
    tokens = jnp.arange(20)

    def tied(loss, table):
        return loss(jnp.tanh(table[tokens]), table, tokens + 1)

    plain = jax.grad(partial(tied, lambda hidden, head, targets: cross_entropy(hidden @ head.T, targets)))(table)
    np.testing.assert_allclose(jax.grad(partial(tied, fused_cross_entropy))(table), plain, rtol=1e-4, atol=1e-7)


def test_no_array_of_all_tokens_and_the_whole_vocabulary_is_ever_made():
    hidden, head, targets = problem((96,), vocab=1000)
    step = jax.jit(jax.value_and_grad(partial(fused_cross_entropy, rows_per_chunk=8), argnums=(0, 1)))
    text = step.lower(hidden, head, targets).compile().as_text()
    sizes = {math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w+\[([\d,]+)\]", text)}
    assert 8 * 1000 in sizes
    assert max(sizes) == 8 * 1000


@pytest.mark.parametrize(
    ("vocab_size", "platform", "rows"),
    [(50257, "cpu", 512), (101, "cpu", 2**18), (2**26, "cpu", 1), (50257, "gpu", 4096), (50257, "tpu", 4096)],
)
def test_the_chunk_is_the_largest_power_of_two_whose_logits_fit(vocab_size, platform, rows):
    assert chunk_size(vocab_size, platform) == rows


@pytest.mark.parametrize(
    ("call", "sides"),
    [
        (
            lambda: cross_entropy(jnp.zeros((2, 4, 10)), jnp.zeros((2, 3), int)),
            r"\(2, 3\).*\(2, 4\).*target ids.*logits",
        ),
        (
            lambda: fused_cross_entropy(jnp.zeros((2, 4, 8)), jnp.zeros((10, 8)), jnp.zeros((2, 3), int)),
            r"\(2, 3\).*\(2, 4\).*target ids.*hidden states",
        ),
        (
            lambda: fused_cross_entropy(jnp.zeros((2, 4, 8)), jnp.zeros((10, 7)), jnp.zeros((2, 4), int)),
            r"\(10, 7\).*\(None, 8\).*output head.*hidden states",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_both_sides(call, sides):
    with pytest.raises(AssertionError, match=sides):
        call()
