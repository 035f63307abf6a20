"""Which of Hugging Face's formats a model has: GPT-2's, Llama's or Qwen3's. Each module has the same functions."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from model import parameter_shapes
from outside_in.config import ModelConfig
from outside_in.huggingface import gpt2_names, llama_names

FORMATS = {"gpt2": gpt2_names} | dict.fromkeys(llama_names.MODEL_TYPES, llama_names)


def of_config(hf_config: Mapping[str, Any], source: str) -> ModuleType:
    """Return the format of a `config.json`. Raises ValueError when it is another architecture's."""
    model_type = hf_config.get("model_type")
    if isinstance(model_type, str) and model_type in FORMATS:
        return FORMATS[model_type]
    found = model_type or hf_config.get("architectures") or "no model_type"
    known = ", ".join(FORMATS)
    raise ValueError(f"{source}: expected model_type one of {known}, got {str(found)[:60]!r}; no other can be imported")


def of_model(config: ModelConfig) -> ModuleType:
    """Return the format that may hold a model: positions decide. Its `export_config` refuses what it cannot hold."""
    return llama_names if config.position == "rope" else gpt2_names


def before_export(
    arrays: Mapping[str, np.ndarray], config: ModelConfig, original: ModelConfig
) -> tuple[dict[str, np.ndarray], ModelConfig]:
    """Return an export of this program as it was: without biases that were added, under its own config.

    `original` is the config in its metadata. It is left alone when it says something else than config.json.
    """
    names = of_model(config)
    if names is gpt2_names:
        arrays, config = gpt2_names.without_zero_biases(arrays, config, original)
    try:
        is_same = names.export_config(original, None) == names.export_config(config, None)
    except ValueError:  # another kind of model
        is_same = False
    return dict(arrays), original if is_same and parameter_shapes(original).keys() == arrays.keys() else config


def family(config: ModelConfig) -> str:
    """Return the name of a model's family, for people."""
    return "GPT-2" if of_model(config) is gpt2_names else "Qwen3" if config.qk_norm else "Llama"
