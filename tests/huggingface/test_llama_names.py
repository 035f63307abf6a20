"""The name table, against a Llama and a Qwen3 that `transformers` made (tests/fixtures/make_llama.py), and itself."""

import json

import numpy as np
import pytest
from helpers import LLAMA_FIXTURE, arrays_of, logits, model_with, tiny_model, tiny_model_config
from modern import with_larger_weights
from safetensors.numpy import load_file

from outside_in.huggingface import formats
from outside_in.huggingface.llama_names import export_config, export_weights, import_config, import_weights
from outside_in.inference.generation import generate

MODELS = ["llama", "qwen3"]
LLAMA = {"position": "rope", "norm": "rms", "feed_forward": "swiglu", "bias": False, "n_layers": 2}
OURS = {
    "llama": LLAMA,
    "grouped": LLAMA | {"n_kv_heads": 2, "feed_forward_dim": 40, "tied_head": True},
    "qwen3": LLAMA | {"n_kv_heads": 1, "qk_norm": True},
    "windows": LLAMA | {"qk_norm": True, "sliding_window": 3, "window_pattern": "LS"},
    "all windows": LLAMA | {"qk_norm": True, "sliding_window": 3},
}


def theirs(name):
    """Return their config, weights, tokens, logits, and completions of the first six tokens."""
    stored = load_file(LLAMA_FIXTURE / f"{name}.safetensors")
    truth = [stored.pop(key) for key in ("tokens", "logits", "completed")]
    return json.loads((LLAMA_FIXTURE / f"{name}.json").read_text()), stored, *truth


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_completions_are_those_of_transformers(name):
    """RoPE, RMSNorm, SwiGLU and grouped queries in both; QK-norm and a window in the Qwen3."""
    hf_config, stored, tokens, expected, completed = theirs(name)
    config = import_config(hf_config, "config.json")
    assert (config.qk_norm, config.window(0), config.window(1)) == (
        name == "qwen3",
        5 if name == "qwen3" else None,
        None,
    )
    model = model_with(config, import_weights(stored, config, name))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
    for row in completed:
        np.testing.assert_array_equal(generate(model, row[:6].tolist(), num_tokens=18)[0], row[6:])


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_the_options_that_matter_go_back_as_they_came(name):
    hf_config, stored, *_ = theirs(name)
    config = import_config(hf_config, "config.json")
    exported = export_weights(import_weights(stored, config, name), config)
    assert exported.keys() == stored.keys()
    for key, array in stored.items():
        np.testing.assert_array_equal(exported[key], array)
    described = export_config(config, None)
    assert described.pop("rope_theta") == hf_config["rope_parameters"]["rope_theta"]
    assert described.pop("torch_dtype") == "float32"
    del described["bos_token_id"]  # of the tokenizer
    assert {key: hf_config.get(key, False) for key in described} == described  # a Qwen3 has no mlp_bias


@pytest.mark.parametrize("case", OURS)
def test_what_is_exported_is_imported_as_it_was(case):
    model = with_larger_weights(tiny_model(**OURS[case]))
    exported = export_weights(arrays_of(model), model.config)
    config = import_config(export_config(model.config, None), "config.json")
    arrays, config = formats.before_export(import_weights(exported, config, "theirs"), config, model.config)
    assert config == model.config
    for name, array in arrays_of(model).items():
        np.testing.assert_array_equal(arrays[name], array)


def test_a_config_that_says_something_else_is_not_taken_back():
    config = tiny_model_config(**OURS["grouped"])
    for other in (OURS["llama"], {}, OURS["grouped"] | {"tied_head": False}):
        assert formats.before_export({}, config, tiny_model_config(**other))[1] == config


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"norm": "layer"}, 'norm="layer"'),
        ({"feed_forward": "relu2"}, 'feed_forward="relu2"'),
        ({"bias": True, "pre_norm": False}, "bias=true, pre_norm=false"),
        ({"logit_soft_cap": 15, "value_embeddings": True}, "logit_soft_cap=15.0, value_embeddings=true"),
        ({"embedding_scale": True}, "embedding_scale=true"),
        ({"sliding_window": 4}, "sliding_window=4"),
    ],
    ids=str,
)
def test_a_part_that_the_format_does_not_have_is_refused_by_name(changes, told):
    with pytest.raises(ValueError, match="neither a Llama nor a Qwen3, so it cannot be exported") as caught:
        export_config(tiny_model_config(**LLAMA | changes), None)
    assert str(caught.value).endswith(f"its model.json says {told}")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06, expected 1e-05"),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu", expected "silu"'),
        ({"attention_bias": True}, "attention_bias=true, expected false"),
        ({"head_dim": 8}, "head_dim=8, expected 4"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_theta=500000.0, expected 10000.0"),
        ({"rope_parameters": None, "rope_theta": 1e6}, "rope_theta=1000000.0, expected 10000.0"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, 'rope_type="linear", expected "default"'),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ({"intermediate_size": "24"}, "intermediate_size: expected a valid integer"),
        ({"vocab_size": 151_936}, "less than or equal to 65536"),
        ({"layer_types": ["sliding_attention"]}, "layer_types: expected num_hidden_layers=2 of them, got 1"),
        ({"rope_parameters": None, "rope_scaling": "linear"}, 'rope_type="linear", expected "default"'),
        ({"layer_types": ["linear_attention"] * 2}, "layer_types: expected a list of sliding_attention and full_att"),
    ],
    ids=str,
)
def test_a_config_that_is_not_ours_to_compute_is_one_line(changes, complaint):
    with pytest.raises(ValueError) as caught:
        import_config(theirs("qwen3")[0] | changes, "config.json")
    assert complaint in str(caught.value)
    assert str(caught.value).startswith("config.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["mistral", None, 3, ["llama"]])
def test_another_architecture_is_refused(model_type):
    with pytest.raises(ValueError, match=r"config.json: expected model_type one of gpt2, llama, qwen3, got"):
        formats.of_config({"model_type": model_type, "architectures": ["X"]}, "config.json")


def test_all_that_does_not_fit_is_told_at_once_and_old_buffers_are_no_weights():
    hf_config, stored, *_ = theirs("llama")
    config = import_config(hf_config, "config.json")
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    import_weights(stored, config, "a folder")
    stored["model.layers.0.self_attn.q_proj.weight"] = stored["model.layers.0.self_attn.k_proj.weight"]
    del stored["model.norm.weight"]
    with pytest.raises(
        ValueError, match=r"2 tensors do not fit: model.norm.weight is missing; .*q_proj.weight is \[8, 16"
    ):
        import_weights(stored, config, "a folder")


def test_a_tied_head_that_is_another_is_refused():
    hf_config, stored, *_ = theirs("qwen3")
    config = import_config(hf_config, "config.json")
    import_weights(stored | {"lm_head.weight": stored["model.embed_tokens.weight"]}, config, "a folder")
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight, but config.json"):
        import_weights(stored | {"lm_head.weight": 2 * stored["model.embed_tokens.weight"]}, config, "a folder")
