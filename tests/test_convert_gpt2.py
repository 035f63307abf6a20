"""`convert_gpt2.py`, run as a program on the small GPT-2 that `transformers` made."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import GPT2_FIXTURE, LLAMA_FIXTURE, TINY_TRAIN, complaint, logits, tiny_model
from hub import COMMIT, Hub
from safetensors.numpy import load_file, save_file
from test_model import with_larger_weights

import checkpointing
from model import GPTModel
from outside_in.config import ModelConfig, TrainConfig
from outside_in.config_files import load_config
from outside_in.data.tokenizer import gpt2, vocabulary_files
from outside_in.inference.generation import generate
from outside_in.inference.load import find_tokenizer, find_weights, load_saved_model
from outside_in.storage import metrics
from outside_in.weights import host_arrays, save_weights

pytestmark = pytest.mark.slow


def theirs(head="tied"):
    stored = load_file(GPT2_FIXTURE / f"{head}.safetensors")
    return stored.pop("tokens"), stored.pop("logits"), stored


@pytest.fixture
def source(tmp_path):
    """A folder as the Hub has it."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    shutil.copyfile(GPT2_FIXTURE / "config.json", folder / "config.json")
    config = json.loads((GPT2_FIXTURE / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(theirs()[2], folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def imported(call_program, source, tmp_path):
    finished = call_program("convert_gpt2", "import", source, tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    return tmp_path / "run"


def assert_is_theirs(run):
    tokens, expected, _ = theirs()
    model = load_saved_model(find_weights(run))
    np.testing.assert_allclose(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)


def test_an_imported_run_is_the_model(imported):
    assert_is_theirs(imported)
    assert load_config(imported / "model.json", ModelConfig).tied_head
    assert load_config(imported / "train.json", TrainConfig).initial_weights == "initial/model.safetensors"


def test_an_imported_run_is_trained_from_its_weights(call_program, imported, token_folder):
    train = json.loads((imported / "train.json").read_text()) | TINY_TRAIN | {"dataset": str(token_folder)}
    (imported / "train.json").write_text(json.dumps(train | {"min_train_tokens": 300, "learning_rate": 1e-9}))
    finished = call_program("train", imported)
    assert finished.returncode == 0, finished.stderr
    assert "origin  the weights in initial" in finished.stdout and "starting from the weights in" in finished.stdout
    assert "a uniform guess" not in finished.stdout
    assert len(metrics.read(imported / "metrics.jsonl")) == 2
    trained = load_file(find_weights(imported))
    assert "checkpoints" in str(find_weights(imported))
    for name, array in load_file(imported / "initial" / "model.safetensors").items():
        np.testing.assert_allclose(trained[name], array, atol=1e-6)
    again = call_program("train", imported)
    assert again.returncode == 0 and "is finished" in again.stdout


def test_initial_weights_of_another_model_are_refused_by_key(call_program, imported, token_folder):
    (imported / "train.json").write_text(
        json.dumps(TINY_TRAIN | {"dataset": str(token_folder), "initial_weights": str(find_weights(imported))})
    )
    model = json.loads((imported / "model.json").read_text())
    (imported / "model.json").write_text(json.dumps(model | {"shortcut": False, "context_length": 16}))
    told = complaint(call_program("train", imported))
    assert "context_length 24, not 16, shortcut True, not False" in told


def test_missing_initial_weights_are_one_line(call_program, make_run):
    told = complaint(call_program("train", make_run(train={"initial_weights": "nowhere.safetensors"})))
    assert "nowhere.safetensors: expected a model.safetensors, found nothing" in told


def test_a_model_in_several_files_is_the_same(call_program, source, tmp_path):
    arrays = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = [sorted(arrays)[::2], sorted(arrays)[1::2]]
    weight_map = {}
    for number, part in enumerate(names, start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: arrays[name] for name in part}, source / file)
        weight_map |= dict.fromkeys(part, file)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert call_program("convert_gpt2", "import", source, tmp_path / "run").returncode == 0
    assert_is_theirs(tmp_path / "run")
    for wrong in ({}, *({"weight_map": {"a": file}} for file in ("../model.safetensors", 3, ["x"]))):
        index.write_text(json.dumps(wrong))
        told = complaint(call_program("convert_gpt2", "import", source, tmp_path / "other"))
        assert "expected a weight_map of names to files beside it" in told


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_becomes_float32(call_program, source, tmp_path, dtype):
    arrays = {name: array.astype(dtype) for name, array in load_file(source / "model.safetensors").items()}
    save_file(arrays, source / "model.safetensors")
    assert call_program("convert_gpt2", "import", source, tmp_path / "run").returncode == 0
    found = load_file(find_weights(tmp_path / "run"))["token_embedding.embedding"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.float32(arrays["transformer.wte.weight"]))


class ModelHub(Hub):
    """The Hub for models, whose addresses begin with no kind."""

    def do_HEAD(self):
        self.path = self.path if self.path.startswith("/cdn/") else f"/models{self.path}"
        super().do_HEAD()


@pytest.fixture
def hub(serve, source):
    server = serve(ModelHub)
    server.revisions = {COMMIT: {path.name: path.read_bytes() for path in source.iterdir()}}
    server.datasets = {"tiny": server.revisions[COMMIT].keys()}
    return server


def test_a_model_of_the_hub_is_fetched(call_program, hub, tmp_path):
    finished = call_program("convert_gpt2", "import", "somebody/tiny", tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    assert_is_theirs(tmp_path / "run")
    requests = len(hub.downloads)
    assert call_program("convert_gpt2", "import", "somebody/tiny", tmp_path / "again").returncode == 0
    assert len(hub.downloads) == requests  # it is in the client's cache


def test_a_sharded_model_of_the_hub_is_fetched(call_program, hub, tmp_path):
    files = dict(hub.revisions[COMMIT])
    weights = files.pop("model.safetensors")
    shard = "model-00001-of-00001.safetensors"
    weight_map = dict.fromkeys(theirs()[2], shard)
    files |= {shard: weights, "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}
    hub.revisions, hub.datasets = {COMMIT: files}, {"tiny": files.keys()}
    assert call_program("convert_gpt2", "import", "somebody/tiny", tmp_path / "run").returncode == 0
    assert_is_theirs(tmp_path / "run")


def test_a_model_that_the_hub_does_not_have_is_one_line(call_program, hub, tmp_path):
    told = complaint(call_program("convert_gpt2", "import", "somebody/other", tmp_path / "run"))
    assert "the Hub has no model of that name" in told
    assert not (tmp_path / "run").exists()


def test_a_hub_that_is_not_there_is_one_line(call_program, point_client_at, tmp_path):
    point_client_at(9)
    told = complaint(call_program("convert_gpt2", "import", "somebody/tiny", tmp_path / "run"))
    assert "could not be fetched from the Hub" in told


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def only_pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def renamed(folder):
    arrays = load_file(folder / "model.safetensors")
    arrays["transformer.h.0.ln_3.bias"] = arrays.pop("transformer.h.0.ln_1.bias")
    save_file(arrays, folder / "model.safetensors")


def not_finite(folder):
    arrays = load_file(folder / "model.safetensors")
    arrays["transformer.ln_f.bias"][3] = np.nan
    save_file(arrays, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (write("config.json", '{"model_type": "bert"}'), "expected model_type one of gpt2, llama, qwen3, got 'bert'"),
        (write("config.json", "["), "config.json: not JSON"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: expected a JSON file, found nothing"),
        (only_pickled, "pytorch_model.bin is another format; load it in transformers and use save_pretrained"),
        (renamed, "2 tensors do not fit: h.0.ln_1.bias is missing; 'h.0.ln_3.bias' is unknown"),
        (not_finite, "transformer.ln_f.bias: expected finite numbers"),
        (write("model.safetensors", "version https://git-lfs.github.com/spec/v1"), "got a Git LFS pointer"),
        (write("model.safetensors", "x" * 100), "not a readable safetensors file"),
    ],
    ids=["BERT", "no JSON", "no config", "pickled", "renamed", "NaN", "LFS", "garbage"],
)
def test_a_folder_that_is_no_gpt2_is_one_line_and_leaves_nothing(call_program, source, tmp_path, spoil, words):
    spoil(source)
    assert words in complaint(call_program("convert_gpt2", "import", source, tmp_path / "run"))
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".staging*"))


def test_a_vocabulary_that_is_not_gpt2s_comes_along(call_program, text_run, tmp_path):
    run = tmp_path / "run"
    vocabulary = json.loads((export(call_program, text_run, tmp_path) / "vocab.json").read_text())
    vocabulary["Ġde"], vocabulary["Ġthe"] = vocabulary["Ġthe"], vocabulary["Ġde"]
    (tmp_path / "exported" / "vocab.json").write_text(json.dumps(vocabulary))
    finished = call_program("convert_gpt2", "import", tmp_path / "exported", run)
    assert finished.returncode == 0 and not finished.stderr
    tokenizer = find_tokenizer(find_weights(run))
    assert tokenizer.encode("de the").tolist() == gpt2().encode("de de").tolist()
    assert tokenizer.end_of_text == 50256
    assert load_config(run / "train.json", TrainConfig).dataset == "data/mine"
    assert f"prepare_data.py data/mine --text input.txt --tokenizer {run / 'initial'}" in finished.stdout
    assert "evaluate.py" not in finished.stdout  # on GPT-2's tokens


def test_a_vocabulary_that_makes_no_tokenizer_is_refused(call_program, text_run, tmp_path):
    out = export(call_program, text_run, tmp_path)
    vocabulary = json.loads((out / "vocab.json").read_text())
    (out / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    told = complaint(call_program("convert_gpt2", "import", out, tmp_path / "run"))
    assert f"{out / 'tokenizer.json'}: expected a tokenizer.json of Hugging Face's tokenizers" in told
    (out / "tokenizer.json").unlink()
    del vocabulary["Ġthe"]
    (out / "vocab.json").write_text(json.dumps(vocabulary))
    told = complaint(call_program("convert_gpt2", "import", out, tmp_path / "run"))
    assert f"{out / 'vocab.json'}: no vocabulary that fits merges.txt" in told
    (out / "merges.txt").unlink()
    told = complaint(call_program("convert_gpt2", "import", out, tmp_path / "run"))
    assert f"{out / 'vocab.json'}: not GPT-2's vocabulary" in told
    assert not (tmp_path / "run").exists()
    (out / "vocab.json").unlink()
    finished = call_program("convert_gpt2", "import", out, tmp_path / "run")
    assert finished.returncode == 0
    assert "has no tokenizer.json and no vocab.json; gpt2 is assumed" in finished.stderr
    assert find_tokenizer(find_weights(tmp_path / "run")) is gpt2()


def test_an_array_in_two_files_is_refused(call_program, source, tmp_path):
    arrays = load_file(source / "model.safetensors")
    (source / "model.safetensors").rename(source / "model-1.safetensors")
    save_file({"transformer.wte.weight": arrays["transformer.wte.weight"]}, source / "model-2.safetensors")
    weight_map = dict.fromkeys(arrays, "model-1.safetensors") | {"transformer.wte.weight": "model-2.safetensors"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    told = complaint(call_program("convert_gpt2", "import", source, tmp_path / "run"))
    assert "has 'transformer.wte.weight', which another file has too" in told


def test_folders_of_the_other_kind_say_what_they_are(call_program, imported, source, tmp_path):
    assert "is a run already" in complaint(call_program("convert_gpt2", "import", imported, tmp_path / "new"))
    told = complaint(call_program("test_generation", export(call_program, imported, tmp_path)))
    assert "is in transformers' format; import it: uv run convert_gpt2.py import" in told


def export(call_program, run, tmp_path):
    assert call_program("convert_gpt2", "export", run, tmp_path / "exported").returncode == 0
    return tmp_path / "exported"


def test_an_imported_run_can_be_moved(call_program, imported, token_folder):
    moved = imported.rename(imported.with_name("moved"))
    train = json.loads((moved / "train.json").read_text()) | TINY_TRAIN | {"dataset": str(token_folder)}
    (moved / "train.json").write_text(json.dumps(train | {"min_train_tokens": 300}))
    finished = call_program("train", moved)
    assert finished.returncode == 0 and f"starting from the weights in {moved}" in finished.stdout


@pytest.mark.parametrize("target", ["config.json/x", "/proc/x"])
def test_a_target_that_cannot_be_written_is_one_line(call_program, source, monkeypatch, target):
    monkeypatch.chdir(source)
    monkeypatch.setattr("os.access", lambda path, mode: "proc" not in str(path))  # root may write anywhere
    told = complaint(call_program("convert_gpt2", "import", source, target))
    assert f"{target}: cannot be created" in told


def test_nothing_is_written_over(call_program, source, tmp_path):
    (tmp_path / "run").mkdir()
    for action in ("import", "export"):
        assert "already exists" in complaint(call_program("convert_gpt2", action, source, tmp_path / "run"))
    assert "--checkpoint: only for export" in complaint(
        call_program("convert_gpt2", "import", source, tmp_path / "new", "--checkpoint", "best")
    )
    told = complaint(call_program("convert_gpt2", "import", tmp_path / "no where", tmp_path / "new"))
    assert "expected a folder with config.json" in told


# Other architectures


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_llama_is_imported_completes_as_it_did_and_is_exported_again(call_program, tmp_path, name):
    stored = load_file(LLAMA_FIXTURE / f"{name}.safetensors")
    tokens, logits_BTV, completed = (stored.pop(key) for key in ("tokens", "logits", "completed"))
    (tmp_path / "theirs").mkdir()
    shutil.copyfile(LLAMA_FIXTURE / f"{name}.json", tmp_path / "theirs" / "config.json")
    save_file(stored, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    assert call_program("convert_gpt2", "import", tmp_path / "theirs", tmp_path / "run").returncode == 0
    model = load_saved_model(find_weights(tmp_path / "run"))
    np.testing.assert_allclose(logits(model, tokens), logits_BTV, rtol=1e-4, atol=1e-4)
    for row in completed:
        np.testing.assert_array_equal(generate(model, row[:6].tolist(), num_tokens=18)[0], row[6:])
    finished = call_program("convert_gpt2", "export", tmp_path / "run", tmp_path / "out")
    assert finished.returncode == 0, finished.stderr
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == stored.keys()
    for key, array in stored.items():
        np.testing.assert_array_equal(found[key], array)
    assert f"A {name.capitalize()} of " in (tmp_path / "out" / "README.md").read_text()


# Exports


@pytest.fixture
def text_run(tmp_path):
    """A run with GPT-2's vocabulary, as small as it gets."""
    config = ModelConfig(vocab_size=50257, context_length=16, emb_dim=8, n_heads=2, n_layers=1, qkv_bias=False)
    model = with_larger_weights(GPTModel(config, nnx.Rngs(0)))
    folder = tmp_path / "text"
    (folder / "initial").mkdir(parents=True)
    arrays = host_arrays(nnx.state(model, nnx.Param))
    save_weights(folder / "initial" / "model.safetensors", arrays, config.model_dump_json())
    return folder


def test_export_and_import_are_the_identity(call_program, text_run, tmp_path):
    finished = call_program("convert_gpt2", "export", text_run, tmp_path / "out")
    assert finished.returncode == 0, finished.stderr
    assert f"lm_eval --model hf --model_args pretrained={tmp_path / 'out'} " in finished.stdout
    assert call_program("convert_gpt2", "import", tmp_path / "out", tmp_path / "run").returncode == 0
    before, after = (load_file(find_weights(folder)) for folder in (text_run, tmp_path / "run"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    assert not load_config(tmp_path / "run" / "model.json", ModelConfig).qkv_bias


def test_an_exported_folder_has_what_transformers_wants(call_program, text_run, tmp_path):
    assert call_program("convert_gpt2", "export", text_run, tmp_path / "out").returncode == 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    tokenizer_files = {"vocab.json", "merges.txt", "tokenizer_config.json"}
    assert files == tokenizer_files | {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["n_positions"], config["tie_word_embeddings"]) == (50256, 16, False)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 50256
    encoder, _ = vocabulary_files()
    assert (tmp_path / "out" / "vocab.json").read_bytes() == encoder.read_bytes()
    arrays = load_file(tmp_path / "out" / "model.safetensors")
    assert arrays["lm_head.weight"].shape == (50257, 8) and not arrays["transformer.h.0.attn.c_attn.bias"].any()


def test_a_trained_run_is_exported_with_its_figures(call_program, make_run, tmp_path):
    run = make_run(model={"n_layers": 1}, train={"min_train_tokens": 300})
    assert call_program("train", run).returncode == 0
    [checkpoint] = checkpointing.find_checkpoints(run / "checkpoints")
    for number, which in enumerate([(), ("--checkpoint", "latest"), ("--checkpoint", checkpoint.path.name)]):
        out = tmp_path / f"out-{number}"
        finished = call_program("convert_gpt2", "export", run, out, *which)
        assert finished.returncode == 0, finished.stderr
        assert "lm_eval" not in finished.stdout and not (out / "vocab.json").exists()
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"| validation loss | {checkpoint.meta['val_loss']:.5g} |" in card
    assert "| tokens seen | 384 |" in card and "initial weights" not in card
    assert f"checkpoint `{checkpoint.path.name}` of the run `run`" in card
    told = complaint(call_program("convert_gpt2", "export", run, tmp_path / "no", "--checkpoint", "worst"))
    assert "no checkpoint 'worst'; available: " in told and checkpoint.path.name in told


def test_a_model_that_is_no_gpt2_is_not_exported(call_program, tmp_path):
    model = tiny_model(pre_norm=False)
    path = tmp_path / "model.safetensors"
    save_weights(path, host_arrays(nnx.state(model, nnx.Param)), model.config.model_dump_json())
    told = complaint(call_program("convert_gpt2", "export", path, tmp_path / "out"))
    assert told.endswith("not a GPT-2, so it cannot be exported: its model.json says pre_norm=false")
    assert not (tmp_path / "out").exists()
