import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import CONTEXT_LENGTH, ROOT, VOCAB_SIZE, logits, random_tokens, tiny_model, tiny_model_config

from model import GPTModel, count_parameters
from outside_in.config import ModelConfig
from outside_in.config_files import load_config
from outside_in.layers.activations import gelu, relu2, swiglu
from outside_in.layers.dropout import Dropout

GPT2_SMALL = {"vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12}
KEYS = jax.random.split(jax.random.key(1), 2)
SHELL = {"n_layers": 0, "position_embedding": False, "output_norm": False}


def tokens_BT(batch=2, length=CONTEXT_LENGTH, seed=0):
    return random_tokens(batch * length, seed).reshape(batch, length)


def numpy_gpt2(model, tokens):
    """GPT-2's forward pass in float64 from the paper's description, one sequence, one head at a time."""
    weights = {".".join(map(str, path)): np.float64(value[...]) for path, value in nnx.to_flat_state(nnx.state(model))}
    config = model.config

    def linear(x, name):
        return x @ weights[f"{name}.kernel"] + weights.get(f"{name}.bias", 0.0)

    def norm(x, name):
        if f"{name}.scale" not in weights:
            return x
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5)
        return scaled * weights[f"{name}.scale"] + weights[f"{name}.bias"]

    def attention(x, name):
        mixed = np.zeros_like(x)
        width = config.emb_dim // config.n_heads
        queries, keys, values = np.split(linear(x, f"{name}.query_key_value"), 3, axis=-1)
        for head in range(config.n_heads):
            part = slice(head * width, (head + 1) * width)
            for now in range(len(x)):
                scores = keys[: now + 1, part] @ queries[now, part] / np.sqrt(width)
                shares = np.exp(scores - scores.max())
                mixed[now, part] = shares / shares.sum() @ values[: now + 1, part]
        return linear(mixed, f"{name}.output")

    def feed_forward(x, name):
        x = linear(x, f"{name}.expand")
        gelu = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        return linear(gelu, f"{name}.project")

    x = weights["token_embedding.embedding"][tokens]
    if config.position_embedding:
        x = x + weights["position_embedding.embedding"][: len(tokens)]
    keep = 1.0 if config.shortcut else 0.0
    for layer in range(config.n_layers):
        block = f"blocks.{layer}"
        x = keep * x + attention(norm(x, f"{block}.attention_norm"), f"{block}.attention")
        if config.feed_forward:
            x = keep * x + feed_forward(norm(x, f"{block}.feed_forward_norm"), f"{block}.feed_forward")
    x = norm(x, "output_norm")
    head = weights["token_embedding.embedding" if config.tied_head else "head.embedding"]
    return x @ head.T


def with_larger_weights(model):
    """Scale the parameters up and the biases away from 0, so that every part of the model matters."""
    for seed, (_, parameter) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.Param))):
        noise = jax.random.normal(jax.random.key(seed), parameter.shape)
        parameter[...] = 5 * parameter[...] + 0.1 * noise
    return model


