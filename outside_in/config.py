"""The schema of `train.json`: keys, defaults, limits, class on resume; that of `model.json` is in `model_config.py`.

`train.py --help-keys` prints both.
"""

import json
import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PlainSerializer, model_validator

from outside_in.config_files import MIN_FLOAT32, Config, Count, Float32, MaxNorm, key
from outside_in.model_config import ModelConfig
from outside_in.storage.text import counted


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"expected each name once, got {twice!r} {names.count(twice)} times")
    return names


LogTo = Annotated[
    tuple[Literal["tensorboard", "trackio", "wandb"], ...],
    Field(strict=False),
    AfterValidator(_each_once),
    PlainSerializer(list),
]


UNUSED = {  # keys that a choice does not use, so that setting them must be a mistake
    ("optimizer", "adamw"): ("muon_learning_rate",),
    ("optimizer", "lion"): ("muon_learning_rate", "epsilon"),
    ("optimizer", "adafactor"): ("muon_learning_rate", "beta1", "beta2", "epsilon"),
    ("schedule", "cosine"): ("decay_percent",),
    ("schedule", "linear"): ("decay_percent",),
    ("schedule", "constant"): ("decay_percent", "final_learning_rate_percent"),
}


class MeshConfig(Config):
    """The axes of the device mesh."""

    data: Count = key("free", "devices that share the sequences; -1: those that fsdp leaves", -1, ge=-1)
    fsdp: Count = key("free", "devices that share the sequences and the parameters", 1, ge=1)

    @model_validator(mode="after")
    def some_devices(self) -> Self:
        if self.data == 0:
            raise ValueError("data=0: expected -1 (what fsdp leaves) or a number of devices")
        return self


