"""A model from one `model.safetensors`: its shape rides in the file, so a copied file works anywhere."""

from pathlib import Path

from config import ModelConfig, parse_config
from model import GPTModel, create_model
from weights import load_model, read_model_json


def load_saved_model(path: Path) -> GPTModel:
    """Build the model that a weights file describes and load its weights, for inference in float32.

    Raises ValueError when the file is not one that training has saved.
    """
    config = parse_config(read_model_json(path), ModelConfig, f"{path}: model.json in its metadata")
    model = create_model(config, seed=0)
    load_model(path, model)
    return model
