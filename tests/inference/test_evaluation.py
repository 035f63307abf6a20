import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_tokens, tiny_model

from outside_in.data.loader import TokenStream
from outside_in.inference.evaluation import mean_loss


def reference_loss(model, tokens, batch_shape, objective):
    """Mean of -log softmax in float64 over the sequences that fill whole batches, from the model's logits."""
    length = batch_shape[-1]
    per_batch = int(np.prod(batch_shape))
    num_sequences = (len(tokens) - 1) // per_batch * per_batch // length
    inputs = np.array([tokens[i * length : (i + 1) * length] for i in range(num_sequences)])
    shift = 0 if objective == "a-to-a" else 1
    targets = np.array([tokens[i * length + shift : (i + 1) * length + shift] for i in range(num_sequences)])
    logits = np.float64(model(inputs))
    logits -= logits.max(-1, keepdims=True)
    log_shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_shares, targets[..., None].astype(int), -1).mean()


@pytest.fixture(scope="module")
def model():
    model = tiny_model(n_layers=0, drop_rate=0.5)  # quick to compile; dropout must be off
    model.head.embedding[...] *= 20  # losses that differ from token to token
    return model


@pytest.mark.parametrize("objective", ["next-token", "a-to-a"])
@pytest.mark.parametrize(
    ("num_tokens", "batch_shape"),
    [(33, (1, 2, 16)), (64, (1, 2, 16)), (96, (1, 2, 16)), (97, (1, 2, 16)), (200, (2, 2, 16)), (50, (1, 2, 8))],
    ids=str,
)
def test_the_mean_loss_is_that_of_numpy_over_all_whole_batches(model, num_tokens, batch_shape, objective):
    tokens = random_tokens(num_tokens)
    stream = TokenStream(jnp.asarray(tokens), batch_shape, objective, seed=0, shuffle=False)
    loss = mean_loss(model, stream)
    assert isinstance(loss, float)
    assert loss == pytest.approx(reference_loss(model, tokens, batch_shape, objective), rel=1e-5)
    assert mean_loss(model, stream) == loss


def test_a_loss_that_is_not_finite_is_not_hidden(model):
    broken = tiny_model(n_layers=0)
    broken.head.embedding[0, 0] = jnp.nan
    assert np.isnan(
        mean_loss(broken, TokenStream(jnp.asarray(random_tokens(33)), (1, 2, 16), "next-token", seed=0, shuffle=False))
    )
