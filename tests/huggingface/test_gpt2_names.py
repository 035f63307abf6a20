"""The name table, against a GPT-2 that `transformers` made (tests/fixtures/make_gpt2.py), and against itself."""

import json
import re

import numpy as np
import pytest
from helpers import GPT2_FIXTURE, arrays_of, logits, model_with, tiny_model, tiny_model_config
from safetensors.numpy import load_file
from test_model import with_larger_weights

from outside_in.config import ModelConfig
from outside_in.config_files import key
from outside_in.huggingface import gpt2_names, llama_names
from outside_in.huggingface.gpt2_names import (
    export_config,
    export_weights,
    import_config,
    import_weights,
    without_zero_biases,
)

THEIRS = json.loads((GPT2_FIXTURE / "config.json").read_text())
GPT2 = {"qkv_bias": True, "tied_head": True}  # what OpenAI's own models are


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_logits_are_those_of_transformers(head):
    config = import_config(THEIRS | {"tie_word_embeddings": head == "tied"}, "config.json")
    stored = load_file(GPT2_FIXTURE / f"{head}.safetensors")
    tokens, expected = stored.pop("tokens"), stored.pop("logits")
    model = model_with(config, import_weights(stored, config, head))
    assert np.abs(expected).max() > 1  # random weights, large enough to tell
    np.testing.assert_allclose(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize(
    "others",
    [{"attention_output_bias": True}, {"attention_output_bias": False}, {"bias": False}, {"feed_forward_dim": 24}],
    ids=str,
)
def test_what_is_exported_is_imported_as_it_was(tied_head, qkv_bias, others):
    switches = {"tied_head": tied_head, "qkv_bias": qkv_bias and others.get("bias", True)} | others
    model = with_larger_weights(tiny_model(n_layers=2, **switches))
    theirs = export_weights(arrays_of(model), model.config)
    config = import_config(export_config(model.config, None), "config.json")
    assert config == model.config.model_copy(update=dict.fromkeys(("qkv_bias", "attention_output_bias", "bias"), True))
    arrays = import_weights(theirs, config, "theirs")
    tokens = np.arange(12).reshape(1, 12)
    np.testing.assert_array_equal(logits(model_with(config, arrays), tokens), logits(model, tokens))
    arrays, config = without_zero_biases(arrays, config, model.config)
    assert config == model.config
    assert arrays.keys() == arrays_of(model).keys()
    for name, array in arrays_of(model).items():
        np.testing.assert_array_equal(arrays[name], array)


def test_biases_that_training_has_changed_are_not_taken_back():
    model = with_larger_weights(tiny_model(**GPT2))
    without = tiny_model_config(qkv_bias=False, tied_head=True)
    arrays, config = without_zero_biases(arrays_of(model), model.config, without)
    assert config == model.config and arrays.keys() == arrays_of(model).keys()


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_names_come_with_and_without_a_prefix_and_masks_are_no_weights(prefix):
    model = tiny_model(n_layers=1, **GPT2)
    theirs = {
        prefix + name.removeprefix("transformer."): array
        for name, array in export_weights(arrays_of(model), model.config).items()
    }
    theirs |= {f"{prefix}h.0.attn.bias": np.ones((1, 1, 16, 16)), f"{prefix}h.0.attn.masked_bias": np.float32(-1e4)}
    theirs["lm_head.weight"] = theirs[f"{prefix}wte.weight"]  # some files have a tied head twice
    arrays = import_weights(theirs, model.config, "theirs")
    assert arrays.keys() == arrays_of(model).keys()


def test_all_that_does_not_fit_is_told_at_once():
    model = tiny_model(n_layers=1, **GPT2)
    theirs = export_weights(arrays_of(model), model.config)
    del theirs["transformer.h.0.ln_1.bias"], theirs["transformer.ln_f.weight"]
    theirs |= {"transformer.h.1.ln_1.bias": np.zeros(32), "transformer.wpe.weight": np.zeros((8, 32))}
    theirs |= {"transformer.h.0.ln_2.bias": np.zeros(32, int), "wte.weight": theirs["transformer.wte.weight"]}
    with pytest.raises(ValueError) as caught:
        import_weights(theirs, model.config, "a folder")
    assert str(caught.value) == (
        "a folder: 6 tensors do not fit: wte.weight appears twice, with and without 'transformer.'; h.0.ln_1.bias is "
        "missing; ln_f.weight is missing; 'h.1.ln_1.bias' is unknown; h.0.ln_2.bias is int64, expected one of float32, "
        "float16, bfloat16, float64; wpe.weight is [8, 32], expected [16, 32]"
    )


def test_a_line_shows_but_the_first_of_many_mismatches():
    model = tiny_model(n_layers=2, **GPT2)
    with pytest.raises(ValueError, match=re.compile(r"28 tensors do not fit: .*; and 16 more$")):
        import_weights({}, model.config, "a folder")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"activation_function": "gelu"}, 'activation_function="gelu", expected "gelu_new" or "gelu_pytorch_tanh"'),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06, expected 1e-05"),
        ({"scale_attn_weights": False}, "scale_attn_weights=false, expected true"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true, expected false"),
        ({"add_cross_attention": True}, "add_cross_attention=true, expected false"),
        ({"n_inner": "64"}, "n_inner: expected a valid integer"),
        ({"n_embd": None}, "n_embd: expected a valid integer, got null"),
        ({"n_embd": "16"}, "n_embd: expected a valid integer, got"),
        ({"n_head": 3}, "n_embd=16 is not divisible by n_head=3"),
        ({"vocab_size": 100_000}, "less than or equal to 65536"),
        ({"n_layer": True}, "n_layer: expected a valid integer"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false"),
    ],
    ids=str,
)
def test_a_config_that_is_not_ours_to_compute_is_one_line(changes, complaint):
    with pytest.raises(ValueError) as caught:
        import_config(THEIRS | changes, "config.json")
    assert complaint in str(caught.value)
    assert str(caught.value).startswith("config.json: ") and "\n" not in str(caught.value)


