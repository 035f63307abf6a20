"""What is computed in other ways on other devices, against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from outside_in.layers import kernels
from outside_in.layers.kernels import (
    EPSILON,
    LayerNorm,
    RMSNorm,
    choose_attention,
    describe_attention,
    vocabulary_product,
)

WIDTH = 48


def norms(kind=LayerNorm):
    """Return ours and Flax's with the same, not trivial parameters."""
    ours, flax = kind(WIDTH, nnx.Rngs(0)), kind.__base__(WIDTH, epsilon=EPSILON, rngs=nnx.Rngs(0))
    for number, name in enumerate(("scale", "bias") if kind is LayerNorm else ("scale",)):
        value = jax.random.normal(jax.random.key(number), (WIDTH,))
        getattr(ours, name)[...], getattr(flax, name)[...] = value, value
    return ours, flax


@pytest.fixture(params=["cpu", "gpu"])
def platform(request, monkeypatch):
    """Take the form of either platform."""
    monkeypatch.setattr(kernels.jax, "default_backend", lambda: request.param)


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
@pytest.mark.parametrize("shape", [(5, WIDTH), (2, 3, WIDTH)])
def test_norms_and_their_gradients_are_flax_s(platform, kind, shape):
    x, d_out = jax.random.normal(jax.random.key(3), (2, *shape)) * 3 + 1

    def value_and_gradients(norm):
        graph, state = nnx.split(norm)
        value, gradients = jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, x)
        return value, *gradients(d_out)

    for ours, expected in zip(*(jax.tree.leaves(value_and_gradients(norm)) for norm in norms(kind))):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_row_of_equal_numbers_gives_the_bias(platform):
    ours, _ = norms()
    np.testing.assert_allclose(ours(jnp.full((1, WIDTH), 7.0))[0], ours.bias[...], atol=1e-3)


def test_a_large_mean_does_not_hide_the_deviations_on_a_cpu():
    x = np.float32(np.random.default_rng(0).normal(size=(1, WIDTH)) + 3000)
    exact = (np.float64(x) - np.float64(x).mean()) / np.sqrt(np.float64(x).var() + EPSILON)
    ours = LayerNorm(WIDTH, nnx.Rngs(0))(jnp.array(x))
    np.testing.assert_allclose(ours, exact, atol=2e-3)


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_the_parameters_have_the_names_of_flax(kind):
    ours, flax = norms(kind)
    assert jax.tree.structure(nnx.state(ours)) == jax.tree.structure(nnx.state(flax))


@pytest.mark.parametrize(
    ("dtype", "head_width", "platform", "expected"),
    [
        ("bfloat16", 64, "gpu", "cudnn"),
        ("bfloat16", 128, "gpu", "cudnn"),
        ("bfloat16", 60, "gpu", "xla"),
        ("bfloat16", 136, "gpu", "xla"),
        ("float32", 64, "gpu", "xla"),
        ("bfloat16", 64, "cpu", "blocks"),
        ("bfloat16", 64, "tpu", "xla"),
    ],
)
def test_cudnn_is_chosen_by_name_where_it_can_serve(dtype, head_width, platform, expected):
    assert choose_attention(dtype, head_width, platform) == expected
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


@pytest.mark.parametrize("vocab_size", [101, 128])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_padded_vocabulary_changes_nothing_but_the_product_inside(platform, dtype, vocab_size):
    x, table = jnp.ones((3, 8), dtype), jax.random.normal(jax.random.key(1), (vocab_size, 8)).astype(dtype)
    d_logits = jax.random.normal(jax.random.key(2), (3, vocab_size)).astype(dtype)
    expected = jax.vjp(lambda x, table: x @ table.T, x, table)
    found = jax.vjp(vocabulary_product, x, table)
    for ours, plain in zip((found[0], *found[1](d_logits)), (expected[0], *expected[1](d_logits)), strict=True):
        np.testing.assert_allclose(np.float32(ours), np.float32(plain), rtol=1e-5, atol=1e-5)
    text = jax.jit(lambda *arguments: vocabulary_product(*arguments)).lower(x, table).as_text()  # traced anew
    is_padded = vocab_size == 128 or kernels.jax.default_backend() == "gpu"
    assert ("tensor<3x128x" in text) == is_padded
