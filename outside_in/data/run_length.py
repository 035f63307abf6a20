"""How many tokens and global steps a run has."""

from pathlib import Path
from typing import NamedTuple

from outside_in.config import ModelConfig, TrainConfig, steps_per_epoch, tokens_per_global_step
from outside_in.data.builtin import find_builtin
from outside_in.data.prepare.description import recorded_leakage
from outside_in.data.sources import dataset_folder, dataset_tokenizer
from outside_in.data.token_files import TRAIN, count_tokens, find_validation
from outside_in.data.tokenizer import Tokenizer, assumed
from outside_in.storage.text import counted

MAX_STEPS = 2**31 - 1  # optax counts in int32


def tokens_available(config: TrainConfig, *, fetch: bool = False) -> int | None:
    """Count the training tokens from `start_train_token` on.

    Returns None when the data are not here and `fetch` is off.
    """
    path = dataset_folder(config.dataset, fetch=fetch) / TRAIN
    if not fetch and not path.exists():
        return None
    return max(0, count_tokens(path) - config.start_train_token)


class KnownData(NamedTuple):
    """What is known of a run's data before they are fetched."""

    tokens: int | None = None  # for training, from `start_train_token` on
    leaked_share: float | None = None  # of validation, that occurs in training
    tokenizer: Tokenizer | None = None


NOTHING_KNOWN = KnownData()


def known_data(config: TrainConfig) -> KnownData:
    """Return what is known of a run's data; nothing is fetched."""
    share = recorded_leakage(dataset_folder(config.dataset, fetch=False))
    return KnownData(tokens_available(config), share, dataset_tokenizer(config.dataset))


def total_steps(model_config: ModelConfig, config: TrainConfig, devices: int = 1, *, fetch: bool = False) -> int | None:
    """Count the global steps of a run that starts on `devices` devices.

    Returns None when that needs data that are not here and `fetch` is off. Raises ValueError when there are none, or
    more than can be counted.
    """
    steps, available = steps_per_epoch(model_config, config, devices=devices), None
    if steps is None:
        available = tokens_available(config, fetch=fetch)
        steps = steps_per_epoch(model_config, config, available, devices)
    if steps is None:
        return None
    if not steps:
        raise ValueError(
            f"train.json: {config.dataset} has too few tokens for one global step, which takes "
            f"{tokens_per_global_step(model_config, config, devices):,} and a target, got {available:,} after "
            "start_train_token; use a smaller microbatch_size or fewer gradient_accumulation_steps"
        )
    if (total := steps * config.epochs) > MAX_STEPS:
        raise ValueError(f"train.json: expected at most {MAX_STEPS:,} global steps, got {total:,}; use fewer epochs")
    return total


def fetch_and_count_steps(model_config: ModelConfig, config: TrainConfig, devices: int = 1) -> int:
    """Count the global steps as `total_steps` does, and download the data if needed."""
    total = total_steps(model_config, config, devices, fetch=True)
    assert total
    return total


def spare_sequences(model: ModelConfig, train: TrainConfig, steps_per_epoch: int, devices: int = 1) -> int:
    """Count the whole sequences of the data that are too few for another step; 0 unless a run takes all tokens."""
    available = tokens_available(train)
    if train.min_train_tokens != -1 or not available:
        return 0
    per_step = tokens_per_global_step(model, train, devices)
    return (available - 1 - steps_per_epoch * per_step) // model.context_length


def find_lengths(
    folder: Path, model: ModelConfig, train: TrainConfig, steps_per_epoch: int, devices: int = 1
) -> tuple[int, int]:
    """Return how many tokens a run reads for training and for validation, each with a target after the last.

    Validation takes at most `val_tokens`, in whole batches of `microbatch_size` sequences; 0: there is none.
    Raises ValueError when a token file is missing, has another name, or is too short. Only headers are read.
    """
    path, per_step = folder / TRAIN, tokens_per_global_step(model, train, devices)
    count, available = steps_per_epoch * per_step + 1, count_tokens(path)
    if (needed := train.start_train_token + count) > available:
        possible = max(0, available - train.start_train_token - 1) // per_step
        raise ValueError(
            f"{path}: expected at least {needed:,} tokens, got {available:,}: enough for "
            f"{counted(possible, 'step')} of {per_step:,} tokens and a target, not for {steps_per_epoch:,}; "
            + (f"use min_train_tokens {possible * per_step} or -1" if possible else "use fewer tokens per step")
        )
    path = find_validation(folder) if train.val_tokens else None
    if path is None:
        return count, 0
    available = count_tokens(path) - train.start_val_token - 1  # the last one is a target only
    per_batch = train.microbatch_size * model.context_length
    batches = (available if train.val_tokens == -1 else min(train.val_tokens, available)) // per_batch
    if batches < 1:
        raise ValueError(
            f"{path}: expected at least {per_batch:,} tokens for a validation batch, got val_tokens="
            f"{train.val_tokens:,} of {max(0, available):,} after start_val_token; change them, or set val_tokens to 0"
        )
    return count, batches * per_batch + 1


def find_data_tokenizer(model: ModelConfig, config: TrainConfig) -> Tokenizer | None:
    """Return the tokenizer of the data, perhaps assumed from the vocabulary's size.

    Raises ValueError when the model's vocabulary is smaller.
    """
    known = dataset_tokenizer(config.dataset)
    made_with = known or find_builtin(config.dataset)
    if made_with and made_with.vocab_size > model.vocab_size:
        raise ValueError(
            f"model.json: vocab_size={model.vocab_size}, but {config.dataset} has tokens of "
            f"{known or 'a tokenizer of its own'}; use vocab_size {made_with.vocab_size} or more"
        )
    return known or assumed(model.vocab_size)
