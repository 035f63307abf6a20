"""GPT-2's names in Hugging Face's format and here, as one table.

Hugging Face's names are those of `transformers.GPT2LMHeadModel`. Its linear layers are stored as (in, out), with
queries, keys and values side by side in one matrix, as they are here: arrays are renamed, and none is transposed or
split.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from outside_in.config import ModelConfig
from outside_in.config_files import parse_config
from outside_in.huggingface import tensors

# The name in this package, Hugging Face's name, and the axes: V vocabulary, T context, D embedding, F feed-forward.
TABLE = (
    ("token_embedding.embedding", "wte.weight", "V D"),
    ("position_embedding.embedding", "wpe.weight", "T D"),
    ("output_norm.scale", "ln_f.weight", "D"),
    ("output_norm.bias", "ln_f.bias", "D"),
    ("head.embedding", "lm_head.weight", "V D"),
)
TABLE_OF_A_BLOCK = (
    ("attention_norm.scale", "ln_1.weight", "D"),
    ("attention_norm.bias", "ln_1.bias", "D"),
    ("attention.query_key_value.kernel", "attn.c_attn.weight", "D 3D"),
    ("attention.query_key_value.bias", "attn.c_attn.bias", "3D"),
    ("attention.output.kernel", "attn.c_proj.weight", "D D"),
    ("attention.output.bias", "attn.c_proj.bias", "D"),
    ("feed_forward_norm.scale", "ln_2.weight", "D"),
    ("feed_forward_norm.bias", "ln_2.bias", "D"),
    ("feed_forward.expand.kernel", "mlp.c_fc.weight", "D F"),
    ("feed_forward.expand.bias", "mlp.c_fc.bias", "F"),
    ("feed_forward.project.kernel", "mlp.c_proj.weight", "F D"),
    ("feed_forward.project.bias", "mlp.c_proj.bias", "D"),
)
PREFIX, HEAD = "transformer.", "lm_head.weight"  # the prefix is left out in OpenAI's own files
MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # a buffer that older files hold: no weight
BIASES = {
    "qkv_bias": ("attention.query_key_value.bias",),
    "attention_output_bias": ("attention.output.bias",),
    "bias": ("feed_forward.expand.bias", "feed_forward.project.bias"),
}
SHAPE = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
    "feed_forward_dim": "n_inner",
}
HELD = (*SHAPE, "feed_forward", "n_kv_heads", "position", "tied_head", "window_pattern")  # by the format, or by a check
HELD += ("bias", "qkv_bias", "attention_output_bias")
COMPUTED = {  # what the options of a GPT2Config may be, of those that change the numbers; the first is its default
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def import_config(hf_config: Mapping[str, Any], source: str) -> ModelConfig:
    """Return the model config of a `config.json` of Hugging Face.

    Raises ValueError when it has an unsupported option; `source` names the file in its message.
    """
    shape = {name: hf_config.get(hf_name) for name, hf_name in SHAPE.items()}
    shape |= {"qkv_bias": True, "tied_head": hf_config.get("tie_word_embeddings", True)}
    try:
        config = parse_config(json.dumps(shape), ModelConfig, source)
    except ValueError as error:
        raise ValueError(tensors.with_names(str(error), SHAPE | {"tied_head": "tie_word_embeddings"})) from None
    problems = [
        f"{option}={json.dumps(hf_config[option])}, expected {' or '.join(map(json.dumps, values))}"
        for option, values in COMPUTED.items()
        if hf_config.get(option, values[0]) not in values
    ]
    if problems:
        raise ValueError(f"{source}: unsupported options: {'; '.join(problems)[:1000]}")
    return config


def export_config(config: ModelConfig, end_of_text: int | None) -> dict[str, Any]:
    """Return the `config.json` of a model for Hugging Face.

    Raises ValueError when the model lacks one of GPT-2's parts, or has another.
    """
    needed = dict.fromkeys(("position_embedding", "pre_norm", "shortcut"), True)
    needed |= {} if config.activation == "gelu" else {"feed_forward": True}
    needed |= {"output_norm": True, "norm": "layer"}
    needed |= dict.fromkeys(("qk_norm", "embedding_scale", "value_embeddings"), False)
    needed |= dict.fromkeys(("logit_soft_cap", "sliding_window"), None)
    needed |= {} if config.num_kv_heads == config.n_heads else {"n_kv_heads": None}
    refused = tensors.differing(config, needed, HELD) + (", n_layers=0" if config.n_layers == 0 else "")
    if refused:
        raise ValueError(f"not a GPT-2, so it cannot be exported: its model.json says {refused.removeprefix(', ')}")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{hf_name: getattr(config, name) for name, hf_name in SHAPE.items()},
        **{option: values[0] for option, values in COMPUTED.items()},
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
    }


def import_weights(hf_arrays: Mapping[str, Any], config: ModelConfig, source: str) -> dict[str, np.ndarray]:
    """Return a model's arrays, float32, from Hugging Face's.

    The latter need only `shape` and `dtype` before they are read. Raises ValueError that names all that is missing,
    unknown, or of another shape, before anything is read.
    """
    short: dict[str, Any] = {}
    problems = []
    for name, array in hf_arrays.items():
        key = name.removeprefix(PREFIX)
        if key in short:
            problems.append(f"{key} appears twice, with and without {PREFIX!r}")
        if not MASK.fullmatch(key):
            short[key] = array
    head = short.pop(HEAD, None) if config.tied_head else None  # then it is the token embedding once more
    expected = _names(config)
    tensors.check(short, {name: shape for name, (_, shape) in expected.items()}, source, problems)
    arrays = {name: tensors.single(short[hf_name], f"{source}: {hf_name}") for hf_name, (name, _) in expected.items()}
    tensors.check_tied(head, arrays[TABLE[0][0]], "wte.weight", source)
    return arrays


def export_weights(arrays: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Return a model's arrays under Hugging Face's names.

    Biases that the model does not have are zeros. Raises ValueError that names an array that GPT-2 does not have.
    """
    if unknown := sorted(arrays.keys() - {name for name, _ in _names(config).values()}):
        raise ValueError(f"{unknown[0]}: GPT-2 has no such parameter, so this model cannot be exported")
    lacking = tuple(name for switch, names in BIASES.items() if not getattr(config, switch) for name in names)
    return {
        hf_name if hf_name == HEAD else PREFIX + hf_name: np.zeros(shape, np.float32)
        if name.endswith(lacking)
        else arrays[name]
        for hf_name, (name, shape) in _names(config).items()
    }


def without_zero_biases(
    arrays: Mapping[str, np.ndarray], config: ModelConfig, original: ModelConfig
) -> tuple[dict[str, np.ndarray], ModelConfig]:
    """Remove the biases that `export_weights` added to a model, `original`."""
    for switch, biases in BIASES.items():
        names = [name for name in arrays if name.endswith(biases)]
        if not getattr(original, switch) and not any(arrays[name].any() for name in names):
            arrays = {name: array for name, array in arrays.items() if name not in names}
            config = config.model_copy(update={switch: False})
    return dict(arrays), config


def _names(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the name here, and the shape, of each of GPT-2's arrays.

    The keys are Hugging Face's names, without the prefix.
    """
    width = config.emb_dim
    sizes = {"V": config.vocab_size, "T": config.context_length, "D": width, "3D": 3 * width, "F": config.inner_width}
    rows = [row for row in TABLE if not (config.tied_head and row[1] == HEAD)]
    for layer in range(config.n_layers):
        rows += [(f"blocks.{layer}.{name}", f"h.{layer}.{hf_name}", axes) for name, hf_name, axes in TABLE_OF_A_BLOCK]
    return {hf_name: (name, tuple(sizes[axis] for axis in axes.split())) for name, hf_name, axes in rows}
