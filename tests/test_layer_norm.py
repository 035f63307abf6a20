"""Layer norm against its definition and against automatic differentiation of Flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import layer_norm
from layer_norm import EPSILON, LayerNorm

WIDTH = 48


def norms():
    """Return ours and Flax's with the same, not trivial parameters."""
    ours, flax = LayerNorm(WIDTH, nnx.Rngs(0)), nnx.LayerNorm(WIDTH, epsilon=EPSILON, rngs=nnx.Rngs(0))
    for number, name in enumerate(("scale", "bias")):
        value = jax.random.normal(jax.random.key(number), (WIDTH,))
        getattr(ours, name)[...], getattr(flax, name)[...] = value, value
    return ours, flax


@pytest.fixture(params=["cpu", "gpu"])
def platform(request, monkeypatch):
    """Take the sums of either platform."""
    monkeypatch.setattr(layer_norm.jax, "default_backend", lambda: request.param)


@pytest.mark.parametrize("shape", [(5, WIDTH), (2, 3, WIDTH)])
def test_layer_norm_and_its_gradients_are_flax_s(platform, shape):
    x, slopes = jax.random.normal(jax.random.key(3), (2, *shape)) * 3 + 1

    def value_and_gradients(norm):
        graph, state = nnx.split(norm)
        value, gradients = jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, x)
        return value, *gradients(slopes)

    for ours, expected in zip(*(jax.tree.leaves(value_and_gradients(norm)) for norm in norms())):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_row_of_equal_numbers_gives_the_bias(platform):
    ours, _ = norms()
    np.testing.assert_allclose(ours(jnp.full((1, WIDTH), 7.0))[0], ours.bias[...], atol=1e-3)


def test_a_large_mean_does_not_hide_the_deviations(platform):
    x = np.float32(np.random.default_rng(0).normal(size=(1, WIDTH)) + 3000)
    exact = (np.float64(x) - np.float64(x).mean()) / np.sqrt(np.float64(x).var() + EPSILON)
    ours = LayerNorm(WIDTH, nnx.Rngs(0))(jnp.array(x))
    np.testing.assert_allclose(ours, exact, atol=2e-3)


def test_the_parameters_have_the_names_of_flax():
    ours, flax = norms()
    assert jax.tree.structure(nnx.state(ours)) == jax.tree.structure(nnx.state(flax))
