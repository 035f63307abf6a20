"""The GPT, top to bottom: GPT-2 with a switch for every part that the ladder adds.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), and the code published with it.

Suffixes of array names: B batch, T positions, D embedding, N heads, H head width, F feed-forward width, V vocabulary,
K or A microbatches.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from attention import causal_attention, causal_weights
from config import ModelConfig
from dropout import Dropout
from layer_norm import LayerNorm

INIT_STD = 0.02
Attend = Callable[
    [jax.Array, jax.Array, jax.Array], jax.Array
]  # queries, keys and values to what is mixed, all (B, T, N, H)
gelu = partial(jax.nn.gelu, approximate=True)


def initializer(std: float) -> nnx.Initializer:
    return jax.nn.initializers.normal(std)


class CausalSelfAttention(nnx.Module):
    """Multi-head attention in which a position sees itself and what came before."""

    def __init__(self, config: ModelConfig, drop_rate: float, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.n_heads = config.n_heads
        self.query_key_value = nnx.Linear(
            config.emb_dim,
            3 * config.emb_dim,
            use_bias=config.qkv_bias,
            kernel_init=initializer(INIT_STD),
            dtype=dtype,
            rngs=rngs,
        )
        self.output = nnx.Linear(
            config.emb_dim,
            config.emb_dim,
            use_bias=config.attention_output_bias,
            kernel_init=initializer(residual_std(config)),
            dtype=dtype,
            rngs=rngs,
        )
        self.drop_rate = drop_rate

    def __call__(self, x_BTD: jax.Array, dropout: Dropout | None, attend: Attend = causal_attention) -> jax.Array:
        batch, length, width = x_BTD.shape
        heads = (batch, length, self.n_heads, width // self.n_heads)
        q_BTNH, k_BTNH, v_BTNH = (part.reshape(heads) for part in jnp.split(self.query_key_value(x_BTD), 3, axis=-1))
        if dropout is None or self.drop_rate == 0:
            mixed_BTNH = attend(q_BTNH, k_BTNH, v_BTNH)
        else:  # GPT-2 drops attention weights, which no fused implementation in JAX offers
            weights_BNTT = causal_weights(q_BTNH, k_BTNH)
            weights_BNTT = dropout(weights_BNTT, self.drop_rate).astype(v_BTNH.dtype)
            mixed_BTNH = jnp.einsum("bnts,bsnh->btnh", weights_BNTT, v_BTNH)
        return self.output(mixed_BTNH.reshape(x_BTD.shape))


@jax.custom_vjp
def gelu_product(hidden_BTF: jax.Array, kernel_FD: jax.Array) -> jax.Array:
    """Return gelu(hidden) @ kernel, by GPT-2's tanh form; for the backward pass GELU is computed anew, not kept."""
    return gelu(hidden_BTF) @ kernel_FD


