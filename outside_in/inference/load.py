"""Loads a model from one `model.safetensors`, which holds its shape too."""

from pathlib import Path

from checkpointing import MODEL_FILE
from model import GPTModel, abstract_model
from outside_in.config import ModelConfig, TrainConfig
from outside_in.config_files import parse_config
from outside_in.data.hub import HUB_ID
from outside_in.data.run_length import find_data_tokenizer
from outside_in.data.tokenizer import TOKENIZER_FILE, Tokenizer, assumed, check_same
from outside_in.data.tokenizer_files import from_identity, load
from outside_in.runtime.machine import memory_bytes
from outside_in.storage import manifest
from outside_in.storage.checkpoint_folder import find_best, find_checkpoints, find_named
from outside_in.storage.run_directory import RunDirectory, check_not_hugging_face, import_advice
from outside_in.storage.strict_json import parse_object
from outside_in.weights import TOKENIZER_KEY, load_model, load_weights, read_metadata, read_model_json

MAX_SHARED_LAYERS = 100  # more, whose blocks have no arrays of their own, would take minutes to build


def load_saved_model(path: Path) -> GPTModel:
    """Load the model of a weights file, for inference in float32.

    Raises ValueError when the file was not saved by training, is damaged, or is too large for this machine.
    """
    check_is_ours(path)
    config = parse_config(read_model_json(path), ModelConfig, f"{path}: model.json in its metadata")
    num_arrays = len(load_weights(path))
    if config.n_layers > max(num_arrays, MAX_SHARED_LAYERS):
        raise ValueError(f"{path}: model.json in its metadata has more layers than the file has arrays, {num_arrays}")
    if path.stat().st_size > memory_bytes():
        raise ValueError(f"{path}: expected at most {memory_bytes():,} bytes, this machine's memory, got more")
    model = abstract_model(config)
    load_model(path, model)
    manifest.check_alone(path)
    return model


def check_is_ours(path: Path) -> None:
    """Raise ValueError when weights are those of a model in Hugging Face's format, or of PyTorch."""
    metadata = read_metadata(path)
    is_pytorch = "model.json" not in metadata and any(name.endswith(".weight") for name in load_weights(path))
    if "format" in metadata or is_pytorch:
        raise ValueError(f"{path}: {import_advice(path.parent)}")


def find_tokenizer(path: Path) -> Tokenizer | None:
    """Return the tokenizer that the model of a weights file was trained with.

    The file's metadata name it; a tokenizer.json lies beside the file. Where they do not, a vocabulary of GPT-2's size
    is taken for GPT-2's, and None is returned for others. Raises ValueError when the tokenizer.json is missing or
    another one.
    """
    metadata = read_metadata(path)
    if TOKENIZER_KEY in metadata:
        source = f"{path}: tokenizer in its metadata"
        return from_identity(parse_object(metadata[TOKENIZER_KEY], source), path.parent, str(path))
    if (path.parent / TOKENIZER_FILE).is_file():
        return load(path.parent)
    return assumed(parse_config(read_model_json(path), ModelConfig, str(path)).vocab_size)


def need_tokenizer(path: Path) -> Tokenizer:
    """Return what `find_tokenizer` does. Raises ValueError when it is unknown."""
    if found := find_tokenizer(path):
        return found
    raise ValueError(
        f"{path}: nothing says with which tokenizer it was trained, and its vocabulary is not GPT-2's; put its "
        f"{TOKENIZER_FILE} beside it"
    )


def find_weights(path: Path) -> Path:
    """Return the weights file of a file, a checkpoint or a run.

    Of a run that is its best checkpoint, else its newest, else the weights that it starts from. Raises ValueError when
    there is none.
    """
    run = RunDirectory(path)
    if path.parent.name == run.checkpoints.name and not path.is_dir():  # a link, which a copy of a run may lack
        named = find_named(find_checkpoints(path.parent), path.name)
        path = named.path if named else path
    check_not_hugging_face(path if path.is_dir() else path.parent)
    if path.is_file():
        return _ours(path)
    checkpoints = find_checkpoints(run.checkpoints)
    found = [c.path for c in (find_best(checkpoints), *checkpoints[-1:]) if c]
    folders = [path, *found, run.initial_weights.parent]
    for candidate in (folder / MODEL_FILE for folder in folders):
        if candidate.is_file():
            return _ours(candidate)
    there = "a folder without one" if path.is_dir() else "nothing"
    if not path.exists() and HUB_ID.fullmatch(str(path)) and not path.parent.is_dir():
        there += f"; a model of the Hub must be imported: uv run convert_gpt2.py import {path} RUN"
    raise ValueError(f"{path}: expected a {MODEL_FILE}, a checkpoint, or a run that has one, found {there}")


def _ours(path: Path) -> Path:
    check_is_ours(path)
    return path


def find_initial_weights(run: RunDirectory, model: ModelConfig, config: TrainConfig) -> Path | None:
    """Return the weights that a run starts from; None: random ones.

    Raises ValueError when they are missing, or another model's. Only the file's header is read.
    """
    if config.initial_weights is None:
        return None
    in_the_run = run.path / config.initial_weights  # as an import has it, so that a run can be moved
    path = in_the_run if in_the_run.is_file() else Path(config.initial_weights)
    check_not_hugging_face(path if path.is_dir() else path.parent)
    check_is_ours(path)
    found = parse_config(read_model_json(path), ModelConfig, f"{path}: model.json in its metadata").model_dump()
    expected = model.model_dump()
    if differing := [f"{key} {found[key]}, not {value}" for key, value in expected.items() if found[key] != value]:
        raise ValueError(f"initial_weights: {path} holds another model than model.json: {', '.join(differing)}")
    data_tokenizer = find_data_tokenizer(model, config)
    check_same(find_tokenizer(path), data_tokenizer, f"initial_weights: {path}", config.dataset)
    return path
