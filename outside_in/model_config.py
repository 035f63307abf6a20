"""The schema of `model.json`: keys, defaults, limits, and what contradicts each other."""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator

from outside_in.config_files import Config, Count, Float32, key
from outside_in.storage.text import counted

SLIDING = "S"  # in `window_pattern`: a block whose attention is limited to the window


def _not_a_number(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):  # 1 == True, which is all that Literal asks
        raise ValueError(f"expected true, false or a name, got {value}")  # noqa: TRY004
    return value


class ModelConfig(Config):
    """`model.json`: the model's shape, and a switch for every part. The defaults are GPT-2's.

    `n_layers` 0 is the A-to-A shell: token embedding, un-embedding, and what the switches add.
    """

    vocab_size: int = key("fatal", "number of token ids, which are uint16", ge=2, le=65_536)
    context_length: Count = key("fatal", "tokens in a sequence", ge=1)
    emb_dim: int = key(
        "fatal", "width of the hidden states; a multiple of n_heads", ge=1
    )  # what fits into memory limits it
    n_heads: int = key("fatal", "attention heads", ge=1)
    n_layers: int = key("fatal", "blocks; 0 is the A-to-A shell", ge=0, le=1_000)  # they are compiled one by one
    qkv_bias: bool = key("fatal", "biases on queries, keys and values")
    position_embedding: bool = key("fatal", "learned positions", True)
    pre_norm: bool = key("fatal", "a norm before each attention and each feed-forward layer", True)
    shortcut: bool = key("fatal", "residual connections", True)
    feed_forward: Annotated[Literal[True, False, "gelu", "relu2", "swiglu"], BeforeValidator(_not_a_number)] = key(
        "fatal", "a feed-forward layer after each attention, and its activation; true: gelu", True
    )
    output_norm: bool = key("fatal", "a norm before the head", True)
    attention_output_bias: bool = key("fatal", "a bias on attention's output projection", True)
    tied_head: bool = key("fatal", "the head is the token embedding", False)

    position: Literal["learned", "rope", "none"] | None = key(
        "fatal", "positions: a learned table, rotated queries and keys, or none; null: as position_embedding says", None
    )
    norm: Literal["layer", "rms"] = key("fatal", "the kind of all norms: LayerNorm or RMSNorm", "layer")
    feed_forward_dim: Count | None = key(
        "fatal", "width inside a feed-forward layer; null: 4 emb_dim, of swiglu 8/3 emb_dim", None, ge=1
    )
    qk_norm: bool = key("fatal", "an RMSNorm on each head's queries and keys", False)
    n_kv_heads: int | None = key(
        "fatal", "heads of keys and values, each shared by equally many query heads; null: n_heads", None, ge=1
    )
    bias: bool = key("fatal", "biases in linear layers; false: in none of them", True)
    logit_soft_cap: Float32 | None = key(
        "fatal", "logits become cap · tanh(logits / cap); null: they stay as they are", None, gt=0
    )
    embedding_scale: bool = key("fatal", "multiply the token embedding by √emb_dim", False)
    value_embeddings: bool = key(
        "fatal", "add learned vectors of the tokens to the values of every second block, the last included", False
    )
    sliding_window: Count | None = key(
        "fatal", "latest tokens that attention sees, the present one included; null: all", None, ge=1
    )
    window_pattern: str | None = key(
        "fatal", "blocks in which that holds, over and over, such as SSSL: S sliding, L all tokens; null: in all", None
    )

    @model_validator(mode="before")
    @classmethod
    def what_new_keys_say_of_old_ones(cls, content: Any) -> Any:
        """Let `position` and `bias` decide what older keys, where they are left out, would contradict."""
        if not isinstance(content, dict):
            return content
        implied = {}
        if content.get("position") is not None:
            implied["position_embedding"] = content["position"] == "learned"
        if content.get("bias") is False:
            implied["attention_output_bias"] = False
        return implied | content

    @model_validator(mode="after")
    def parts_fit_together(self) -> Self:
        for problem in (*_of_attention(self), *_of_other_parts(self)):
            raise ValueError(problem)
        return self

    @property
    def head_width(self) -> int:
        return self.emb_dim // self.n_heads

    @property
    def num_kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def activation(self) -> Literal["gelu", "relu2", "swiglu"] | None:
        """Return the activation of feed-forward layers; None if there are none."""
        return "gelu" if self.feed_forward is True else self.feed_forward or None

    @property
    def inner_width(self) -> int:
        """Return the width inside a feed-forward layer; by default all have about as many parameters."""
        if self.activation is None:
            return 0
        of_swiglu = 8 * -(-self.emb_dim // 3)  # 8/3 · emb_dim, up to a multiple of 8
        return self.feed_forward_dim or (of_swiglu if self.activation == "swiglu" else 4 * self.emb_dim)

    def window(self, layer: int) -> int | None:
        """Return how many tokens attention sees in a block; None for all."""
        pattern = self.window_pattern or SLIDING
        return self.sliding_window if pattern[layer % len(pattern)] == SLIDING else None

    def has_value_embedding(self, layer: int) -> bool:
        return self.value_embeddings and (self.n_layers - 1 - layer) % 2 == 0

    def warnings(self) -> list[str]:
        """List what is legal but slow or surprising."""
        warnings = []
        if self.n_layers and (self.head_width % 8 or self.head_width > 128):
            warnings.append(
                f"head width {self.head_width} (emb_dim / n_heads): cuDNN attention takes multiples of 8 up to 128, "
                "so a GPU will use slower attention"
            )
        if self.sliding_window is not None and self.sliding_window >= self.context_length:
            warnings.append(
                f"sliding_window={self.sliding_window} is not less than context_length={self.context_length}, so it "
                "changes nothing"
            )
        return warnings


def _of_attention(config: ModelConfig) -> Iterator[str]:
    heads, width = config.n_heads, config.head_width
    if config.emb_dim % heads:
        suggested = max(1, config.emb_dim // heads) * heads
        yield f"emb_dim={config.emb_dim} is not divisible by n_heads={heads}; use {suggested} or change n_heads"
    if heads % config.num_kv_heads:
        divisors = ", ".join(str(d) for d in range(1, min(heads, 1000) + 1) if heads % d == 0)
        yield f"n_kv_heads={config.n_kv_heads} does not divide n_heads={heads}; use one of {divisors}"
    if config.position == "rope" and width % 2:
        yield (
            f'position="rope" needs an even head width (emb_dim / n_heads), got {width}; '
            f"use emb_dim={heads * (width + 1)} or another n_heads"
        )
    if config.window_pattern is None:
        return
    shown = f"window_pattern={json.dumps(config.window_pattern[:60])}"
    if config.sliding_window is None:
        yield f"{shown} needs a window; set sliding_window, such as {max(1, config.context_length // 4)}, or remove it"
    if not config.window_pattern or set(config.window_pattern) - {SLIDING, "L"}:
        yield f'{shown}: expected letters S (sliding) and L (all tokens), such as "SSSL"'
    if SLIDING not in config.window_pattern[: config.n_layers]:
        yield f"{shown} has no S in the first {counted(config.n_layers, 'block')}; put one there, or remove both keys"


def _of_other_parts(config: ModelConfig) -> Iterator[str]:
    attention = {
        'position="rope"': config.position == "rope",
        f"n_kv_heads={config.n_kv_heads}": config.n_kv_heads is not None,
        "qk_norm=true": config.qk_norm,
        "value_embeddings=true": config.value_embeddings,
        f"sliding_window={config.sliding_window}": config.sliding_window is not None,
    }
    if config.n_layers == 0 and (needing := [part for part, is_on in attention.items() if is_on]):
        yield f"{', '.join(needing)}: expected blocks, got n_layers=0; use n_layers=1 or more, or remove it"
    if config.position is not None and config.position_embedding != (config.position == "learned"):
        learned = json.dumps(config.position_embedding)
        other = json.dumps(not config.position_embedding)
        yield (
            f'position="{config.position}" and position_embedding={learned} contradict each other; '
            f"set position_embedding={other}"
        )
    for old in ("qkv_bias", "attention_output_bias"):
        if not config.bias and getattr(config, old):
            yield f"bias=false and {old}=true contradict each other; set {old} to false, or remove bias"
    if config.feed_forward_dim is not None and not config.feed_forward:
        yield (
            f"feed_forward_dim={config.feed_forward_dim} and feed_forward=false contradict each other; remove "
            "feed_forward_dim, or set feed_forward to true"
        )