def _gelu_product_backward(saved: tuple[jax.Array, jax.Array], slopes_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden_BTF, kernel_FD = saved
    # Changes nothing, but has to wait for the slopes: else XLA computes it early and keeps it after all.
    hidden_BTF += 0 * slopes_BTD[..., :1]
    activated_BTF, pull_back = jax.vjp(gelu, hidden_BTF)
    [hidden_slopes_BTF] = pull_back(slopes_BTD @ kernel_FD.T)
    return hidden_slopes_BTF, jnp.einsum("btf,btd->fd", activated_BTF, slopes_BTD)


gelu_product.defvjp(lambda hidden, kernel: (gelu_product(hidden, kernel), (hidden, kernel)), _gelu_product_backward)


class FeedForward(nnx.Module):
    """Two linear layers, four times as wide inside, with GELU between them."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, inner = config.emb_dim, 4 * config.emb_dim
        self.expand = nnx.Linear(width, inner, kernel_init=initializer(INIT_STD), dtype=dtype, rngs=rngs)
        self.project = nnx.Linear(inner, width, kernel_init=initializer(residual_std(config)), dtype=dtype, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        hidden_BTF = self.expand(x_BTD)
        assert self.project.bias is not None  # Flax's linear layers may do without
        kernel_FD, bias_D = (x[...].astype(hidden_BTF.dtype) for x in (self.project.kernel, self.project.bias))
        return gelu_product(hidden_BTF, kernel_FD) + bias_D[None, None]


class Block(nnx.Module):
    """Attention, then feed-forward; each normalised before and added to its input, as far as the switches say."""

    def __init__(self, config: ModelConfig, drop_rate: float, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.shortcut = config.shortcut
        self.attention_norm = LayerNorm(config.emb_dim, rngs) if config.pre_norm else None
        self.attention = CausalSelfAttention(config, drop_rate, dtype, rngs)
        self.feed_forward_norm = LayerNorm(config.emb_dim, rngs) if config.pre_norm and config.feed_forward else None
        self.feed_forward = FeedForward(config, dtype, rngs) if config.feed_forward else None
        self.drop_rate = drop_rate

    def __call__(self, x_BTD: jax.Array, dropout: Dropout | None, attend: Attend = causal_attention) -> jax.Array:
        normed_BTD = x_BTD if self.attention_norm is None else self.attention_norm(x_BTD)
        x_BTD = self._add(x_BTD, self.attention(normed_BTD, dropout, attend), dropout)
        if self.feed_forward is not None:
            normed_BTD = x_BTD if self.feed_forward_norm is None else self.feed_forward_norm(x_BTD)
            x_BTD = self._add(x_BTD, self.feed_forward(normed_BTD), dropout)
        return x_BTD

    def _add(self, x_BTD: jax.Array, change_BTD: jax.Array, dropout: Dropout | None) -> jax.Array:
        chex.assert_equal_shape((x_BTD, change_BTD), custom_message="what a layer adds, against what it adds it to")
        change_BTD = change_BTD if dropout is None else dropout(change_BTD, self.drop_rate)
        return x_BTD + change_BTD if self.shortcut else change_BTD.astype(x_BTD.dtype)


class GPTModel(nnx.Module):
    """Token ids in, logits out; `config.n_layers` 0 is the A-to-A shell.

    Weights start as in GPT-2's code: normal with standard deviation 0.02, divided by √(2 · n_layers) where a layer
    adds to the residual stream; biases 0, norms 1. The first loss is then ln(vocab_size) + 0.0002 · emb_dim with an
    output norm (the logits' variance is emb_dim · 0.02², and half of that is lost) and ln(vocab_size) without one.

    Parameters and the residual stream are float32; products are computed in `dtype`.
    """

    def __init__(
        self, config: ModelConfig, rngs: nnx.Rngs, *, drop_rate: float = 0.0, dtype: DTypeLike = jnp.float32
    ) -> None:
        self.config = config
        self.dtype = dtype
        init = initializer(INIT_STD)
        self.token_embedding = nnx.Embed(config.vocab_size, config.emb_dim, embedding_init=init, rngs=rngs)
        self.position_embedding = (
            nnx.Embed(config.context_length, config.emb_dim, embedding_init=init, rngs=rngs)
            if config.position_embedding
            else None
        )
        self.drop_rate = drop_rate
        self.blocks = nnx.List([Block(config, drop_rate, dtype, rngs) for _ in range(config.n_layers)])
        self.output_norm = LayerNorm(config.emb_dim, rngs) if config.output_norm else None
        self.head = (
            None if config.tied_head else nnx.Embed(config.vocab_size, config.emb_dim, embedding_init=init, rngs=rngs)
        )

    def __call__(self, tokens_BT: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        """Return logits (B, T, V) for token ids (B, T) of any integer type, T at most `context_length`.

        Dropout is active when `dropout` is given.
        """
        return self.unembed(self.hidden_states(tokens_BT, dropout))

    def hidden_states(self, tokens_BT: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        """Return what the head reads, (B, T, D), float32."""
        return self.transform(self.embed(tokens_BT), dropout)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Return the rows of the token embedding, (B, T, D), float32."""
        chex.assert_rank(tokens_BT, 2, custom_message="token ids, expected as (B, T)")
        chex.assert_type(tokens_BT, int, custom_message="token ids")
        return self.token_embedding(tokens_BT.astype(jnp.int32))

    def transform(self, x_BTD: jax.Array, dropout: Dropout | None = None, **cached: Any) -> jax.Array:
        """Return the hidden states after the last stage, (B, T, D), float32, for embedded tokens; see `stages`."""
        *_, (_, hidden_BTD) = self.stages(x_BTD, dropout, **cached)
        return hidden_BTD

    def stages(
        self,
        x_BTD: jax.Array,
        dropout: Dropout | None = None,
        *,
        first_position: int | jax.Array = 0,
        attends: Sequence[Attend] | None = None,
    ) -> Iterator[tuple[str, jax.Array]]:
        """Yield the hidden states (B, T, D), float32, after each stage, with its name, for embedded tokens.

        Whoever keeps the keys and values of earlier positions says where these begin, and how each layer attends.
        """
        length = x_BTD.shape[1]
        assert length <= self.config.context_length, f"{length} positions, context_length {self.config.context_length}"
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(first_position + jnp.arange(length))[None]
        x_BTD = x_BTD if dropout is None else dropout(x_BTD, self.drop_rate)
        yield "the embedding", x_BTD
        for number, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, dropout, attends[number] if attends else causal_attention)
            chex.assert_type(x_BTD, jnp.float32, custom_message=f"the residual stream after block {number}")
            yield f"block {number}", x_BTD
        if self.output_norm is not None:
            yield "the output norm", self.output_norm(x_BTD)

    @property
    def unembedding(self) -> nnx.Embed:
        """The output head (V, D), a row for each token; the token embedding itself where the head is tied."""
        return self.token_embedding if self.head is None else self.head

    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """Return logits (…, V) for hidden states (…, D), in the compute dtype."""
        flat = hidden_BTD.reshape(-1, self.config.emb_dim).astype(self.dtype)  # one large product, not B small ones
        logits = flat @ self.unembedding.embedding[...].T.astype(self.dtype)
        return logits.reshape(*hidden_BTD.shape[:-1], self.config.vocab_size)


def compute_copy(params: nnx.State, dtype: DTypeLike) -> nnx.State:
    """Cast the matrices of linear layers to the compute dtype, so that it is done once and not at every use."""
    return nnx.map(lambda path, x: x.astype(dtype) if path[-1] == "kernel" else x, params)


def residual_std(config: ModelConfig) -> float:
    return INIT_STD / (2 * config.n_layers) ** 0.5


@partial(nnx.jit, static_argnums=(0, 2, 3))
def create_model(config: ModelConfig, seed: int, drop_rate: float = 0.0, precision: str = "float32") -> GPTModel:
    """Build a fresh model in one compiled call."""
    return GPTModel(config, nnx.Rngs(params=jax.random.key(seed)), drop_rate=drop_rate, dtype=jnp.dtype(precision))


def count_parameters(config: ModelConfig) -> int:
    """Count the parameters of a model without building it."""
    shell, with_a_layer = (_size(config.model_copy(update={"n_layers": layers})) for layers in (0, 1))
    return shell + config.n_layers * (with_a_layer - shell)  # every layer is like the first


def _size(config: ModelConfig) -> int:
    model = nnx.eval_shape(lambda: GPTModel(config, nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
