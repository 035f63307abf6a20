"""A model from one `model.safetensors`: its shape rides in the file, so a copied file works anywhere."""

from pathlib import Path

from flax import nnx

import manifest
from config import MEMORY_BYTES, ModelConfig, parse_config
from model import GPTModel
from weights import load_model, load_weights, read_model_json


def load_saved_model(path: Path) -> GPTModel:
    """Build the model that a weights file describes and load its weights, for inference in float32.

    Raises ValueError when the file is not one that training has saved, damaged, or too large for this machine.
    """
    config = parse_config(read_model_json(path), ModelConfig, f"{path}: model.json in its metadata")
    num_arrays = len(load_weights(path))
    if config.n_layers > num_arrays:
        raise ValueError(f"{path}: model.json in its metadata has more layers than the file has arrays, {num_arrays}")
    if path.stat().st_size > MEMORY_BYTES:
        raise ValueError(f"{path}: expected at most {MEMORY_BYTES:,} bytes, this machine's memory, got more")
    model = _without_arrays(config)
    load_model(path, model)
    manifest.check_alone(path)
    return model


def _without_arrays(config: ModelConfig) -> GPTModel:
    """Build a model that knows the shapes of its arrays and takes no memory for them, whatever the config says.

    One layer is traced and repeated: tracing takes time with the square of the layers.
    """
    shallow = config.model_copy(update={"n_layers": min(config.n_layers, 1)})
    model = nnx.eval_shape(lambda: GPTModel(shallow, nnx.Rngs(0)))
    model.config = config
    model.blocks = nnx.List([nnx.clone(block) for block in model.blocks for _ in range(config.n_layers)])
    return model
