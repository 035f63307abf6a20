"""Loads a model from one `model.safetensors`, which holds its shape too."""

from pathlib import Path

from checkpointing import MODEL_FILE
from model import GPTModel, abstract_model
from outside_in.config import ModelConfig, parse_config
from outside_in.data.tokenizer import TOKENIZER_FILE, Tokenizer, assumed
from outside_in.data.tokenizer_files import from_identity, load
from outside_in.runtime.machine import memory_bytes
from outside_in.storage import manifest
from outside_in.storage.run_directory import RunDirectory
from outside_in.storage.strict_json import parse_object
from outside_in.weights import TOKENIZER_KEY, load_model, load_weights, read_metadata, read_model_json

MAX_SHARED_LAYERS = 100  # more, whose blocks have no arrays of their own, would take minutes to build


def load_saved_model(path: Path) -> GPTModel:
    """Load the model of a weights file, for inference in float32.

    Raises ValueError when the file was not saved by training, is damaged, or is too large for this machine.
    """
    config = parse_config(read_model_json(path), ModelConfig, f"{path}: model.json in its metadata")
    arrays = load_weights(path)
    num_arrays = len(arrays)
    if any(name.startswith("transformer.") for name in arrays):
        raise ValueError(
            f"{path}: is in transformers' format; import it: uv run convert_gpt2.py import {path.parent} RUN"
        )
    if config.n_layers > max(num_arrays, MAX_SHARED_LAYERS):
        raise ValueError(f"{path}: model.json in its metadata has more layers than the file has arrays, {num_arrays}")
    if path.stat().st_size > memory_bytes():
        raise ValueError(f"{path}: expected at most {memory_bytes():,} bytes, this machine's memory, got more")
    model = abstract_model(config)
    load_model(path, model)
    manifest.check_alone(path)
    return model


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
    if path.is_file():
        return path
    run = RunDirectory(path)
    folders = path, run.checkpoints / "best", run.checkpoints / "latest", run.initial_weights.parent
    for candidate in (folder / MODEL_FILE for folder in folders):
        if candidate.is_file():
            return candidate
    found = "a folder without one" if path.is_dir() else "nothing"
    raise ValueError(f"{path}: expected a {MODEL_FILE}, a checkpoint, or a run that has one, found {found}")
