"""The GPT, top to bottom: GPT-2 with a switch for every part that the ladder adds.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), and the code published with it.

Suffixes of array names: B batch, T positions, D embedding, N heads, H head width, F feed-forward width, V vocabulary,
K or A microbatches.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from outside_in.config import ModelConfig, TrainConfig
from outside_in.layers.activations import gelu, relu2, swiglu
from outside_in.layers.attention import causal_weights, repeat_heads
from outside_in.layers.dropout import Dropout
from outside_in.layers.kernels import LayerNorm, RMSNorm, causal_attention, vocabulary_product
from outside_in.layers.linear import INIT_STD, initializer, linear, residual_std
from outside_in.layers.rotary import rotate
from outside_in.layers.value_embedding import ValueEmbedding
from outside_in.loss import chunked_cross_entropy, chunked_losses
from outside_in.weights import check_variables, named_arrays

# Queries, keys and values to weighted sums of the values, all (B, T, N, H). Where a block has a window, `window=` too.
AttentionFn = Callable[..., jax.Array]
NORMS = {"layer": LayerNorm, "rms": RMSNorm}


class CausalSelfAttention(nnx.Module):
    """Multi-head attention in which a position sees itself and what came before."""

    def __init__(self, config: ModelConfig, drop_rate: float, dtype: DTypeLike, rngs: nnx.Rngs, layer: int = 0) -> None:
        width, options = config.emb_dim, {"dtype": dtype, "rngs": rngs}
        kv_width = config.num_kv_heads * config.head_width
        self.query_key_value = linear(width, width + 2 * kv_width, bias=config.qkv_bias, **options)
        self.output = linear(width, width, bias=config.attention_output_bias, std=residual_std(config), **options)
        self.query_norm, self.key_norm = (
            RMSNorm(config.head_width, rngs) if config.qk_norm else None for _ in range(2)
        )
        self.value_embedding = (
            ValueEmbedding(config.vocab_size, kv_width, rngs) if config.has_value_embedding(layer) else None
        )
        self.n_heads, self.head_width, self.split_at = config.n_heads, config.head_width, (width, width + kv_width)
        self.is_rotary, self.window, self.drop_rate = config.position == "rope", config.window(layer), drop_rate

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_T: jax.Array,
        dropout: Dropout | None,
        attend: AttentionFn = causal_attention,
        tokens_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Mix (B, T, D). Rotations use the positions, value embeddings the tokens."""
        parts = jnp.split(self.query_key_value(x_BTD), self.split_at, axis=-1)
        q_BTNH, k_BTNH, v_BTNH = (x.reshape(*x.shape[:2], -1, self.head_width) for x in parts)
        if self.value_embedding is not None:
            assert tokens_BT is not None, "value embeddings need the tokens: pass tokens_BT to the block"
            v_BTNH = self.value_embedding(v_BTNH, tokens_BT)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTNH, k_BTNH = self.query_norm(q_BTNH), self.key_norm(k_BTNH)
        if self.is_rotary:
            q_BTNH, k_BTNH = rotate(q_BTNH, positions_T), rotate(k_BTNH, positions_T)
        q_BTNH, k_BTNH = q_BTNH.astype(v_BTNH.dtype), k_BTNH.astype(v_BTNH.dtype)
        if dropout is None or self.drop_rate == 0:
            window = {} if self.window is None else {"window": self.window}
            attended_BTNH = attend(q_BTNH, k_BTNH, v_BTNH, **window)
        else:  # GPT-2 drops attention weights, which no fused implementation in JAX offers
            weights_BNTT = causal_weights(q_BTNH, k_BTNH, self.window)
            weights_BNTT = dropout(weights_BNTT, self.drop_rate).astype(v_BTNH.dtype)
            attended_BTNH = jnp.einsum("bnts,bsnh->btnh", weights_BNTT, repeat_heads(v_BTNH, self.n_heads, 2))
        return self.output(attended_BTNH.reshape(x_BTD.shape))


