"""`--new`: a run like another one, with some keys changed."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from outside_in import overrides
from outside_in.config import ModelConfig, TrainConfig, tokens_per_global_step
from outside_in.config_files import parse_config
from outside_in.data.builtin import find_builtin
from outside_in.data.sources import dataset_folder, dataset_tokenizer, is_on_hub
from outside_in.data.token_files import TRAIN, count_tokens, find_validation
from outside_in.overrides import Keys
from outside_in.runtime.log import log
from outside_in.storage import atomic
from outside_in.storage.run_directory import RunDirectory, find_runs
from outside_in.storage.strict_json import parse_object, read_text

OF_OLD_DATA = ("start_train_token", "start_val_token")


def make_run(folder: Path, like: Path, changes: Sequence[str]) -> None:
    """Write `model.json` and `train.json` of a new run.

    They are those of the run `like`, with changes of the form KEY=VALUE. With another dataset, the vocabulary is the
    data's, and few data are trained on in several epochs, so that the run is about as long.
    Raises ValueError, and writes nothing, when `folder` exists or the result is not a valid run.
    """
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{folder}: already exists; choose another name for --new")
    if above := next((path for path in folder.parents if RunDirectory(path).train_config.exists()), None):
        raise ValueError(
            f"{folder}: {above} is a run, so nothing in it would be trained; choose another folder for --new"
        )
    old = RunDirectory(like)
    old.check()
    if not old.train_config.exists() and (runs := find_runs(like)):
        raise ValueError(f"{like}: is a folder of runs; name one of them for --like, such as {runs[0].path}")
    model, train = (
        parse_object(read_text(path, "a config of a few lines"), str(path))
        for path in (old.model_config, old.train_config)
    )
    values = overrides.parse(changes)
    overrides.apply(model, train, values)
    changed = [overrides.top_key(key) for key in values]
    if "dataset" in changed:
        changed += adapt(model, train, changed)
    new = RunDirectory(folder)
    files = {new.model_config: (model, ModelConfig), new.train_config: (train, TrainConfig)}
    for path, (keys, config_class) in files.items():
        parse_config(json.dumps(keys), config_class, str(path))
    with atomic.atomic_directory(folder) as staging:
        for path, (keys, _) in files.items():
            (staging / path.name).write_text(json.dumps(keys, indent=2) + "\n")
    every = {**{f"model.{key}": value for key, value in model.items()}, **train}
    listed = [f"{key}={json.dumps(every[key])}" for key in dict.fromkeys(changed) if key in every]
    log.info(f"{folder} is {like} with {', '.join(listed) or 'nothing changed'}")
    log.info(f"train it: {overrides.train_line(folder, [])}")


def adapt(model: Keys, train: Keys, changed: Sequence[str]) -> list[str]:
    """Adapt the vocabulary and the length to another dataset; return the keys that have changed."""
    dataset, adapted = str(train["dataset"]), []
    folder = dataset_folder(dataset, fetch=False)
    made_with = find_builtin(dataset) or dataset_tokenizer(dataset)
    if "model.vocab_size" not in changed and made_with:
        model["vocab_size"] = made_with.vocab_size
        adapted.append("model.vocab_size")
    for key in set(OF_OLD_DATA).difference(changed):
        train.pop(key, None)
    tokens_path = folder / TRAIN
    if not tokens_path.is_file() and (find_builtin(dataset) or is_on_hub(dataset)):  # not downloaded or made yet
        return adapted
    available = count_tokens(tokens_path)
    if {"min_train_tokens", "epochs"}.isdisjoint(changed):
        adapted += adapt_length(model, train, available)
    if "val_tokens" not in changed and train.get("val_tokens") != 0:
        if validation_path := find_validation(folder):
            check_validation(model, train, count_tokens(validation_path))
        else:
            train["val_tokens"] = 0
            adapted.append("val_tokens")
    return adapted


def adapt_length(model: Keys, train: Keys, available: int) -> list[str]:
    """Train on all tokens, in as many epochs as make the run as long as it was, if they are too few for one.

    Returns the keys that have changed. Raises ValueError when they are too few for one global step.
    """
    model_config, config = parsed(model, train)
    per_step = tokens_per_global_step(model_config, config)
    if available <= per_step:
        raise ValueError(
            f"{config.dataset}: {available:,} training tokens, but one global step takes {per_step:,} and a target; "
            "add text, or set a smaller microbatch_size or model.context_length"
        )
    steps = math.ceil(config.min_train_tokens / per_step)  # 0 for all tokens, -1
    possible = (available - 1) // per_step
    if steps <= possible:
        return []
    train["min_train_tokens"], train["epochs"] = -1, max(1, round(steps * config.epochs / possible))
    return ["min_train_tokens", "epochs"]


def check_validation(model: Keys, train: Keys, available: int) -> None:
    """Raise ValueError when there are too few validation tokens for a batch."""
    model_config, config = parsed(model, train)
    needed = config.microbatch_size * model_config.context_length
    if available <= needed:
        raise ValueError(
            f"{config.dataset}: {available:,} validation tokens, but a batch takes {needed:,} and a target; prepare it "
            "with a larger --validation, such as 10%, and --overwrite, or add val_tokens=0 here to go without"
        )


def parsed(model: Keys, train: Keys) -> tuple[ModelConfig, TrainConfig]:
    model_config = parse_config(json.dumps(model), ModelConfig, "model.json")
    return model_config, parse_config(json.dumps(train), TrainConfig, "train.json")