def test_several_options_are_told_at_once():
    with pytest.raises(ValueError, match=r'activation_function="relu", .*; add_cross_attention=true, expected false'):
        import_config(THEIRS | {"activation_function": "relu", "add_cross_attention": True}, "config.json")


@pytest.mark.parametrize("switch", ["position_embedding", "pre_norm", "shortcut", "feed_forward", "output_norm"])
def test_a_switch_that_gpt2_does_not_have_is_refused_by_name(switch):
    with pytest.raises(ValueError, match=f"not a GPT-2, so it cannot be exported: its model.json says {switch}=false$"):
        export_config(tiny_model_config(**{switch: False}), None)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"norm": "rms", "qk_norm": True}, 'norm="rms", qk_norm=true'),
        ({"feed_forward": "relu2"}, 'feed_forward="relu2"'),
        ({"n_kv_heads": 2, "sliding_window": 4}, "sliding_window=4, n_kv_heads=2"),
        ({"logit_soft_cap": 15}, "logit_soft_cap=15.0"),
        ({"value_embeddings": True, "embedding_scale": True}, "embedding_scale=true, value_embeddings=true"),
        ({"position": "none"}, "position_embedding=false"),
    ],
    ids=str,
)
def test_a_part_that_gpt2_does_not_have_is_refused_by_name(changes, told):
    with pytest.raises(ValueError, match="not a GPT-2, so it cannot be exported") as caught:
        export_config(tiny_model_config(**changes), None)
    assert str(caught.value).endswith(f"its model.json says {told}")


def test_parts_that_are_named_but_gpt2s_are_exported():
    config = tiny_model_config(position="learned", feed_forward="gelu", n_kv_heads=4, norm="layer")
    assert export_config(config, None) == export_config(tiny_model_config(), None)


def test_the_shell_is_no_gpt2():
    with pytest.raises(ValueError, match="shortcut=false, n_layers=0"):
        export_config(tiny_model_config(n_layers=0, shortcut=False), None)


def test_a_tied_head_that_is_another_is_refused():
    model = tiny_model(n_layers=1, **GPT2)
    theirs = export_weights(arrays_of(model), model.config)
    theirs["lm_head.weight"] = 2 * theirs["transformer.wte.weight"]
    with pytest.raises(ValueError, match=r"lm_head.weight differs from wte.weight, but config.json ties them"):
        import_weights(theirs, model.config, "a folder")


def test_numbers_beyond_float32_are_refused():
    model = tiny_model(n_layers=1, **GPT2)
    theirs = export_weights(arrays_of(model), model.config)
    theirs["transformer.ln_f.bias"] = np.full(32, 1e300)
    with pytest.raises(ValueError, match=r"a folder: ln_f.bias: expected finite float32 numbers"):
        import_weights(theirs, model.config, "a folder")


class ForkedConfig(ModelConfig):
    parallel: bool = key("fatal", "attention and feed-forward side by side", False)


@pytest.mark.parametrize("names", [gpt2_names, llama_names])
def test_a_part_that_a_fork_adds_is_not_exported_without_a_word(names):
    of_llama = {"position": "rope", "norm": "rms", "feed_forward": "swiglu", "bias": False}
    shape = tiny_model_config().model_dump(exclude_defaults=True) | (of_llama if names is llama_names else {})
    shape |= {"qkv_bias": names is not llama_names}
    assert names.export_config(ForkedConfig(**shape), None)["model_type"] in ("gpt2", "llama")
    with pytest.raises(ValueError, match=r"so it cannot be exported: its model.json says parallel=true$"):
        names.export_config(ForkedConfig(**shape, parallel=True), None)
