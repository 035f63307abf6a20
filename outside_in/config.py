"""The schema of `model.json` and `train.json`: keys, defaults, limits, class on resume."""

import math
from typing import Any, Literal, Self

from pydantic import model_validator

from outside_in.config_files import Config, Count, Float32, MaxNorm, key
from outside_in.storage.text import counted


class ModelConfig(Config):
    """`model.json`: the model's shape, and a switch for every part.

    `n_layers` 0 is the A-to-A shell: token embedding, un-embedding, and what the switches add.
    """

    vocab_size: int = key("fatal", ge=2, le=65_536)  # token ids are uint16
    context_length: Count = key("fatal", ge=1)
    emb_dim: int = key("fatal", ge=1)  # what fits into memory limits it
    n_heads: int = key("fatal", ge=1)
    n_layers: int = key("fatal", ge=0, le=1_000)  # they are compiled one by one
    qkv_bias: bool = key("fatal")
    position_embedding: bool = key("fatal", True)
    pre_norm: bool = key("fatal", True)
    shortcut: bool = key("fatal", True)
    feed_forward: bool = key("fatal", True)
    output_norm: bool = key("fatal", True)
    attention_output_bias: bool = key("fatal", True)
    tied_head: bool = key("fatal", False)

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


class MeshConfig(Config):
    """The axes of the device mesh.

    Sequences are sharded over both, parameters over `fsdp`; -1 takes the devices that are left.
    """

    data: Count = key("free", -1, ge=-1)
    fsdp: Count = key("free", 1, ge=1)

    @model_validator(mode="after")
    def some_devices(self) -> Self:
        if self.data == 0:
            raise ValueError("data=0: expected -1 (what fsdp leaves) or a number of devices")
        return self


class TrainConfig(Config):
    """`train.json`: data, batch geometry, optimizer and housekeeping of one run."""

    dataset: str = key("free", min_length=1)  # where the tokens are; that they are the same is checked on resume
    microbatch_size: Count = key("fatal", ge=1)  # sequences on each device
    gradient_accumulation_steps: Count = key("fatal", ge=1)
    min_train_tokens: Count = key("announced", ge=-1)  # per epoch; -1: all of them
    learning_rate: Float32 = key("announced", gt=0, le=1e3)  # the schedule's peak

    initial_weights: str | None = key(
        "free", None, min_length=1
    )  # a model.safetensors, from here or from the run; None: random
    objective: Literal["next-token", "a-to-a"] = key("fatal", "next-token")
    microbatches_per_call: Count | None = key("fatal", None, ge=1)  # None: all of a global step
    epochs: Count = key("announced", 1, ge=1)
    shuffle: bool = key("fatal", True)  # the first epoch too: neighbors in a file are alike, a poor batch
    start_train_token: Count = key("fatal", 0, ge=0)
    start_val_token: Count = key("announced", 0, ge=0)
    val_tokens: Count = key("announced", 65_536, ge=-1)  # at most this many; 0: no validation; -1: all
    weight_decay: Float32 = key("announced", 0.01, ge=0)
    weight_decay_on: Literal["all", "matrices"] = key("announced", "all")  # matrices: not biases and norms
    beta2: Float32 = key("announced", 0.999, ge=0, lt=1)  # AdamW's memory of squared gradients: 1 / (1 - beta2) steps
    warmup_period_percent: float = key("announced", 5.0, ge=0, lt=100)
    clipping_max_norm: MaxNorm | None = key("announced", 3.5, gt=0)  # of all gradients together; None: no clipping
    drop_rate: Float32 = key("announced", 0.0, ge=0, lt=1)
    seed: int = key("fatal", 42, ge=0, lt=2**31)
    precision: Literal["float32", "bfloat16"] = key("announced", "float32")
    loss_rows_per_chunk: Count | None = key("announced", None, ge=1)  # of logits at a time; None: by shape and device
    remat: Literal["none", "blocks"] = key("free", "none")  # gradient checkpointing: less memory, slower
    checkpoint_interval: Count = key("free", 250, ge=1)  # global steps
    checkpoint_first_step: bool = key("free", False)  # also one after the first step, to compare later ones with
    keep_checkpoints: Count | None = key("free", 3, ge=1)  # newest ones, beside best; None: all
    max_consecutive_rejections: Count = key("free", 10, ge=1)
    sample_prompt: str = key("free", "Every effort moves you", min_length=1)
    mesh: MeshConfig = key("free", MeshConfig())

    @model_validator(mode="after")
    def sizes_fit_together(self) -> Self:
        if self.min_train_tokens == 0:
            raise ValueError("min_train_tokens=0: expected -1 (all tokens) or a positive number")
        steps, per_call = self.gradient_accumulation_steps, self.microbatches_per_call
        if per_call is not None and steps % per_call:
            divisors = ", ".join(str(d) for d in range(1, min(steps, 1000) + 1) if steps % d == 0)
            raise ValueError(
                f"microbatches_per_call={per_call} does not divide gradient_accumulation_steps={steps}; "
                f"use one of {divisors}"
            )
        return self

    @property
    def calls_per_step(self) -> int:
        """Return the compiled calls per global step."""
        return self.gradient_accumulation_steps // (self.microbatches_per_call or self.gradient_accumulation_steps)


