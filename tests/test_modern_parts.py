"""The parts that GPT-2 lacks, each and all together: by their definitions, and in all that a run does with a model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import CONTEXT_LENGTH, VOCAB_SIZE, complaint, logits, random_tokens, tiny_model, tiny_model_config
from modern import ALL, CASES, LAYERS, numpy_logits, with_larger_weights

from model import GPTModel, count_parameters, create_model
from outside_in.config import ModelConfig
from outside_in.inference.evaluation import windowed_losses
from outside_in.inference.generation import generate
from outside_in.layers.dropout import Dropout
from outside_in.loss import cross_entropy
from outside_in.reports.flops import flops_per_token
from outside_in.storage import metrics
from outside_in.train_step import loss_and_gradient
from outside_in.weights import named_arrays

slow = pytest.mark.slow
EACH = [pytest.param(case, marks=() if case == "all" else slow) for case in CASES]


def model_of(case, **options):
    return with_larger_weights(tiny_model(**CASES[case], **options))


def tokens_BT(batch=2, length=CONTEXT_LENGTH):
    return random_tokens(batch * length).reshape(batch, length)


@pytest.mark.parametrize("case", CASES)
def test_the_forward_pass_is_that_of_the_definition(case):
    model, tokens = model_of(case), tokens_BT()
    expected = np.stack([numpy_logits(model, sequence) for sequence in tokens])
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(model, tokens), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("case", EACH)
def test_no_position_sees_a_later_one_or_one_before_its_window(case):
    model, tokens = model_of(case), tokens_BT(1)
    x = jax.random.normal(jax.random.key(0), (1, CONTEXT_LENGTH, 32))
    graph, state = nnx.split(model.blocks)
    given = {"tokens_BT": tokens} if model.config.value_embeddings else {}

    def output_at(x, position):
        for block in nnx.merge(graph, state):
            x = block(x, jnp.arange(CONTEXT_LENGTH), None, **given)
        return (x[0, position] ** 2).sum()

    gradient = jax.jit(jax.grad(output_at))
    windows = [model.config.window(layer) for layer in range(LAYERS)]
    reach = CONTEXT_LENGTH if None in windows else sum(window - 1 for window in windows)
    for position in (0, 6, CONTEXT_LENGTH - 1):
        influence = np.abs(gradient(x, position)[0]).sum(axis=-1)
        first = max(0, position - reach)
        assert (influence[first : position + 1] > 0).all()
        assert (influence[position + 1 :] == 0).all() and (influence[:first] == 0).all()


@pytest.mark.parametrize("case", ["values", "all"])
def test_a_later_token_changes_nothing_before_it(case):
    model, tokens = model_of(case), tokens_BT()
    changed = tokens.copy()
    changed[:, 9:] = (changed[:, 9:] + 1) % VOCAB_SIZE
    np.testing.assert_array_equal(logits(model, changed)[:, :9], logits(model, tokens)[:, :9])
    assert (logits(model, changed)[:, 9:] != logits(model, tokens)[:, 9:]).any(axis=-1).all()


@pytest.mark.parametrize("case", EACH)
@pytest.mark.parametrize("num_tokens", [6, 24])
def test_completions_with_a_cache_are_those_without(case, num_tokens):
    """Also when the text outgrows the context, whose second half is then read again."""
    model, text = model_of(case), random_tokens(5).tolist()
    found = generate(model, text, num_tokens=num_tokens)[0].tolist()
    assert num_tokens == 6 or len(set(found)) > 2
    for token in found:
        text = text[-(CONTEXT_LENGTH // 2) :] if len(text) > CONTEXT_LENGTH else text
        padded = np.array([text + [0] * (CONTEXT_LENGTH - len(text))])
        assert int(logits(model, padded)[0, len(text) - 1].argmax()) == token
        text.append(token)


@pytest.mark.parametrize("case", EACH)
def test_the_gradient_that_trains_is_that_of_the_plain_loss(case):
    model, tokens = model_of(case), tokens_BT(2, CONTEXT_LENGTH + 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    graph, params = nnx.split(model)

    def plain_loss(params):
        return cross_entropy(nnx.merge(graph, params)(inputs), targets)

    expected, expected_grads = jax.jit(jax.value_and_grad(plain_loss))(params)
    loss, grads = nnx.jit(loss_and_gradient)(model, inputs, targets, None)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    expected_grads = named_arrays(expected_grads)
    for name, grad in named_arrays(grads).items():
        scale = float(jnp.abs(expected_grads[name]).max())
        assert scale > 0, name
        np.testing.assert_allclose(grad, expected_grads[name], rtol=1e-3, atol=1e-5 * scale, err_msg=name)
    judged = np.concatenate(list(windowed_losses(model, tokens.reshape(-1)[: CONTEXT_LENGTH + 1])))
    assert judged.mean() == pytest.approx(float(model.loss(inputs[:1], targets[:1])), rel=1e-5)


@pytest.mark.parametrize("case", ["grouped", "window", "all"])
def test_attention_that_drops_weights_is_the_same_attention(case):
    model, tokens = model_of(case, drop_rate=1e-6), tokens_BT()
    keys = jax.random.split(jax.random.key(1), 2)
    np.testing.assert_allclose(logits(model, tokens, keys), logits(model, tokens), rtol=1e-3, atol=1e-3)
    assert jax.eval_shape(lambda: model(tokens, Dropout(keys))).shape == (2, CONTEXT_LENGTH, VOCAB_SIZE)


@pytest.mark.parametrize("case", EACH)
def test_half_precision_trains_with_a_residual_stream_in_it(case):
    model, tokens = tiny_model(**CASES[case], dtype=jnp.bfloat16), tokens_BT()
    dtypes = {name: hidden.dtype for name, hidden in model.stages(tokens)}
    assert {dtype for name, dtype in dtypes.items() if "norm" not in name} == {jnp.dtype("bfloat16")}
    assert dtypes["the output norm"] == jnp.float32
    single = tiny_model(**CASES[case])
    np.testing.assert_allclose(np.float32(logits(model, tokens)), logits(single, tokens), atol=0.06)
    loss, grads = nnx.jit(loss_and_gradient)(model, tokens, tokens, None)
    assert loss == pytest.approx(float(single.loss(tokens, tokens)), abs=0.02)
    assert all(jnp.isfinite(grad).all() and grad.dtype == jnp.float32 for grad in jax.tree.leaves(grads))


def test_norms_rotations_and_the_soft_cap_are_computed_in_float32():
    config = tiny_model_config(**CASES["all"])
    text = str(jax.make_jaxpr(lambda: GPTModel(config, nnx.Rngs(0), dtype=jnp.bfloat16)(tokens_BT()))())
    assert all(f"= {operation}" in text for operation in ("rsqrt", "cos", "sin", "tanh"))
    assert not [
        line
        for line in text.splitlines()
        if ":bf16" in line and any(f"= {o}" in line for o in ("rsqrt", "cos", "tanh"))
    ]


def test_blocks_that_are_computed_again_have_the_same_gradients():
    tokens = tokens_BT()
    plain, again = (
        create_model(tiny_model_config(**CASES["all"]), 0, 0.0, "float32", None, r) for r in ("none", "blocks")
    )
    results = [nnx.jit(loss_and_gradient)(model, tokens, tokens, None) for model in (plain, again)]
    for one, other in zip(*(jax.tree.leaves(result) for result in results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", EACH)
def test_the_first_loss_is_near_that_of_a_uniform_guess(case):
    tokens = tokens_BT()
    assert float(tiny_model(**CASES[case]).loss(tokens, tokens)) == pytest.approx(np.log(VOCAB_SIZE), abs=0.1)


def test_parts_that_are_off_leave_nothing_in_the_step():
    """GPT-2 spelled out, with the new keys, is the same program as GPT-2 in the words of old files."""
    tokens = tokens_BT()

    def step(**changes):
        return nnx.jit(loss_and_gradient).lower(tiny_model(**changes), tokens, tokens, None).as_text()

    spelled_out = {"position": "learned", "norm": "layer", "feed_forward": "gelu", "feed_forward_dim": 4 * 32}
    assert step(**spelled_out, n_kv_heads=4, bias=True) == step()
    assert step(norm="rms") != step()
    assert not any(operation in step() for operation in ("cosine", "sine", "logistic"))


# Figures by hand

D, F, V, T = 768, 2048, 50257, 1024
SMALL = {"vocab_size": V, "context_length": T, "emb_dim": D, "n_heads": 12, "n_layers": 12, "qkv_bias": False}
BLOCK = 12 * D**2 + D + 4 * D + D + 4 * D  # matrices; biases of the output, of both feed-forward layers; two norms
TABLES = 2 * V * D
GPT2 = TABLES + T * D + 12 * BLOCK + 2 * D
MODERN = {
    "position": "rope",
    "norm": "rms",
    "feed_forward": "swiglu",
    "qk_norm": True,
    "n_kv_heads": 4,
    "bias": False,
    "value_embeddings": True,
    "sliding_window": 256,
    "window_pattern": "SSSL",
}
MODERN_BLOCK = D * (D + 2 * 256) + D * D + 3 * D * F + 2 * D + 2 * 64


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({}, GPT2),
        ({"position": "rope"}, GPT2 - T * D),
        ({"position": "none"}, GPT2 - T * D),
        ({"norm": "rms"}, GPT2 - 25 * D),
        ({"feed_forward": "relu2"}, GPT2),
        ({"feed_forward": "swiglu"}, GPT2 + 12 * (3 * D * F + F + F - 8 * D**2 - 4 * D)),
        ({"feed_forward_dim": 100}, GPT2 + 12 * (2 * 100 * D + 100 - 8 * D**2 - 4 * D)),
        ({"qk_norm": True}, GPT2 + 12 * 2 * 64),
        ({"n_kv_heads": 4}, GPT2 - 12 * 2 * D * 8 * 64),
        ({"bias": False}, GPT2 - 12 * (D + 4 * D + D)),
        ({"value_embeddings": True}, GPT2 + 6 * (V * D + 1)),
        ({"sliding_window": 256, "logit_soft_cap": 15, "embedding_scale": True}, GPT2),
        (MODERN, TABLES + 12 * MODERN_BLOCK + 6 * (V * 256 + 1) + D),
    ],
    ids=str,
)
def test_parameters_are_as_many_as_by_hand(changes, parameters):
    assert count_parameters(ModelConfig(**SMALL | changes)) == parameters


@pytest.mark.parametrize(
    ("changes", "flops"),
    [
        ({"position": "rope", "norm": "rms", "qk_norm": True, "bias": False, "value_embeddings": True}, 0),
        ({"feed_forward": "swiglu"}, 0),  # three matrices of two thirds
        ({"feed_forward": "swiglu", "feed_forward_dim": 4 * D}, 6 * 12 * 4 * D**2),
        ({"feed_forward_dim": 100}, 6 * 12 * (2 * 100 * D - 8 * D**2)),
        ({"n_kv_heads": 4}, -6 * 12 * 2 * D * 8 * 64),
        ({"sliding_window": 256}, -12 * 12 * D * 768),
        ({"sliding_window": 256, "window_pattern": "SSSL"}, -9 * 12 * D * 768),
        ({"sliding_window": 2048}, 0),
    ],
    ids=str,
)
def test_operations_are_as_many_as_by_hand(changes, flops):
    assert flops_per_token(ModelConfig(**SMALL | changes)) - flops_per_token(ModelConfig(**SMALL)) == flops


def test_every_second_block_to_the_last_has_a_value_embedding():
    for layers, expected in ((1, [0]), (4, [1, 3]), (5, [0, 2, 4])):
        model = tiny_model(n_layers=layers, value_embeddings=True)
        assert [i for i, block in enumerate(model.blocks) if block.attention.value_embedding] == expected


def test_windows_follow_their_pattern_over_and_over():
    config = tiny_model_config(n_layers=5, sliding_window=4, window_pattern="SSL")
    assert [config.window(layer) for layer in range(5)] == [4, 4, None, 4, 4]
    assert [tiny_model_config(sliding_window=4).window(layer) for layer in range(2)] == [4, 4]
    assert tiny_model_config().window(0) is None


# Runs

RUN = {"model": ALL | {"n_layers": LAYERS}}


@slow
def test_the_preflight_counts_what_the_model_has(call_program, make_run):
    finished = call_program("train", make_run(**RUN), "--check")
    assert finished.returncode == 0, finished.stderr
    head, kv = 8, 16
    block = 32 * (32 + 2 * kv) + 32 * 32 + 3 * 32 * 40 + 2 * 32 + 2 * head
    parameters = 2 * VOCAB_SIZE * 32 + 2 * block + VOCAB_SIZE * kv + 1 + 32
    assert f"model   {parameters:,} parameters: 2 layers, 4 heads (2 of keys and values), width 32" in finished.stdout
    products = 2 * (32 * (32 + 2 * kv) + 32 * 32 + 3 * 32 * 40) + VOCAB_SIZE * 32
    flops = 6 * products + 12 * 32 * (5 + CONTEXT_LENGTH)
    assert f"flops   {flops / 1e6:,.1f} MFLOP per token" in finished.stdout
    assert "or the window where a layer has one" in finished.stdout


@slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_of_all_parts_trains_validates_resumes_and_is_evaluated(call_program, make_run, precision):
    run = make_run(**RUN, train={"precision": precision, "drop_rate": 0.1})
    finished = call_program("train", run)
    assert finished.returncode == 0, finished.stderr
    records = metrics.read(run / "metrics.jsonl")
    assert all(record["loss"] == pytest.approx(np.log(VOCAB_SIZE), abs=0.2) for record in records)
    again = call_program("train", run, "--from", "best")
    assert again.returncode == 0, again.stderr
    table = run / "table.json"
    judged = call_program("evaluate", run / "checkpoints/latest", "--tokens", 64, "--json", table)
    assert judged.returncode == 0, judged.stderr
    [model] = json.loads(table.read_text())["models"]
    tolerance = 1e-4 if precision == "float32" else 2e-2
    assert model["loss"] == pytest.approx(metrics.read(run / "metrics.jsonl")[-1]["val_loss"], rel=tolerance)


@slow
def test_a_model_of_all_parts_learns_a_batch_by_heart(call_program, make_run):
    finished = call_program("train", make_run(**RUN), "--overfit-one-batch")
    assert finished.returncode == 0, finished.stderr
    assert "passed: loss 0.0" in finished.stdout


@slow
def test_a_part_cannot_be_added_within_a_run(call_program, make_run):
    run = make_run()
    assert call_program("train", run).returncode == 0
    model = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(model | {"qk_norm": True}))
    assert "qk_norm: false → true: this cannot change within a run" in complaint(call_program("train", run))
