"""Names of Llama and Qwen3 in Hugging Face's format and here, as one table.

Hugging Face's names are those of `transformers.LlamaForCausalLM` and `Qwen3ForCausalLM`, which is a Llama with norms on
queries and keys, and windows. Their linear layers are stored as (out, in), here as (in, out), and queries, keys and
values are three matrices, here one. The pairs that positions rotate are the same.
"""

import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from outside_in.config import ModelConfig
from outside_in.config_files import parse_config
from outside_in.huggingface import tensors
from outside_in.layers.kernels import EPSILON
from outside_in.layers.rotary import BASE

LLAMA, QWEN3 = MODEL_TYPES = ("llama", "qwen3")
ARCHITECTURES = {LLAMA: "LlamaForCausalLM", QWEN3: "Qwen3ForCausalLM"}
HEAD = "lm_head.weight"
OLD_BUFFER = ".rotary_emb.inv_freq"  # that older files hold: no weight

# The name in this package, Hugging Face's names, which lie side by side here, and their axes: V vocabulary, D
# embedding, Q all query heads, K all key heads, H a head, F feed-forward.
TABLE = (
    ("token_embedding.embedding", {"model.embed_tokens.weight": "V D"}),
    ("output_norm.scale", {"model.norm.weight": "D"}),
    ("head.embedding", {HEAD: "V D"}),
)
TABLE_OF_A_BLOCK = (
    ("attention_norm.scale", {"input_layernorm.weight": "D"}),
    (
        "attention.query_key_value.kernel",
        {"self_attn.q_proj.weight": "Q D", "self_attn.k_proj.weight": "K D", "self_attn.v_proj.weight": "K D"},
    ),
    ("attention.query_norm.scale", {"self_attn.q_norm.weight": "H"}),
    ("attention.key_norm.scale", {"self_attn.k_norm.weight": "H"}),
    ("attention.output.kernel", {"self_attn.o_proj.weight": "D Q"}),
    ("feed_forward_norm.scale", {"post_attention_layernorm.weight": "D"}),
    ("feed_forward.gate.kernel", {"mlp.gate_proj.weight": "F D"}),
    ("feed_forward.expand.kernel", {"mlp.up_proj.weight": "F D"}),
    ("feed_forward.project.kernel", {"mlp.down_proj.weight": "D F"}),
)
SHAPE = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "emb_dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "feed_forward_dim": "intermediate_size",
}
PARTS = {"position": "rope", "norm": "rms", "feed_forward": "swiglu", "bias": False}
HELD = (*SHAPE, *PARTS, "position_embedding", "qkv_bias", "attention_output_bias", "qk_norm", "tied_head")
HELD += ("sliding_window", "window_pattern")
COMPUTED = {"hidden_act": "silu", "rms_norm_eps": EPSILON, "attention_bias": False, "mlp_bias": False}
UNLESS_GIVEN = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}  # what their configs say then
LAYER_TYPES = {"sliding_attention": "S", "full_attention": "L"}


def import_config(hf_config: Mapping[str, Any], source: str) -> ModelConfig:
    """Return the model config of a `config.json` of Hugging Face, whose `model_type` is one of `MODEL_TYPES`.

    Raises ValueError when it has an unsupported option; `source` names the file in its message.
    """
    is_qwen3 = hf_config["model_type"] == QWEN3
    shape = {name: hf_config.get(hf_name) for name, hf_name in SHAPE.items()}
    windows = _windows(hf_config, source) if is_qwen3 and hf_config.get("use_sliding_window") else {}
    parts = {"qkv_bias": False, "qk_norm": is_qwen3, "tied_head": hf_config.get("tie_word_embeddings", False)}
    try:
        config = parse_config(json.dumps(shape | PARTS | parts | windows), ModelConfig, source)
    except ValueError as error:
        raise ValueError(tensors.with_names(str(error), SHAPE | {"tied_head": "tie_word_embeddings"})) from None
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    given = UNLESS_GIVEN | dict(hf_config)
    found = {option: given.get(option) for option in COMPUTED} | {
        "head_dim": given.get("head_dim") or config.head_width,
        "rope_theta": rope.get("rope_theta", given.get("rope_theta", BASE)),
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
    }
    expected = COMPUTED | {"head_dim": config.head_width, "rope_theta": BASE, "rope_type": "default"}
    problems = [
        f"{option}={json.dumps(found[option])}, expected {json.dumps(value)}"
        for option, value in expected.items()
        if found[option] != value
    ]
    if problems:
        raise ValueError(f"{source}: unsupported options: {'; '.join(problems)[:1000]}")
    return config


