import shutil

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import VOCAB_SIZE, random_tokens, tiny_model
from safetensors.numpy import load_file, save_file

import checkpointing
from outside_in.inference.load import load_saved_model
from outside_in.weights import load_weights, read_model_json, save_weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and the weights file that training saves for it."""
    model = tiny_model(seed=3, n_layers=0, tied_head=True, shortcut=False)  # n_layers 0 compiles fast
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    text = model.config.model_dump_json()
    state = checkpointing.copy_to_host(model, optimizer)
    meta = {"global_step": 1, "is_best": True}
    checkpoint = checkpointing.save(tmp_path_factory.mktemp("run") / "checkpoints", state, meta, text)
    return model, checkpoint.path / "model.safetensors"


def test_a_copied_file_is_the_same_model_elsewhere(saved, tmp_path):
    model, weights = saved
    copy = shutil.copy(weights, tmp_path / "any name")
    loaded = load_saved_model(copy)
    tokens = random_tokens(16).reshape(1, 16)
    assert loaded.config == model.config
    assert loaded.dtype == jnp.float32
    np.testing.assert_array_equal(loaded(tokens), model(tokens))
    assert loaded(tokens).shape == (1, 16, VOCAB_SIZE)


@pytest.mark.parametrize(
    "array", [np.arange(6.0).reshape(2, 3).T, np.float32(3), np.arange(8)[::2]], ids=["transposed", "scalar", "strided"]
)
def test_an_array_is_saved_as_it_is_whatever_its_order_in_memory(tmp_path, array):
    save_weights(tmp_path / "model.safetensors", {"a": array}, "{}")
    np.testing.assert_array_equal(np.asarray(load_weights(tmp_path / "model.safetensors")["a"]), array)


def test_a_flipped_bit_is_noticed_where_the_manifest_is_at_hand(saved, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved[1].parent, folder)
    weights = folder / "model.safetensors"
    load_saved_model(weights)
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1  # the last bit of a number, which stays finite
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="content differs from the manifest"):
        load_saved_model(weights)


def edit(weights, target, change=lambda arrays: None, **metadata):
    arrays = load_file(weights)
    change(arrays)
    save_file(arrays, target, metadata or {"model.json": read_model_json(weights)})


WRONG_FILES = {
    "no metadata": lambda weights, target: save_file({"a": np.zeros(3)}, target),
    "other metadata": lambda weights, target: edit(weights, target, format="pt"),
    "model.json is no JSON": lambda weights, target: edit(weights, target, **{"model.json": "{"}),
    "model.json is no object": lambda weights, target: edit(weights, target, **{"model.json": "[1]"}),
    "model.json is another config": lambda weights, target: edit(weights, target, **{"model.json": '{"a": 1}'}),
    "other arrays": lambda weights, target: edit(weights, target, lambda arrays: arrays.clear()),
    "half precision": lambda weights, target: edit(
        weights, target, lambda arrays: arrays.update({name: a.astype(np.float16) for name, a in arrays.items()})
    ),
    "brain floats": lambda weights, target: edit(
        weights, target, lambda arrays: arrays.update({name: a.astype(jnp.bfloat16) for name, a in arrays.items()})
    ),
    "garbage": lambda weights, target: target.write_bytes(b"not a safetensors file" * 100),
    "cut off": lambda weights, target: target.write_bytes(weights.read_bytes()[:-1]),
    "header only": lambda weights, target: target.write_bytes(weights.read_bytes()[:8]),
    "empty": lambda weights, target: target.touch(),
    "missing": lambda weights, target: None,
    "a folder": lambda weights, target: target.mkdir(),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_any_other_file_is_refused_in_one_line_that_names_it(saved, tmp_path, kind):
    path = tmp_path / "model.safetensors"
    WRONG_FILES[kind](saved[1], path)
    with pytest.raises(ValueError) as error:
        load_saved_model(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
