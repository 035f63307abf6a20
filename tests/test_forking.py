"""What people edit in model.py is what trains, validates, is judged and completes text.

Each edit is what a forker would write. It is compared with automatic differentiation of the plain loss over all logits.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import CONTEXT_LENGTH, VOCAB_SIZE, complaint, random_tokens, tiny_model_config
from test_model import with_larger_weights

import model as model_module
from model import Block, CausalSelfAttention, GPTModel
from outside_in.config import MeshConfig
from outside_in.data.loader import TokenStream, place_batch
from outside_in.diagnostics.finite_checks import make_checks
from outside_in.huggingface.gpt2_names import export_weights
from outside_in.inference.evaluation import mean_loss, windowed_losses
from outside_in.inference.generation import generate
from outside_in.inference.load import load_saved_model
from outside_in.layers.kernels import causal_attention
from outside_in.loss import chunked_cross_entropy, cross_entropy
from outside_in.runtime.mesh import make_mesh, place
from outside_in.storage import metrics
from outside_in.train_step import backward_order, loss_and_gradient, mean_gradient
from outside_in.weights import host_arrays, named_arrays, save_weights

pytestmark = pytest.mark.slow

SEED_KEY = jax.random.key(7)


class ScaledEmbedding(GPTModel):
    def embed(self, tokens_BT):
        return super().embed(tokens_BT) * 32**0.5


class EmbeddingGain(GPTModel):
    def __init__(self, config, rngs, **options):
        super().__init__(config, rngs, **options)
        self.gain = nnx.Param(jnp.linspace(0.5, 1.5, config.emb_dim))

    def embed(self, tokens_BT):
        return super().embed(tokens_BT) * self.gain[...][None, None]


class SoftCap(GPTModel):
    def unembed(self, hidden_BTD):
        return 3 * jnp.tanh(super().unembed(hidden_BTD) / 3)


class LogitBias(GPTModel):
    def __init__(self, config, rngs, **options):
        super().__init__(config, rngs, **options)
        self.logit_bias = nnx.Param(jnp.sin(jnp.arange(config.vocab_size)))

    def unembed(self, hidden_BTD):
        return super().unembed(hidden_BTD) + self.logit_bias[...][None, None]


class Temperature(GPTModel):
    def unembed(self, hidden_BTD):
        return super().unembed(hidden_BTD) / 0.7


class LearnedScale(GPTModel):
    def __init__(self, config, rngs, **options):
        super().__init__(config, rngs, **options)
        self.logit_scale = nnx.Param(jnp.array(1.5))

    def unembed(self, hidden_BTD):
        return super().unembed(hidden_BTD) * self.logit_scale[...]


class DeepHead(GPTModel):
    """Two tables in the head, one of them looked up by a constant of whole numbers, and a norm between them."""

    def __init__(self, config, rngs, **options):
        super().__init__(config, rngs, **options)
        self.inner = nnx.Linear(config.emb_dim, config.emb_dim, rngs=rngs)
        self.order = nnx.Variable(jnp.arange(config.vocab_size)[::-1])

    def unembed(self, hidden_BTD):
        return super().unembed(jnp.tanh(self.inner(hidden_BTD)))[..., self.order[...]]


class SharedBlocks(GPTModel):
    def __init__(self, config, rngs, **options):
        super().__init__(config, rngs, **options)
        self.blocks = nnx.List([self.blocks[0]] * 2)


class RecurrentBlocks(GPTModel):
    """Every block twice in a row, so that attention is called more often than there are blocks."""

    def stages(self, tokens_BT, dropout=None, *, first_position=0, **options):
        x_BTD = self.embed(tokens_BT) + self.position_embedding(first_position + jnp.arange(tokens_BT.shape[1]))[None]
        for block in self.blocks:
            for _ in range(2):
                x_BTD = block(x_BTD, None, dropout, **options)
        yield "the blocks", x_BTD
        yield "the output norm", self.output_norm(x_BTD)


class AuxiliaryLoss(GPTModel):
    def loss(self, inputs_BT, targets_BT, dropout=None):
        return super().loss(inputs_BT, targets_BT, dropout) + self.auxiliary(inputs_BT, dropout)

    def auxiliary(self, inputs_BT, dropout=None):
        return 0.1 * (self.hidden_states(inputs_BT, dropout) ** 2).mean() + 0.01 * (self.embed(inputs_BT) ** 2).sum()


class SecondHead(GPTModel):
    """Also predicts the token after the next, with a head of its own."""

    def __init__(self, config, rngs, **options):
        super().__init__(config, rngs, **options)
        self.second_head = nnx.Linear(config.emb_dim, config.vocab_size, rngs=rngs)

    def loss(self, inputs_BT, targets_BT, dropout=None):
        hidden_BTD = self.hidden_states(inputs_BT, dropout)
        next_loss = chunked_cross_entropy(self.unembed, hidden_BTD, targets_BT)
        return next_loss + chunked_cross_entropy(self.second_head, hidden_BTD[:, :-1], targets_BT[:, 1:])

    def auxiliary(self, inputs_BT, targets_BT):
        return cross_entropy(self.second_head(self.hidden_states(inputs_BT)[:, :-1]), targets_BT[:, 1:])


class MaskedLoss(GPTModel):
    """Leaves out the targets below 50, as one does with prompts."""

    def loss(self, inputs_BT, targets_BT, dropout=None):
        mask_BT = targets_BT >= 50
        return (self.token_losses(inputs_BT, targets_BT, dropout) * mask_BT).sum() / mask_BT.sum()


class TableInBlock(Block):
    """Adds a row of its own table, by the token id."""

    def __init__(self, config, drop_rate, dtype, rngs):
        super().__init__(config, drop_rate, dtype, rngs)
        self.table = nnx.Embed(config.vocab_size, config.emb_dim, rngs=rngs)

    def __call__(self, x_BTD, tokens_BT, *others):
        return super().__call__(x_BTD + self.table(tokens_BT.astype(jnp.int32)), *others)


class TokenTable(GPTModel):
    def __init__(self, config, rngs, **options):
        super().__init__(config, rngs, **options)
        self.blocks = nnx.List([TableInBlock(config, 0.0, jnp.float32, rngs) for _ in range(config.n_layers)])

    def stages(self, tokens_BT, dropout=None, *, first_position=0, **options):
        positions = first_position + jnp.arange(tokens_BT.shape[1])
        x_BTD = self.embed(tokens_BT) + self.position_embedding(positions)[None]
        for block in self.blocks:
            x_BTD = block(x_BTD, tokens_BT, positions, dropout, *options.values())
        yield "the output norm", self.output_norm(x_BTD)


class CosineHead(GPTModel):
    """Logits are cosines: no row of hidden states may be made up of zeros."""

    def unembed(self, hidden_BTD):
        return 9 * super().unembed(hidden_BTD / jnp.linalg.norm(hidden_BTD, axis=-1, keepdims=True))


class RotaryAttention(CausalSelfAttention):
    def __call__(self, x_BTD, positions_T, dropout, attend=causal_attention):
        def rotated(q_BTNH, k_BTNH, v_BTNH):
            angles_T1H = positions_T[:, None, None] * 10.0 ** -jnp.arange(q_BTNH.shape[-1] // 2)[None, None]
            cos, sin = jnp.cos(angles_T1H)[None], jnp.sin(angles_T1H)[None]

            def turn(x):
                first, second = jnp.split(x, 2, axis=-1)
                return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)

            return attend(turn(q_BTNH), turn(k_BTNH), v_BTNH)

        return super().__call__(x_BTD, positions_T, dropout, rotated)


class GroupedQueries(CausalSelfAttention):
    """Half as many heads of keys and values as of queries."""

    def __call__(self, x_BTD, positions_T, dropout, attend=causal_attention):
        def grouped(q_BTNH, k_BTNH, v_BTNH):
            return attend(q_BTNH, k_BTNH[:, :, ::2], v_BTNH[:, :, ::2])

        return super().__call__(x_BTD, positions_T, dropout, grouped)


class Rotary(GPTModel):
    def __init__(self, config, rngs, *, attention=RotaryAttention, **options):
        super().__init__(config, rngs, **options)
        for block in self.blocks:
            block.attention = attention(config, 0.0, options.get("dtype", jnp.float32), rngs)


Grouped = partial(Rotary, attention=GroupedQueries)


class KeptForTheLoss(GPTModel):
    """Leaves something on the module for the loss, as mixtures of experts do."""

    def stages(self, *args, **options):
        for name, x_BTD in super().stages(*args, **options):
            self.kept = nnx.data((x_BTD**2).mean())
            yield name, x_BTD

    def loss(self, inputs_BT, targets_BT, dropout=None):
        return super().loss(inputs_BT, targets_BT, dropout) + 0.1 * self.kept

    def auxiliary(self, inputs_BT):
        return 0.1 * (self.hidden_states(inputs_BT) ** 2).mean()


class RMSNormed(GPTModel):
    def __init__(self, config, rngs, **options):
        super().__init__(config, rngs, **options)
        self.output_norm = nnx.RMSNorm(config.emb_dim, rngs=rngs)
        for block in self.blocks:
            block.attention_norm = nnx.RMSNorm(config.emb_dim, rngs=rngs)


class FrozenPositions(GPTModel):
    """Sinusoidal positions, which are no parameters."""

    def __init__(self, config, rngs, **options):
        super().__init__(config, rngs, **options)
        angles = jnp.arange(config.context_length)[:, None] * 0.3 ** jnp.arange(config.emb_dim)[None]
        self.position_embedding.embedding = nnx.Variable(jnp.sin(angles))


class StoppedEmbedding(GPTModel):
    def embed(self, tokens_BT):
        return jax.lax.stop_gradient(super().embed(tokens_BT))


EDITS = {"Grouped": Grouped} | {
    edit.__name__: edit
    for edit in (
        *(GPTModel, ScaledEmbedding, EmbeddingGain, SoftCap, LogitBias, Temperature, LearnedScale, DeepHead),
        *(SharedBlocks, RecurrentBlocks, AuxiliaryLoss, SecondHead, MaskedLoss, TokenTable, RMSNormed),
        *(FrozenPositions, StoppedEmbedding, CosineHead, Rotary, KeptForTheLoss),
    )
}


def edited(edit, **changes):
    return with_larger_weights(EDITS[edit](tiny_model_config(**changes), nnx.Rngs(0)))


def plain_loss(model, inputs_BT, targets_BT):
    """The loss of an edit by its definition, over all logits."""
    logits_BTV = model(inputs_BT)
    if isinstance(model, MaskedLoss):
        each_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT[..., None].astype(int), axis=-1)[
            ..., 0
        ]
        mask_BT = targets_BT >= 50
        return (each_BT * mask_BT).sum() / mask_BT.sum()
    loss = cross_entropy(logits_BTV, targets_BT)
    if isinstance(model, AuxiliaryLoss | KeptForTheLoss):
        loss += model.auxiliary(inputs_BT)
    if isinstance(model, SecondHead):
        loss += model.auxiliary(inputs_BT, targets_BT)
    return loss


def one_call(microbatches, sequences):
    tokens = TokenStream(
        jax.device_put(random_tokens(2000)), (microbatches, sequences, CONTEXT_LENGTH), "next-token", 0, shuffle=False
    )
    [call] = tokens.calls(1)
    return call


@pytest.mark.parametrize(("microbatches", "data", "fsdp", "tied"), [(2, 1, 2, False), (1, 2, 1, True)])
@pytest.mark.parametrize("edit", EDITS)
def test_the_gradient_that_trains_is_that_of_the_edited_model(edit, tied, microbatches, data, fsdp):
    devices = data * fsdp
    mesh, model, call = (
        make_mesh(MeshConfig(data=data, fsdp=fsdp)),
        edited(edit, tied_head=tied),
        one_call(microbatches, 4),
    )
    graph, params, constants = nnx.split(model, nnx.Param, ...)
    shares = [part.reshape(microbatches * devices, -1, CONTEXT_LENGTH) for part in (call.inputs, call.targets)]

    def expected_loss(params):
        model = nnx.merge(graph, params, constants)
        return jnp.mean(jnp.stack([plain_loss(model, x, y) for x, y in zip(*shares)]))

    expected, expected_grads = jax.jit(jax.value_and_grad(expected_loss))(params)
    place(model, mesh)
    loss, grads, _ = nnx.jit(partial(mean_gradient, mesh=mesh))(model, place_batch(call, mesh), SEED_KEY)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    expected_grads, grads = named_arrays(expected_grads), named_arrays(grads)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        scale = float(jnp.abs(expected_grads[name]).max())
        np.testing.assert_allclose(grad, expected_grads[name], rtol=1e-3, atol=1e-5 * scale + 1e-9, err_msg=name)


@pytest.mark.parametrize("edit", EDITS)
def test_validation_and_evaluation_are_of_the_edited_model(edit):
    model, tokens = edited(edit), random_tokens(4 * CONTEXT_LENGTH + 1)
    stream = TokenStream(jax.device_put(tokens), (1, 2, CONTEXT_LENGTH), "next-token", 0, shuffle=False)
    batches = [[part[0] for part in stream.batch(number)] for number in range(2)]
    expected = np.mean([float(plain_loss(model, *batch)) for batch in batches])
    assert mean_loss(model, stream) == pytest.approx(expected, rel=1e-5)
    judged = np.concatenate(list(windowed_losses(model, tokens)))
    expected = np.mean([float(cross_entropy(model(inputs), targets)) for inputs, targets in batches])
    assert judged.mean() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("edit", EDITS)
def test_completions_are_those_of_the_edited_model(edit):
    model = edited(edit)
    text = random_tokens(4).tolist()
    found = generate(model, text, num_tokens=8)[0].tolist()
    forward = nnx.jit(lambda model, tokens: model(tokens))
    for token in found:
        padded = np.array([text + [0] * (CONTEXT_LENGTH - len(text))])
        assert int(forward(model, padded)[0, len(text) - 1].argmax()) == token
        text.append(token)


@pytest.mark.parametrize("edit", EDITS)
def test_what_was_added_is_saved_and_loaded(edit, tmp_path, monkeypatch):
    model = edited(edit)
    path = tmp_path / "model.safetensors"
    save_weights(path, host_arrays(nnx.state(model)), model.config.model_dump_json())
    monkeypatch.setattr(model_module, "GPTModel", EDITS[edit])
    tokens = random_tokens(8)[None]
    np.testing.assert_array_equal(load_saved_model(path)(tokens), model(tokens))


@pytest.mark.parametrize("edit", ["SoftCap", "SharedBlocks", "FrozenPositions"])
def test_an_edited_run_trains_resumes_and_is_judged(call_program, make_run, use_model, edit):
    use_model(EDITS[edit])
    run = make_run(train={"weight_decay": 0.1})
    finished = call_program("train", run)
    assert finished.returncode == 0, finished.stderr
    assert call_program("train", run, "--from", "best").returncode == 0
    table = run / "table.json"
    tokens = 1 + 64 // CONTEXT_LENGTH * CONTEXT_LENGTH - 1
    judged = call_program("evaluate", run / "checkpoints/latest", "--tokens", tokens, "--json", table)
    assert judged.returncode == 0, judged.stderr
    [model] = json.loads(table.read_text())["models"]
    assert model["loss"] == pytest.approx(metrics.read(run / "metrics.jsonl")[-1]["val_loss"], rel=1e-4)
    if edit == "FrozenPositions":
        trained = load_saved_model(run / "checkpoints/latest/model.safetensors")
        fresh = EDITS[edit](trained.config, nnx.Rngs(0))
        np.testing.assert_array_equal(
            trained.position_embedding.embedding[...], fresh.position_embedding.embedding[...]
        )


def test_no_array_of_tokens_and_vocabulary_is_in_the_step_with_a_soft_cap():
    model, call = edited("SoftCap"), one_call(2, 4)
    text = nnx.jit(mean_gradient).lower(model, call, SEED_KEY).compile().as_text()
    assert f"[{2 * CONTEXT_LENGTH},{VOCAB_SIZE}]" in text  # a chunk: half of a microbatch
    assert f"[{4 * CONTEXT_LENGTH},{VOCAB_SIZE}]" not in text and f"[4,{CONTEXT_LENGTH},{VOCAB_SIZE}]" not in text


SOME = ["SharedBlocks", "RecurrentBlocks", "SecondHead", "DeepHead", "KeptForTheLoss"]


@pytest.mark.parametrize("edit", SOME)
def test_the_checks_and_the_order_of_the_backward_pass_are_of_the_edited_model(edit):
    model = edited(edit)
    assert make_checks(model)(model, one_call(2, 2), SEED_KEY) is None
    order = backward_order(model)
    assert sorted(order) == sorted(named_arrays(nnx.state(model, nnx.Param))) and order != sorted(order)


def test_a_loss_that_takes_no_single_sequence_is_ordered_by_name():
    class Halves(GPTModel):
        def loss(self, inputs_BT, targets_BT, dropout=None):
            return sum(
                super(Halves, self).loss(*half) for half in zip(*(jnp.split(x, 2) for x in (inputs_BT, targets_BT)))
            )

    model = Halves(tiny_model_config(), nnx.Rngs(0))
    assert backward_order(model) == list(named_arrays(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("rows_per_chunk", [2, 4, 7])
def test_rows_that_fill_up_a_chunk_do_not_count(rows_per_chunk):
    model, tokens = edited("CosineHead"), random_tokens(16)[None]
    model.loss_rows_per_chunk = rows_per_chunk
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss, grads = loss_and_gradient(model, inputs, targets, None)
    assert loss == pytest.approx(float(cross_entropy(model(inputs), targets)), rel=1e-5)
    assert all(jnp.isfinite(grad).all() for grad in jax.tree.leaves(grads))


@pytest.mark.parametrize("edit", ["DeepHead", "TokenTable", "RMSNormed", "Rotary", "SoftCap"])
def test_half_precision_trains_edits_too(edit):
    model = EDITS[edit](tiny_model_config(), nnx.Rngs(0), dtype=jnp.bfloat16)
    _, grads = nnx.jit(loss_and_gradient)(model, *(part[0] for part in one_call(1, 2)[:2]), None)
    assert all(jnp.isfinite(grad).all() and grad.dtype == jnp.float32 for grad in jax.tree.leaves(grads))


class PlainArray(GPTModel):
    def __init__(self, config, rngs, **options):
        super().__init__(config, rngs, **options)
        self.table = jnp.ones(3)


class OwnRandomNumbers(GPTModel):
    def __init__(self, config, rngs, **options):
        super().__init__(config, rngs, **options)
        self.flax_dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("edit", "line"),
    [(PlainArray, "table: expected an nnx.Param, or"), (OwnRandomNumbers, "flax_dropout.rngs.count: expected an nnx")],
)
def test_what_a_run_cannot_keep_is_refused_by_name(call_program, make_run, use_model, edit, line):
    use_model(edit)
    assert f"model.py: {line}" in complaint(call_program("train", make_run()))


def test_a_parameter_that_gpt2_lacks_is_not_exported():
    model = edited("LogitBias", qkv_bias=True)
    with pytest.raises(ValueError, match="logit_bias: GPT-2 has no such parameter"):
        export_weights(host_arrays(nnx.state(model)), model.config)


def test_a_forward_pass_that_changes_the_model_is_refused_by_name():
    class Counting(GPTModel):
        def __init__(self, config, rngs, **options):
            super().__init__(config, rngs, **options)
            self.calls = nnx.Variable(jnp.zeros(()))

        def embed(self, tokens_BT):
            self.calls[...] += 1
            return super().embed(tokens_BT)

    inputs = random_tokens(8)[None]
    with pytest.raises(ValueError, match="forward pass changes calls, which training would not keep"):
        loss_and_gradient(Counting(tiny_model_config(), nnx.Rngs(0)), inputs, inputs, None)