SWITCHES = [
    {"n_layers": 2},
    {"qkv_bias": True},
    {"position_embedding": False},
    {"pre_norm": False},
    {"shortcut": False},
    {"feed_forward": False},
    {"output_norm": False},
    {"attention_output_bias": False},
    {"tied_head": True},
    SHELL,
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_the_forward_pass_is_the_one_of_a_plain_numpy_gpt2(switches):
    model = with_larger_weights(tiny_model(**switches))
    tokens = tokens_BT()
    expected = np.stack([numpy_gpt2(model, sequence) for sequence in tokens])
    np.testing.assert_allclose(logits(model, tokens), expected, rtol=2e-4, atol=2e-4)


def test_no_position_sees_a_later_one():
    model = with_larger_weights(tiny_model(n_layers=2))
    x = jax.random.normal(jax.random.key(0), (1, CONTEXT_LENGTH, 32))
    graph, state = nnx.split(model.blocks)

    def output_at(x, position):
        for block in nnx.merge(graph, state):
            x = block(x, jnp.arange(CONTEXT_LENGTH), None)
        return x[0, position].sum()

    gradient = jax.jit(jax.grad(output_at))
    for position in (0, 5, CONTEXT_LENGTH - 1):
        influence = np.abs(gradient(x, position)[0]).sum(axis=-1)
        assert (influence[: position + 1] > 0).all()
        assert (influence[position + 1 :] == 0).all()


@pytest.mark.parametrize(("output_bias", "expected"), [(True, 163_009_536), (False, 163_000_320)])
def test_gpt2_small_has_the_published_number_of_parameters(output_bias, expected):
    assert count_parameters(ModelConfig(**GPT2_SMALL, qkv_bias=False, attention_output_bias=output_bias)) == expected


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("gpt2-124m", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_the_shipped_shapes_of_openais_models_have_their_numbers_of_parameters(run, expected):
    assert count_parameters(load_config(ROOT / "runs" / run / "model.json", ModelConfig)) == expected


@pytest.mark.parametrize("n_layers", [1, 12])
def test_initial_weights_have_gpt2s_standard_deviations(n_layers):
    config = ModelConfig(**GPT2_SMALL | {"n_layers": n_layers, "vocab_size": 1000, "emb_dim": 384}, qkv_bias=True)
    model = GPTModel(config, nnx.Rngs(1))
    block = model.blocks[n_layers - 1]
    for weight in (model.token_embedding.embedding, block.feed_forward.expand.kernel, model.head.embedding):
        assert np.std(weight[...]) == pytest.approx(0.02, rel=0.02)
    for weight in (block.attention.output.kernel, block.feed_forward.project.kernel):
        assert np.std(weight[...]) == pytest.approx(0.02 / np.sqrt(2 * n_layers), rel=0.02)
    assert not np.any(block.attention.query_key_value.bias[...])


@pytest.mark.parametrize(
    ("switches", "tolerance"),
    [(SHELL, 0.01), (SHELL | {"output_norm": True}, 0.2), ({}, 0.2), ({"pre_norm": False}, 0.2)],
    ids=str,
)
def test_the_first_loss_is_that_of_a_uniform_guess(switches, tolerance):
    shrunk = {"vocab_size": 5000, "context_length": 64, "n_layers": 2}
    config = ModelConfig(**GPT2_SMALL | shrunk | switches, qkv_bias=False)
    tokens = np.random.default_rng(0).integers(0, 5000, (1, 64))
    log_shares = jax.nn.log_softmax(logits(GPTModel(config, nnx.Rngs(0)), tokens)[0])
    # the mean over every target at every position: what random targets cost
    assert -log_shares.mean() == pytest.approx(np.log(5000), abs=tolerance)


def test_dropout_is_off_unless_asked_for():
    model = tiny_model(drop_rate=0.5)
    tokens = tokens_BT()
    np.testing.assert_array_equal(logits(model, tokens), logits(tiny_model(), tokens))
    assert np.abs(logits(model, tokens, KEYS) - logits(model, tokens)).max() > 0.01


def test_a_sequence_has_its_masks_whatever_it_comes_with():
    model, tokens = tiny_model(drop_rate=0.5, n_layers=2), tokens_BT()
    both = logits(model, tokens, KEYS)
    for number in (0, 1):
        alone = logits(model, tokens[number : number + 1], KEYS[number : number + 1])
        np.testing.assert_allclose(alone[0], both[number], rtol=1e-4, atol=1e-5)
    assert np.abs(logits(model, tokens, KEYS[::-1]) - both).max() > 0.01


def test_every_use_of_dropout_draws_other_masks():
    dropout, x = Dropout(KEYS), jnp.ones((2, 50))
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    assert (first != second).any() and (first[0] != first[1]).any()
    np.testing.assert_array_equal(Dropout(KEYS)(x, 0.5), first)
    assert set(np.unique(first)) == {0.0, 2.0}


def test_dropout_is_a_function_of_its_keys():
    model, tokens = tiny_model(drop_rate=0.5), tokens_BT()
    first, again, other = (logits(model, tokens, jax.random.split(jax.random.key(seed), 2)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_dropout_keeps_the_mean_of_the_hidden_states():
    model = tiny_model(drop_rate=0.25, **SHELL)
    tokens = tokens_BT()
    graph, state = nnx.split(model)

    def dropped(seed):
        keys_B = jax.random.split(jax.random.key(seed), len(tokens))
        return nnx.merge(graph, state).hidden_states(tokens, Dropout(keys_B))

    samples = jax.jit(jax.vmap(dropped))(jnp.arange(4000))
    np.testing.assert_allclose(samples.mean(0), model.hidden_states(tokens), atol=4 * 0.06 * np.sqrt(1 / 3 / 4000))
    assert np.mean(samples == 0) == pytest.approx(0.25, abs=0.01)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters_and_norms():
    model = GPTModel(tiny_model_config(), nnx.Rngs(0), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    dtypes = {name: hidden.dtype for name, hidden in model.stages(tokens_BT())}
    assert dtypes == {"the embedding": jnp.bfloat16, "block 0": jnp.bfloat16, "the output norm": jnp.float32}
    half = logits(model, tokens_BT())
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(half), logits(tiny_model(), tokens_BT()), atol=0.01)


def test_a_layer_that_returns_float32_leaves_the_residual_stream_in_bfloat16():
    model = GPTModel(tiny_model_config(), nnx.Rngs(0), dtype=jnp.bfloat16)
    model.blocks[0].feed_forward = lambda x: 0.1 * x.astype(jnp.float32)
    assert dict(model.stages(tokens_BT()))["block 0"].dtype == jnp.bfloat16


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(AssertionError, match="context_length"):
        tiny_model()(tokens_BT(length=CONTEXT_LENGTH + 1))


def test_shorter_sequences_give_the_logits_of_the_longer_ones_beginning():
    model = with_larger_weights(tiny_model(n_layers=2))
    np.testing.assert_allclose(
        logits(model, tokens_BT()[:, :5]), logits(model, tokens_BT())[:, :5], rtol=1e-4, atol=1e-4
    )


def test_logits_cover_the_vocabulary():
    assert logits(tiny_model(), tokens_BT()).shape == (2, CONTEXT_LENGTH, VOCAB_SIZE)


def test_token_ids_of_another_form_are_refused():
    model = tiny_model()
    with pytest.raises(AssertionError, match=r"float32.*token ids"):
        model(jnp.zeros((2, 4)))
    with pytest.raises(AssertionError, match=r"shape \(4,\).*expected as \(B, T\)"):
        model(jnp.zeros(4, int))


def test_a_layer_that_changes_the_shape_is_refused_with_both_sides():
    model = tiny_model()
    model.blocks[0].feed_forward = lambda x: x[..., :3]
    with pytest.raises(AssertionError, match=r"\(2, 4, 32\), \(2, 4, 3\).*what a layer adds"):
        model(jnp.zeros((2, 4), int))


def test_the_stages_are_named_and_the_last_is_what_the_head_reads():
    model = tiny_model(n_layers=2)
    tokens = jnp.arange(8).reshape(2, 4)
    names, states = zip(*model.stages(tokens))
    assert names == ("the embedding", "block 0", "block 1", "the output norm")
    np.testing.assert_array_equal(states[-1], model.hidden_states(tokens))
    bare = tiny_model(n_layers=0, output_norm=False)
    assert [name for name, _ in bare.stages(tokens)] == ["the embedding"]


@pytest.mark.parametrize(
    ("activation", "definition", "inputs"),
    [
        (gelu, lambda x: jax.nn.gelu(x, approximate=True), 1),
        (relu2, lambda x: jnp.maximum(x, 0) ** 2, 1),
        (swiglu, lambda gate, x: gate / (1 + jnp.exp(-gate)) * x, 2),
    ],
)
def test_activations_keep_nothing_but_their_inputs_for_the_backward_pass(activation, definition, inputs):
    arrays = [jnp.linspace(-3, 3 + i, 12).reshape(3, 4) for i in range(inputs)]
    value, vjp = jax.vjp(activation, *arrays)
    assert [kept.shape for kept in jax.tree.leaves(vjp)] == [x.shape for x in arrays]
    expected, expected_vjp = jax.vjp(definition, *arrays)
    np.testing.assert_allclose([value, *vjp(value)], [expected, *expected_vjp(value)], rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_mean_of_the_losses_of_the_tokens():
    model, tokens = with_larger_weights(tiny_model()), tokens_BT(length=CONTEXT_LENGTH + 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    log_shares = jax.nn.log_softmax(logits(model, inputs))
    expected = -np.take_along_axis(np.asarray(log_shares), targets[..., None].astype(int), axis=-1)[..., 0]
    losses = model.token_losses(inputs, targets)
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)
    assert model.loss(inputs, targets) == pytest.approx(float(losses.mean()), rel=1e-6)
