"""The schema of `model.json`: keys, defaults, limits."""

from typing import Self

from pydantic import model_validator

from outside_in.config_files import Config, Count, key


class ModelConfig(Config):
    """`model.json`: the model's shape, and a switch for every part.

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
    pre_norm: bool = key("fatal", "a LayerNorm before each attention and each feed-forward layer", True)
    shortcut: bool = key("fatal", "residual connections", True)
    feed_forward: bool = key("fatal", "a feed-forward layer after each attention", True)
    output_norm: bool = key("fatal", "a LayerNorm before the head", True)
    attention_output_bias: bool = key("fatal", "a bias on attention's output projection", True)
    tied_head: bool = key("fatal", "the head is the token embedding", False)

    @model_validator(mode="after")
    def heads_divide_the_embedding(self) -> Self:
        if self.emb_dim % self.n_heads:
            suggested = max(1, self.emb_dim // self.n_heads) * self.n_heads
            raise ValueError(
                f"emb_dim={self.emb_dim} is not divisible by n_heads={self.n_heads}; use {suggested} or change n_heads"
            )
        return self

    @property
    def head_width(self) -> int:
        return self.emb_dim // self.n_heads

    def warnings(self) -> list[str]:
        """List what is legal but slow or surprising."""
        if self.n_layers and (self.head_width % 8 or self.head_width > 128):
            return [
                f"head width {self.head_width} (emb_dim / n_heads): cuDNN attention takes multiples of 8 up to 128, "
                "so a GPU will use slower attention"
            ]
        return []
