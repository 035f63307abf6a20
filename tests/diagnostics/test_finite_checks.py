import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import CONTEXT_LENGTH, complaint, random_tokens, tiny_model

from outside_in.data.loader import TokenStream
from outside_in.diagnostics.finite_checks import make_checks
from outside_in.training import setup

pytestmark = pytest.mark.slow

RARE = 100  # a token of the last microbatch alone
KEY = jax.random.key(0)


class Fragile(nnx.Module):
    """A feed-forward layer that does not bear large numbers."""

    def __call__(self, x):
        return jnp.where((jnp.abs(x) > 500).any(), jnp.nan, 0.0) * x


@pytest.fixture(scope="module")
def batch():
    tokens = random_tokens(4 * 2 * CONTEXT_LENGTH + 1) % RARE
    tokens[-3] = RARE
    [batch] = TokenStream(jax.device_put(tokens), (4, 2, CONTEXT_LENGTH), "next-token", 0, shuffle=False).calls(0)
    return batch._replace(position=np.array([6, 0], np.uint32))


def with_large_row(**changes):
    model = tiny_model(pre_norm=False, n_layers=2, **changes)
    model.token_embedding.embedding[RARE] = jnp.full(32, 1000.0)
    return model


def break_parameter(model):
    model.head.embedding[7] = jnp.full(32, jnp.inf)


def break_block(model):
    model.blocks[1].feed_forward = Fragile()


def break_logits(model):
    model.head.embedding[RARE] = jnp.full(32, 3e38)


BREAKS = {
    "parameter head.embedding": (0, break_parameter),
    "hidden states after block 1": (3, break_block),
    "logits": (0, break_logits),
}


@pytest.mark.parametrize("place", BREAKS)
def test_the_first_bad_place_is_named_with_its_step_and_microbatch(batch, place):
    microbatch, change = BREAKS[place]
    model = with_large_row()
    change(model)
    assert make_checks(model)(model, batch, KEY) == f"global step 7, microbatch {microbatch}: {place}: not finite"


def test_a_gradient_that_is_not_finite_is_named_though_all_else_is(batch):
    class Corner(nnx.Module):
        def __call__(self, x):
            return jnp.sqrt(jnp.abs(x) * 0)  # 0, with a slope of 0 · infinity

    model = tiny_model(n_layers=1)
    model.blocks[0].feed_forward = Corner()
    found = make_checks(model)(model, batch, KEY)
    assert found.startswith("global step 7, microbatch 0: gradient of blocks.0.feed_forward_norm")


@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_norm_that_overflows_is_named_where_the_backward_pass_first_leaves_float32(batch, microbatches):
    model = tiny_model(n_layers=2)
    model.blocks[1].attention_norm.scale[...] *= 1e-22  # its gradient is as large as what it makes small
    model.blocks[1].attention.query_key_value.kernel[...] *= 1e22
    batch = batch._replace(inputs=batch.inputs[:microbatches], targets=batch.targets[:microbatches])
    found = make_checks(model)(model, batch, KEY)
    assert found == "global step 7: gradient of blocks.1.attention_norm.bias: its norm overflows float32"


@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_a_sound_model_passes_and_stays_as_it_is(batch, drop_rate):
    model = with_large_row(drop_rate=drop_rate)
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    assert make_checks(model)(model, batch, KEY) is None
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(nnx.state(model, nnx.Param))))


def test_a_run_with_checks_stops_where_it_would_have_rejected(call_program, make_run, monkeypatch):
    create = setup.model_of

    def poisoned(*arguments):
        model = create(*arguments)
        model.output_norm.bias[3] = jnp.nan
        return model

    run = make_run()
    assert call_program("train", run, "--debug-checks").returncode == 0
    monkeypatch.setattr(setup, "model_of", poisoned)
    line = complaint(call_program("train", make_run("poisoned"), "--debug-checks"), code=1)
    assert "global step 1, microbatch 0: parameter output_norm.bias: not finite" in line
