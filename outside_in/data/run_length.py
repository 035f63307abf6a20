"""How many tokens and global steps a run has."""

from typing import NamedTuple

from outside_in.config import ModelConfig, TrainConfig, steps_per_epoch
from outside_in.data.prepare.description import recorded_leakage
from outside_in.data.sources import dataset_folder, dataset_tokenizer
from outside_in.data.token_files import count_tokens
from outside_in.data.tokenizer import Tokenizer


def tokens_available(config: TrainConfig, *, fetch: bool = False) -> int | None:
    """Count the training tokens from `start_train_token` on.

    Returns None when the data are not here and `fetch` is off.
    """
    path = dataset_folder(config.dataset, fetch=fetch) / "train.safetensors"
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

    Returns None when that needs data that are not here and `fetch` is off.
    """
    steps = steps_per_epoch(model_config, config, devices=devices)
    if steps is None:
        steps = steps_per_epoch(model_config, config, tokens_available(config, fetch=fetch), devices)
    return None if steps is None else steps * config.epochs


def whole_steps(model_config: ModelConfig, config: TrainConfig, devices: int = 1) -> int:
    """Count the global steps as `total_steps` does, downloading the data if needed.

    Raises ValueError when there are none.
    """
    total = total_steps(model_config, config, devices, fetch=True)
    if not total:
        raise ValueError(f"train.json: {config.dataset} has too few tokens for one global step")
    return total