def _windows(hf_config: Mapping[str, Any], source: str) -> dict[str, Any]:
    kinds = hf_config.get("layer_types")
    if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in LAYER_TYPES for kind in kinds):
        raise ValueError(
            f"{source}: layer_types: expected a list of {' and '.join(LAYER_TYPES)}, got {str(kinds)[:60]}"
        )
    if len(kinds) != (layers := hf_config.get("num_hidden_layers")):
        raise ValueError(f"{source}: layer_types: expected num_hidden_layers={layers} of them, got {len(kinds)}")
    pattern = "".join(LAYER_TYPES[kind] for kind in kinds)
    return {"sliding_window": hf_config.get("sliding_window"), "window_pattern": pattern} if "S" in pattern else {}


def export_config(config: ModelConfig, end_of_text: int | None) -> dict[str, Any]:
    """Return the `config.json` of a model for Hugging Face.

    Raises ValueError when the model has a part that neither Llama nor Qwen3 has, or lacks one.
    """
    needed = PARTS | dict.fromkeys(("pre_norm", "shortcut", "output_norm"), True)
    needed |= {"logit_soft_cap": None, "value_embeddings": False, "embedding_scale": False}
    needed |= {} if config.qk_norm else {"sliding_window": None}  # Qwen3 alone has windows
    if refused := tensors.differing(config, needed, HELD):
        raise ValueError(f"neither a Llama nor a Qwen3, so it cannot be exported: its model.json says {refused}")
    windows = [config.window(layer) is not None for layer in range(config.n_layers)]
    of_qwen3 = {
        "use_sliding_window": any(windows),
        "sliding_window": config.sliding_window,
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in windows],
    }
    model_type = QWEN3 if config.qk_norm else LLAMA
    sizes = {"n_kv_heads": config.num_kv_heads, "feed_forward_dim": config.inner_width}
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **{hf_name: sizes.get(name) or getattr(config, name) for name, hf_name in SHAPE.items()},
        "head_dim": config.head_width,
        "rope_theta": BASE,
        **COMPUTED,
        **(of_qwen3 if model_type == QWEN3 else {}),
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
    }


def import_weights(hf_arrays: Mapping[str, Any], config: ModelConfig, source: str) -> dict[str, np.ndarray]:
    """Return a model's arrays, float32, from Hugging Face's; raises ValueError as `tensors.check` does."""
    found = {name: array for name, array in hf_arrays.items() if not name.endswith(OLD_BUFFER)}
    names = _names(config)
    head = found.pop(HEAD, None) if config.tied_head else None  # then it is the token embedding once more
    tensors.check(found, {name: shape for parts in names.values() for name, shape in parts.items()}, source)
    arrays = {}
    for name, parts in names.items():
        read = [tensors.single(found[hf_name], f"{source}: {hf_name}") for hf_name in parts]
        arrays[name] = np.concatenate([array.T for array in read], axis=1) if _is_matrix(name) else read[0]
    tensors.check_tied(head, arrays[TABLE[0][0]], "model.embed_tokens.weight", source)
    return arrays


def export_weights(arrays: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Return a model's arrays under Hugging Face's names. Raises ValueError that names an array that it lacks."""
    names, exported = _names(config), {}
    if unknown := sorted(arrays.keys() - names.keys()):
        raise ValueError(f"{unknown[0]}: Llama has no such parameter, so this model cannot be exported")
    for name, parts in names.items():
        ends = list(itertools.accumulate(shape[0] for shape in parts.values()))
        split = np.split(arrays[name].T, ends[:-1]) if _is_matrix(name) else [arrays[name]]
        exported |= dict(zip(parts, split, strict=True))
    return exported


def _is_matrix(name: str) -> bool:
    return name.endswith(".kernel")


def _names(config: ModelConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return Hugging Face's names and shapes of what makes up each array here."""
    head = config.head_width
    sizes = {"V": config.vocab_size, "D": config.emb_dim, "H": head, "F": config.inner_width}
    sizes |= {"Q": config.n_heads * head, "K": config.num_kv_heads * head}
    rows = [row for row in TABLE if not (config.tied_head and HEAD in row[1])]
    for layer in range(config.n_layers):
        rows += [
            (f"blocks.{layer}.{name}", {f"model.layers.{layer}.{hf_name}": axes for hf_name, axes in parts.items()})
            for name, parts in TABLE_OF_A_BLOCK
            if config.qk_norm or name not in ("attention.query_norm.scale", "attention.key_norm.scale")
        ]
    return {
        name: {hf_name: tuple(sizes[axis] for axis in axes.split()) for hf_name, axes in parts.items()}
        for name, parts in rows
    }