class FeedForward(nnx.Module):
    """Two linear layers with an activation between them; SwiGLU has a third, whose outputs gate those of the first."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, inner, options = config.emb_dim, config.inner_width, {"bias": config.bias, "dtype": dtype, "rngs": rngs}
        self.expand = linear(width, inner, **options)
        self.project = linear(inner, width, **options, std=residual_std(config))
        self.gate = linear(width, inner, **options) if config.activation == "swiglu" else None
        self.activation = relu2 if config.activation == "relu2" else gelu

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        inner_BTF = self.expand(x_BTD)
        return self.project(self.activation(inner_BTF) if self.gate is None else swiglu(self.gate(x_BTD), inner_BTF))


class Block(nnx.Module):
    """Attention, then feed-forward.

    Each is normalized before, and added to its input, if its switch is on.
    """

    def __init__(self, config: ModelConfig, drop_rate: float, dtype: DTypeLike, rngs: nnx.Rngs, layer: int = 0) -> None:
        norm = NORMS[config.norm]
        self.shortcut = config.shortcut
        self.attention_norm = norm(config.emb_dim, rngs) if config.pre_norm else None
        self.attention = CausalSelfAttention(config, drop_rate, dtype, rngs, layer)
        self.feed_forward_norm = norm(config.emb_dim, rngs) if config.pre_norm and config.feed_forward else None
        self.feed_forward = FeedForward(config, dtype, rngs) if config.feed_forward else None
        self.drop_rate = drop_rate

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_T: jax.Array,
        dropout: Dropout | None,
        attend: AttentionFn = causal_attention,
        **tokens: jax.Array,
    ) -> jax.Array:
        normed_BTD = x_BTD if self.attention_norm is None else self.attention_norm(x_BTD)
        x_BTD = self._add(x_BTD, self.attention(normed_BTD, positions_T, dropout, attend, **tokens), dropout)
        if self.feed_forward is not None:
            normed_BTD = x_BTD if self.feed_forward_norm is None else self.feed_forward_norm(x_BTD)
            x_BTD = self._add(x_BTD, self.feed_forward(normed_BTD), dropout)
        return x_BTD

    def _add(self, x_BTD: jax.Array, change_BTD: jax.Array, dropout: Dropout | None) -> jax.Array:
        chex.assert_equal_shape((x_BTD, change_BTD), custom_message="what a layer adds, against what it adds it to")
        change_BTD = change_BTD if dropout is None else dropout(change_BTD, self.drop_rate)
        return (x_BTD + change_BTD if self.shortcut else change_BTD).astype(x_BTD.dtype)


class GPTModel(nnx.Module):
    """Token ids in, logits out; `config.n_layers` 0 is the A-to-A shell.

    Everything that a run does goes through `embed`, `stages` and `unembed`: `loss` trains and validates, `token_losses`
    judges, `stages` with a cache completes text. What is changed here is changed everywhere.

    Weights start as in Hugging Face's GPT-2, those of other parts too: normal with standard deviation 0.02, divided by
    √(2 · n_layers) where a layer adds to the residual stream; biases 0, norms 1. The first loss is then
    ln(vocab_size) + 0.0002 · emb_dim with an output norm (the logits' variance is emb_dim · 0.02², and half of that is
    lost) and ln(vocab_size) without one.

    Parameters are float32. Products and the residual stream are in `dtype`, norms and losses in float32 or wider.
    """

    def __init__(
        self,
        config: ModelConfig,
        rngs: nnx.Rngs,
        *,
        drop_rate: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        loss_rows_per_chunk: int | None = None,
        remat: str = "none",
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.drop_rate = drop_rate
        self.loss_rows_per_chunk = loss_rows_per_chunk
        self.remat = remat
        init = initializer(INIT_STD)
        self.token_embedding = nnx.Embed(config.vocab_size, config.emb_dim, embedding_init=init, rngs=rngs)
        self.position_embedding = (
            nnx.Embed(config.context_length, config.emb_dim, embedding_init=init, rngs=rngs)
            if config.position_embedding
            else None
        )
        self.blocks = nnx.List([Block(config, drop_rate, dtype, rngs, i) for i in range(config.n_layers)])
        self.output_norm = NORMS[config.norm](config.emb_dim, rngs) if config.output_norm else None
        self.head = (
            None if config.tied_head else nnx.Embed(config.vocab_size, config.emb_dim, embedding_init=init, rngs=rngs)
        )

    def __call__(self, tokens_BT: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        """Return logits (B, T, V) for token ids (B, T).

        The ids are of any integer type, and T is at most `context_length`. Dropout is active when `dropout` is given.
        """
        return self.unembed(self.hidden_states(tokens_BT, dropout))

    def loss(self, inputs_BT: jax.Array, targets_BT: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        """Return the mean loss of a microbatch, a scalar: what training minimizes and validation reports."""
        hidden_BTD = self.hidden_states(inputs_BT, dropout)
        return chunked_cross_entropy(self.unembed, hidden_BTD, targets_BT, self.loss_rows_per_chunk)

    def token_losses(self, inputs_BT: jax.Array, targets_BT: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        """Return the loss of each target, (B, T), as `evaluate.py` wants it. Make the same change in `loss`."""
        hidden_BTD = self.hidden_states(inputs_BT, dropout)
        return chunked_losses(self.unembed, hidden_BTD, targets_BT, self.loss_rows_per_chunk)

    def hidden_states(self, tokens_BT: jax.Array, dropout: Dropout | None = None, **cached: Any) -> jax.Array:
        """Return what the head reads, (B, T, D): the last of `stages`."""
        *_, (_, hidden_BTD) = self.stages(tokens_BT, dropout, **cached)
        return hidden_BTD

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Return the rows of the token embedding, (B, T, D), float32, times √D if the model is to scale them."""
        chex.assert_rank(tokens_BT, 2, custom_message="token ids, expected as (B, T)")
        chex.assert_type(tokens_BT, int, custom_message="token ids")
        x_BTD = self.token_embedding(tokens_BT.astype(jnp.int32))
        return x_BTD * self.config.emb_dim**0.5 if self.config.embedding_scale else x_BTD

    def stages(
        self,
        tokens_BT: jax.Array,
        dropout: Dropout | None = None,
        *,
        first_position: int | jax.Array = 0,
        attend: AttentionFn = causal_attention,
    ) -> Iterator[tuple[str, jax.Array]]:
        """Yield each stage's name and its hidden states (B, T, D).

        Text generation, which caches the keys and values of earlier positions, says where these tokens stand, and with
        `attend` how they look back: a layer sees other positions through it alone, and calls it plainly, not inside a
        transformation such as `jax.checkpoint` or `jax.lax.scan`.
        """
        x_BTD, length = self.embed(tokens_BT), tokens_BT.shape[1]
        assert length <= self.config.context_length, f"{length} positions, context_length {self.config.context_length}"
        positions_T = first_position + jnp.arange(length)
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(positions_T)[None]
        x_BTD = x_BTD.astype(self.dtype)
        x_BTD = x_BTD if dropout is None else dropout(x_BTD, self.drop_rate)
        yield "the embedding", x_BTD
        tokens = {"tokens_BT": tokens_BT} if self.config.value_embeddings else {}
        for i, block in enumerate(self.blocks):
            dtype = x_BTD.dtype
            run = partial(block, positions_T=positions_T, dropout=dropout, attend=attend, **tokens)
            if self.remat == "blocks" and attend is causal_attention:  # the backward pass computes each block again
                run = jax.checkpoint(run)
            x_BTD = run(x_BTD)
            chex.assert_type(x_BTD, dtype, custom_message=f"the residual stream after block {i}")
            yield f"block {i}", x_BTD
        if self.output_norm is not None:
            yield "the output norm", self.output_norm(x_BTD)

    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """Return logits (B, T, V) for hidden states (B, T, D).

        Each position is computed alone, in the compute dtype; a soft-cap in float32.
        """
        table_VD = (self.token_embedding if self.head is None else self.head).embedding[...]
        flat_MD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])  # one large product, not B small ones
        logits_MV = vocabulary_product(flat_MD.astype(self.dtype), table_VD.astype(self.dtype))
        logits_BTV = logits_MV.reshape(*hidden_BTD.shape[:-1], len(table_VD))
        cap = self.config.logit_soft_cap  # as in Gemma 2, https://arxiv.org/abs/2408.00118
        return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV.astype(jnp.float32) / cap)