class TrainConfig(Config):
    """`train.json`: data, batch geometry, optimizer and housekeeping of one run."""

    dataset: str = key(
        "free",
        "a folder, a built-in name, or hub:owner/name; on resume its tokens must be the same, wherever they are",
        min_length=1,
    )
    microbatch_size: Count = key("fatal", "sequences on each device", ge=1)
    gradient_accumulation_steps: Count = key("fatal", "microbatches in a global step", ge=1)
    min_train_tokens: Count = key("announced", "tokens per epoch, rounded up to whole global steps; -1: all", ge=-1)
    learning_rate: Float32 = key("announced", "the schedule's peak", gt=0, le=1e3)

    initial_weights: str | None = key(
        "free",
        "a model.safetensors to start from, by its path from here or in the run; null: random",
        None,
        min_length=1,
    )
    objective: Literal["next-token", "a-to-a"] = key(
        "fatal", "predict the next token; a-to-a: repeat the input", "next-token"
    )
    microbatches_per_call: Count | None = key(
        "fatal", "microbatches in a compiled call; null: all of a global step", None, ge=1
    )
    epochs: Count = key("announced", "passes over the training tokens", 1, ge=1)
    shuffle: bool = key(  # the first epoch too: neighbors in a file are alike, a poor batch
        "fatal", "shuffle the first epoch, too; false: it reads the file in its own order", True
    )
    start_train_token: Count = key("fatal", "first token of the training file that is used", 0, ge=0)
    start_val_token: Count = key("announced", "first token of the validation file that is used", 0, ge=0)
    val_tokens: Count = key("announced", "validation tokens at most; 0: no validation; -1: all", 65_536, ge=-1)
    optimizer: Literal["adamw", "muon", "lion", "adafactor"] = key(
        "fatal", "the rule of updates; muon: for the matrices of blocks, AdamW for the rest", "adamw"
    )
    muon_learning_rate: Float32 | None = key(
        "announced", "the peak for the matrices of blocks under muon; null: learning_rate", None, gt=0, le=1e3
    )
    weight_decay: Float32 = key("announced", "decay of the parameters, times the learning rate", 0.01, ge=0)
    weight_decay_on: Literal["all", "matrices"] = key(
        "announced", "what decays: all, or matrices, so not biases, norms and other vectors", "all"
    )
    beta1: Float32 = key(
        "announced",
        "memory of gradients: 1 / (1 - beta1) steps; lion: share of the momentum in an update",
        0.9,
        ge=0,
        lt=1,
    )
    beta2: Float32 = key(
        "announced",
        "memory of squared gradients (lion: of gradients): 1 / (1 - beta2) steps",
        0.999,
        ge=0,
        lt=1,
    )
    epsilon: Float32 = key("announced", "what AdamW adds to the divisor of an update", 1e-8, ge=MIN_FLOAT32)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = key(
        "announced", "the learning rate after the warmup; wsd: constant, then linear decay at the end", "cosine"
    )
    warmup_period_percent: float = key(
        "announced", "share of the run in which the learning rate rises", 5.0, ge=0, lt=100
    )
    warmup_tokens: Count | None = key(
        "announced",
        "tokens in which it rises, rounded up to whole global steps; null: warmup_period_percent",
        None,
        ge=0,
    )
    decay_percent: float = key("announced", "share of the run in which wsd decays", 20.0, gt=0, le=100)
    final_learning_rate_percent: float = key(
        "announced", "share of learning_rate to which cosine, linear and wsd decay", 10.0, ge=0, le=100
    )
    clipping_max_norm: MaxNorm | None = key(
        "announced", "limit for the norm of all gradients together; null: no clipping", 3.5, gt=0
    )
    drop_rate: Float32 = key("announced", "share of activations that dropout sets to zero", 0.0, ge=0, lt=1)
    seed: int = key("fatal", "seed of parameters, data order and dropout", 42, ge=0, lt=2**31)
    precision: Literal["float32", "bfloat16"] = key(
        "announced", "precision of computing, float32 or bfloat16; parameters stay float32", "float32"
    )
    loss_rows_per_chunk: Count | None = key(
        "announced", "rows of logits at a time; null: by shape and device", None, ge=1
    )
    remat: Literal["none", "blocks"] = key(
        "free", "gradient checkpointing; blocks: keep only their inputs, which saves memory and is slower", "none"
    )
    checkpoint_interval: Count = key("free", "global steps between checkpoints", 250, ge=1)
    checkpoint_first_step: bool = key(
        "free", "also a checkpoint after the first step, to compare later ones with", False
    )
    keep_checkpoints: Count | None = key(
        "free", "newest checkpoints that are kept, beside the best; null: all", 3, ge=1
    )
    layer_norms_interval: Count | None = key(
        "free", "global steps between records of each layer's gradient and update norms; null: none", None, ge=1
    )
    max_consecutive_rejections: Count = key("free", "rejected updates in a row that end the run", 10, ge=1)
    sample_prompt: str = key(
        "free", "what the samples at each checkpoint complete", "Every effort moves you", min_length=1
    )
    log_to: LogTo = key("free", "programs that show the metrics and samples too: tensorboard, trackio, wandb", ())
    mesh: MeshConfig = key("free", "how several devices share the work", MeshConfig())

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

    @model_validator(mode="after")
    def what_is_set_is_used(self) -> Self:
        for (choice, value), names in UNUSED.items():
            for name in names if getattr(self, choice) == value else ():
                if getattr(self, name) != (default := type(self).model_fields[name].default):
                    remedy = f"set {name}={json.dumps(default)}, its default, or use another {choice}"
                    raise ValueError(f'{choice}="{value}" has no {name}; {remedy}')
        return self

    @model_validator(mode="after")
    def the_schedule_fits(self) -> Self:
        warmup, decay = self.warmup_period_percent, self.decay_percent
        if self.schedule == "wsd" and self.warmup_tokens is None and warmup + decay > 100:
            raise ValueError(
                f"warmup_period_percent={warmup:g} and decay_percent={decay:g} are more than 100 together; lower one"
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
