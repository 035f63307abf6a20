import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loss import cross_entropy


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