def tokens_per_global_step(model: ModelConfig, train: TrainConfig, devices: int = 1) -> int:
    """Count the training tokens of one global step, all devices."""
    return train.gradient_accumulation_steps * train.microbatch_size * devices * model.context_length


def with_sequences_per_step(train: TrainConfig, sequences: int, devices: int) -> TrainConfig:
    """Return the config with `sequences` per global step on `devices` devices.

    Only the number of microbatches changes. Raises ValueError, with what would work, when none fits.
    """
    size = train.microbatch_size * devices
    if sequences % size:
        divisors = [d for d in range(1, sequences + 1) if sequences % d == 0]
        sizes = " or ".join(str(d // devices) for d in divisors if d % devices == 0)
        counts = " or ".join(str(d // train.microbatch_size) for d in divisors if d % train.microbatch_size == 0)
        raise ValueError(
            f"a global step of this run has {sequences} sequences, which microbatches of {train.microbatch_size} on "
            f"{counted(devices, 'device')} do not divide; use {counts} devices (mesh)"
            + (f", or start a new run with microbatch_size {sizes}" if sizes else "")
        )
    steps = sequences // size
    per_call = train.microbatches_per_call and math.gcd(train.microbatches_per_call, steps)
    return train.model_copy(update={"gradient_accumulation_steps": steps, "microbatches_per_call": per_call})


def devices_at_start(config: TrainConfig, meta: dict[str, Any]) -> int:
    """Return on how many devices a run started, from a checkpoint's meta. That sets the size of a global step."""
    of_one = config.gradient_accumulation_steps * config.microbatch_size
    sequences = meta.get("sequences_per_step", of_one)
    if not isinstance(sequences, int) or sequences < of_one or sequences % of_one:
        raise ValueError(f"sequences_per_step of the checkpoint: expected a multiple of {of_one}, got {sequences!r}")
    return sequences // of_one


def steps_per_epoch(
    model: ModelConfig, train: TrainConfig, available_tokens: int | None = None, devices: int = 1
) -> int | None:
    """Count the global steps of one epoch.

    That is `min_train_tokens` rounded up to whole global steps. If it is -1, `available_tokens` decides: those from
    `start_train_token` to the end of the data, one of which is only a target. Returns None when they are needed and
    unknown.
    """
    tokens_per_step = tokens_per_global_step(model, train, devices)
    if train.min_train_tokens != -1:
        return -(-train.min_train_tokens // tokens_per_step)
    return None if available_tokens is None else max(0, available_tokens - 1) // tokens_per_step
