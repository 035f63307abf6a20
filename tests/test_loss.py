import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from outside_in.loss import chunk_size, chunked_cross_entropy, chunked_losses, cross_entropy


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
    derivative = jnp.vdot(jax.grad(cross_entropy)(logits, targets), direction)
    assert derivative == pytest.approx(difference / (2 * step), rel=1e-3)


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
    d_logits = (shares - np.eye(len(head))[targets.ravel()]) / len(flat)
    return reference(logits, targets.ravel()), (d_logits @ head).reshape(hidden.shape), d_logits.T @ flat


def linear(head, dtype=jnp.float32):
    return lambda hidden: hidden.astype(dtype) @ head.astype(dtype).T


def with_gradients(loss, hidden, head, targets):
    """Return a loss when no gradient is asked for, when one is, and its gradients by hidden states and head."""
    loss = jax.jit(partial(loss, targets=targets))
    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)
    return loss(hidden, head), value, *grads


def chunked(hidden, head, targets, rows_per_chunk=None, unembed=linear):
    def loss(hidden, head, targets):
        return chunked_cross_entropy(unembed(head), hidden, targets, rows_per_chunk)

    return with_gradients(loss, hidden, head, targets)


@pytest.mark.parametrize("rows_per_chunk", [None, 1, 4, 10, 20, 21, 1000])
@pytest.mark.parametrize("rows", [(3, 7), (1, 1), (2, 5), (1, 13)], ids=str)
def test_the_chunked_loss_and_its_gradients_are_those_of_float64(rows, rows_per_chunk):
    loss, d_hidden, d_head = in_float64(*problem(rows))
    alone, value, *grads = chunked(*problem(rows), rows_per_chunk=rows_per_chunk)
    assert alone == pytest.approx(loss, rel=1e-6)
    assert value == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(grads[0], d_hidden, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(grads[1], d_head, rtol=1e-4, atol=1e-7)


SHIFT = jnp.sin(jnp.arange(101))[None, None]
HEADS = {
    "a soft-cap": lambda head: lambda hidden: 5 * jnp.tanh(linear(head)(hidden) / 5),
    "a bias from the head itself": lambda head: lambda hidden: linear(head)(hidden) + head.sum(axis=1)[None, None],
    "a temperature that is learned": lambda head: lambda hidden: linear(head)(hidden) * jnp.exp(head[0, 0]),
    "a constant": lambda head: lambda hidden: linear(head)(hidden) + SHIFT,
    "another order": lambda head: lambda hidden: linear(head)(hidden)[..., jnp.arange(101)[::-1]],
    "no head at all": lambda head: lambda hidden: jnp.pad(hidden, ((0, 0), (0, 0), (0, 93))) + 0 * head.sum(),
}


@pytest.mark.parametrize("name", HEADS)
def test_any_function_to_logits_gets_its_gradients(name):
    def plain(hidden, head, targets):
        return cross_entropy(HEADS[name](head)(hidden), targets)

    expected = with_gradients(plain, *problem())
    for ours, reference in zip(chunked(*problem(), rows_per_chunk=4, unembed=HEADS[name]), expected, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_of_every_target_has_gradients_too(name):
    hidden, head, targets = problem()
    weights = jnp.linspace(0, 1, targets.size).reshape(targets.shape)

    def ours(hidden, head, targets):
        return (chunked_losses(HEADS[name](head), hidden, targets, 4) * weights).sum()

    def plain(hidden, head, targets):
        log_shares = jax.nn.log_softmax(HEADS[name](head)(hidden))
        return -(jnp.take_along_axis(log_shares, targets[..., None].astype(int), axis=-1)[..., 0] * weights).sum()

    for found, reference in zip(*(with_gradients(loss, hidden, head, targets) for loss in (ours, plain))):
        np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-5)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        hidden, head, targets = (np.float64(x) if x.dtype == np.float32 else x for x in problem())
        loss, d_hidden, d_head = in_float64(hidden, head, targets)
        _, value, *grads = chunked(hidden, head, targets, rows_per_chunk=4, unembed=lambda head: lambda x: x @ head.T)
        assert value.dtype == np.float64 and value == pytest.approx(loss, rel=1e-12)
        np.testing.assert_allclose(grads[0], d_hidden, rtol=1e-10)
        np.testing.assert_allclose(grads[1], d_head, rtol=1e-10)


@pytest.mark.parametrize(("rows_per_chunk", "rows"), [(None, 3), (4, 3), (6, 6), (1000, 6)])
def test_few_rows_are_cut_too_unless_a_chunk_may_have_them_all(rows_per_chunk, rows):
    hidden, head, targets = problem((1, 6))
    loss = jax.jit(lambda hidden, head: chunked_cross_entropy(linear(head), hidden, targets, rows_per_chunk))
    text = loss.lower(hidden, head).as_text()
    assert {count for count in (3, 6) if f"<{count}x101xf32>" in text} == {rows}


@pytest.mark.parametrize("sign", [1, -1])
def test_the_chunked_loss_takes_extreme_logits(sign):
    hidden, head, targets = problem(scale=sign * 1e4)
    loss, d_hidden, d_head = in_float64(hidden, head, targets)
    alone, value, *grads = chunked(hidden, head, targets, rows_per_chunk=4)
    assert alone == pytest.approx(loss, rel=1e-5)
    assert value == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(grads[0], d_hidden, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grads[1], d_head, rtol=1e-4, atol=1e-2)


half = partial(linear, dtype=jnp.bfloat16)


def test_a_target_that_is_all_but_certain_has_a_gradient_in_half_precision_too():
    """1 - share is 3e-4 here; taken between two bfloat16 numbers it would be 0."""
    head = jnp.array([[8.0], [0.0]])
    _, value, d_hidden, _ = chunked(jnp.ones((1, 1, 1)), head, jnp.zeros((1, 1), jnp.uint16), unembed=half)
    assert value == pytest.approx(np.log1p(np.exp(-8)), rel=1e-3)
    assert d_hidden[0, 0, 0] == pytest.approx(-8 / (1 + np.exp(8)), rel=1e-2)


def test_half_precision_products_give_the_loss_and_float32_gradients_within_its_rounding():
    hidden, head, targets = (x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x for x in problem((4, 50)))
    loss, d_hidden, d_head = in_float64(hidden, head, targets)
    _, value, *grads = chunked(hidden.astype(jnp.float32), head.astype(jnp.float32), targets, unembed=half)
    assert value == pytest.approx(loss, rel=2e-3)  # logits have eight bits
    for found, expected in zip(grads, (d_hidden, d_head), strict=True):
        assert found.dtype == jnp.float32
        assert np.linalg.norm(found - expected) < 8e-3 * np.linalg.norm(expected)


def test_sums_over_the_vocabulary_are_float32_in_half_precision():
    _, value, *_ = chunked(jnp.zeros((1, 4, 8)), jnp.ones((50257, 8)), jnp.zeros((1, 4), int), unembed=half)
    assert value == pytest.approx(np.log(50257), rel=1e-6)


def test_gradients_scale_with_what_follows_the_loss():
    def scaled(head):
        hidden, _, targets = problem()
        return 3 * chunked_cross_entropy(linear(head), hidden, targets) + 1

    hidden, head, targets = problem()
    np.testing.assert_allclose(jax.grad(scaled)(head), 3 * in_float64(hidden, head, targets)[2], rtol=1e-4, atol=1e-7)


def test_a_tied_head_adds_both_gradients():
    table = jax.random.normal(jax.random.key(0), (101, 8))
    tokens = jnp.arange(20).reshape(2, 10)

    def tied(loss, table):
        return loss(linear(table), jnp.tanh(table[tokens]), tokens + 1)

    plain = jax.grad(partial(tied, lambda unembed, hidden, targets: cross_entropy(unembed(hidden), targets)))(table)
    np.testing.assert_allclose(jax.grad(partial(tied, chunked_cross_entropy))(table), plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["linear", "a soft-cap"])
def test_no_array_of_all_tokens_and_the_whole_vocabulary_is_ever_made(name):
    hidden, head, targets = problem((4, 24), vocab=1000)
    unembed = HEADS.get(name, linear)

    def loss(hidden, head, targets):
        return chunked_cross_entropy(unembed(head), hidden, targets, rows_per_chunk=8)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    text = step.lower(hidden, head, targets).compile().as_text()
    sizes = {math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w+\[([\d,]+)\]", text)}
    assert 8 * 1000 in sizes
    assert max(sizes) == 8 * 1000


@pytest.mark.parametrize(
    ("vocab_size", "platform", "rows"),
    [(50257, "cpu", 512), (101, "cpu", 2**18), (2**26, "cpu", 1), (50257, "gpu", 16384), (50257, "tpu", 16384)],
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
            lambda: chunked_cross_entropy(linear(jnp.zeros((10, 8))), jnp.zeros((2, 4, 8)), jnp.zeros((2, 3), int)),
            r"\(2, 3\).*\(2, 4\).*target ids.*hidden states",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_both_sides(call, sides):
    with pytest.raises(AssertionError, match=sides):
        call()