@partial(nnx.jit, static_argnums=(0, 2, 3, 4, 5))
def create_model(
    config: ModelConfig,
    seed: int,
    drop_rate: float = 0.0,
    precision: str = "float32",
    loss_rows_per_chunk: int | None = None,
    remat: str = "none",
) -> GPTModel:
    """Build a fresh model in one compiled call."""
    rngs, dtype = nnx.Rngs(params=jax.random.key(seed)), jnp.dtype(precision)
    options = {"drop_rate": drop_rate, "loss_rows_per_chunk": loss_rows_per_chunk, "remat": remat}
    model = GPTModel(config, rngs, dtype=dtype, **options)
    check_variables(model)
    return model


def model_of(config: ModelConfig, train: TrainConfig) -> GPTModel:
    """Build a fresh model as a run trains it."""
    return create_model(config, train.seed, train.drop_rate, train.precision, train.loss_rows_per_chunk, train.remat)


def abstract_model(config: ModelConfig) -> GPTModel:
    """Build a model with shapes in place of arrays."""

    def build() -> GPTModel:
        model = GPTModel(config, nnx.Rngs(0))
        check_variables(model)
        return model

    return nnx.eval_shape(build)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters by name."""
    return {name: x.shape for name, x in named_arrays(nnx.state(abstract_model(config), nnx.Param)).items()}


def count_parameters(config: ModelConfig) -> int:
    return sum(map(math.prod, parameter_shapes(config).values()))
