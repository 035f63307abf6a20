"""Tokenizers of exports and imports: the files give `tokenizers` the same ids, and a model brings its own one."""

import json
import shutil

import numpy as np
import pytest
from flax import nnx
from helpers import GPT2_FIXTURE, TINY_TRAIN, complaint, tiny_model
from safetensors.numpy import load_file, save_file
from test_tokenizers_everywhere import (
    TEXTS,
    content_of,
    gpt2_library,
    llama_library,
    prepare,
    tokenizer_of,
    trained,
    write_lines,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from outside_in.data.tokenizer import vocabulary_files
from outside_in.huggingface import tokenizer_formats
from outside_in.inference.load import find_tokenizer, find_weights
from outside_in.weights import host_arrays, read_metadata, save_weights

KINDS = ("gpt2", "bytes", "trained", "llama")
END = "<|endoftext|>"
TRAINED = Tokenizer.from_str(trained().file.decode())
NOT_ORDINARY = (END, "</s>")  # of which the library makes tokens
ORDINARY = [text for text in TEXTS if not any(token in text for token in NOT_ORDINARY)]


# Exports


@pytest.fixture
def export(call_program, tmp_path):
    """Export a model of a kind's tokenizer, with so many ids more than it: `export("bytes", 43)`."""

    def export(kind, more=0):
        made = tokenizer_of(kind)
        model = tiny_model(vocab_size=made.vocab_size + more, emb_dim=8, n_heads=1)
        source, target = tmp_path / f"{kind}-model", tmp_path / f"{kind}-exported"
        source.mkdir()
        arrays = host_arrays(nnx.state(model, nnx.Param))
        save_weights(source / "model.safetensors", arrays, model.config.model_dump_json(), made.identity)
        if made.file:
            (source / "tokenizer.json").write_bytes(made.file)
        finished = call_program("convert_gpt2", "export", source, target)
        assert finished.returncode == 0, finished.stderr
        assert f"lm_eval --model hf --model_args pretrained={target}" in finished.stdout
        return target

    return export


def library_of(folder):
    """What `tokenizers` makes of an exported folder."""
    if (folder / "tokenizer.json").exists():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    library = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_has_the_ids_of_the_tokenizer(export, kind):
    made, folder = tokenizer_of(kind), export(kind)
    library = library_of(folder)
    assert library.get_vocab_size() == made.vocab_size
    assert library.token_to_id(made.end_token) == made.end_of_text
    for text in ORDINARY:
        ids = library.encode(text, add_special_tokens=False).ids
        assert ids == made.encode(text).tolist()
        assert library.decode(ids, skip_special_tokens=False) == text
    if kind != "gpt2":
        text = f"a{made.end_token}b"
        assert library.encode(text, add_special_tokens=False).ids == made.encode(text, special=True).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_has_the_files_of_its_tokenizer(export, kind):
    made, folder = tokenizer_of(kind), export(kind)
    files = {path.name for path in folder.iterdir()}
    of_tokenizer = {"vocab.json", "merges.txt"} if kind == "gpt2" else {"tokenizer.json"}
    weights = {"config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors", "README.md"}
    assert files == of_tokenizer | weights
    if made.file:
        assert (folder / "tokenizer.json").read_bytes() == made.file
    if kind == "gpt2":
        for name, file in zip(("vocab.json", "merges.txt"), vocabulary_files()):
            assert (folder / name).read_bytes() == file.read_bytes()
    config = read(folder / "tokenizer_config.json")
    assert {config[name] for name in ("bos_token", "eos_token", "unk_token")} == {made.end_token}
    assert config["model_max_length"] == 16
    assert config["tokenizer_class"] == ("GPT2Tokenizer" if kind == "gpt2" else "PreTrainedTokenizerFast")
    for name in ("config.json", "generation_config.json"):
        assert read(folder / name)["eos_token_id"] == read(folder / name)["bos_token_id"] == made.end_of_text


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_an_exported_model_never_says_ids_that_its_tokenizer_lacks(export, kind):
    vocab_size, folder = tokenizer_of(kind).vocab_size, export(kind, more=3)
    assert read(folder / "config.json")["vocab_size"] == vocab_size + 3
    suppressed = read(folder / "generation_config.json")["suppress_tokens"]
    assert suppressed == [vocab_size, vocab_size + 1, vocab_size + 2]


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_nothing_is_suppressed_of_a_vocabulary_that_is_the_tokenizers(export, kind):
    assert "suppress_tokens" not in read(export(kind) / "generation_config.json")


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_an_exported_tokenizer(export, kind):
    transformers = pytest.importorskip("transformers")
    made, folder = tokenizer_of(kind), export(kind)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert loaded.eos_token_id == made.end_of_text
    for text in ORDINARY:
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        assert ids == made.encode(text).tolist()
        assert loaded.decode(ids) == text


@pytest.mark.parametrize("kind", ["bytes", "trained", "llama"])
def test_an_export_that_is_imported_has_its_tokenizer(call_program, export, tmp_path, kind):
    made = tokenizer_of(kind)
    finished = call_program("convert_gpt2", "import", export(kind), tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    found = find_tokenizer(find_weights(tmp_path / "run"))
    assert (found.token_bytes, found.end_of_text) == (made.token_bytes, made.end_of_text)
    assert kind == "bytes" or found.identity == made.identity
    assert all(found.encode(text).tolist() == made.encode(text).tolist() for text in TEXTS)


# Imports


@pytest.fixture
def source(tmp_path):
    """A GPT-2 of the Hub with 300 ids and no tokenizer yet."""
    folder = tmp_path / "hub"
    folder.mkdir()
    arrays = load_file(GPT2_FIXTURE / "tied.safetensors")
    arrays = {name: array for name, array in arrays.items() if name.startswith("transformer.")}
    table = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    save_file(arrays | {"transformer.wte.weight": table}, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, vocab_size=300, eos_token_id=0)
    return folder


def write_config(folder, **changes):
    config = read(GPT2_FIXTURE / "config.json") | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def import_run(call_program, source, tmp_path):
    def import_run(name="run"):
        finished = call_program("convert_gpt2", "import", source, tmp_path / name)
        assert finished.returncode == 0, finished.stderr
        return tmp_path / name, finished

    return import_run


def test_a_tokenizer_file_comes_with_the_model(call_program, source, import_run):
    (source / "tokenizer.json").write_bytes(trained().file)
    run, finished = import_run()
    assert "notice" not in finished.stderr and f"uv run test_generation.py {run}" in finished.stdout
    assert f"--tokenizer {run}/initial" in finished.stdout and "evaluate.py" not in finished.stdout
    assert (run / "initial" / "tokenizer.json").read_bytes() == trained().file
    assert json.loads(read_metadata(run / "initial" / "model.safetensors")["tokenizer"]) == trained().identity
    assert read(run / "train.json")["dataset"] == "data/mine"
    completed = call_program("test_generation", run, "--prompt", "é", "--tokens", 4)
    assert completed.returncode == 0 and completed.stdout.startswith("é")


def test_an_imported_run_is_neither_judged_nor_trained_on_tokens_of_gpt2(call_program, source, import_run, tmp_path):
    (source / "tokenizer.json").write_bytes(trained().file)
    run, _ = import_run()
    gpt2s = prepare(tmp_path / "gpt2", write_lines(tmp_path / "a.jsonl", ["!" * 500] * 99), validation=0.2)
    told = complaint(call_program("evaluate", run, "--dataset", gpt2s))
    assert f"{run}: was trained with the tokenizer tokenizer.json (300 ids" in told and "has tokens of gpt2" in told
    (run / "train.json").write_text(json.dumps(read(run / "train.json") | {"dataset": str(gpt2s)}))
    assert f"{gpt2s} has tokens of gpt2 (50,257 ids" in complaint(call_program("train", run))


@pytest.mark.slow
def test_an_imported_run_is_trained_on_text_of_its_own_tokenizer(call_program, source, import_run, tmp_path):
    (source / "tokenizer.json").write_bytes(trained().file)
    run, _ = import_run()
    path = write_lines(tmp_path / "a.jsonl", ["Every effort moves you. " * 20] * 9 + ["Or not. " * 50] * 9)
    mine = prepare(tmp_path / "mine", path, tokenizer=str(run / "initial"), validation=0.5)
    changes = TINY_TRAIN | {"dataset": str(mine), "min_train_tokens": 300, "checkpoint_interval": 2}
    (run / "train.json").write_text(json.dumps(read(run / "train.json") | changes))
    finished = call_program("train", run)
    assert finished.returncode == 0 and "starting from the weights in" in finished.stdout, finished.stderr
    assert find_tokenizer(find_weights(run)).identity == trained().identity
    assert call_program("evaluate", run).returncode == 0


def test_a_vocabulary_and_its_merges_are_a_tokenizer(source, import_run, tmp_path):
    TRAINED.model.save(str(source))
    assert {path.name for path in source.iterdir()} >= {"vocab.json", "merges.txt"}
    run, finished = import_run()
    assert "notice" not in finished.stderr
    found = find_tokenizer(find_weights(run))
    assert found.name == "tokenizer.json" and (run / "initial" / "tokenizer.json").read_bytes() == found.file
    assert (found.token_bytes, found.end_of_text) == (trained().token_bytes, 0)
    assert all(found.encode(text).tolist() == trained().encode(text).tolist() for text in TEXTS)


@pytest.mark.parametrize(
    ("end_id", "end"), [(2, "</s>"), (1, "<s>"), (None, "</s>"), (299, "</s>"), ([2], "</s>"), ("2", "</s>")]
)
def test_the_config_says_which_token_ends_a_text(source, end_id, end):
    (source / "tokenizer.json").write_bytes(content_of(llama_library()))
    assert tokenizer_formats.find(source, end_id, 300).end_token == end


def test_the_config_says_which_token_of_a_vocabulary_ends_a_text(source):
    library = TRAINED
    library.model.save(str(source))
    vocabulary = read(source / "vocab.json")
    (source / "vocab.json").write_text(
        json.dumps({"[STOP]" if i == 0 else token: i for token, i in vocabulary.items()})
    )
    assert tokenizer_formats.find(source, 0, 300).end_token == "[STOP]"
    with pytest.raises(ValueError, match=r"vocab\.json: has no end-of-text token"):
        tokenizer_formats.find(source, None, 300)


def test_a_tokenizer_may_have_fewer_ids_than_the_model(source):
    (source / "tokenizer.json").write_bytes(trained(270).file)
    assert tokenizer_formats.find(source, 0, 300).vocab_size == 270


def gpt2s_files(folder):
    write_config(folder, vocab_size=300, eos_token_id=50_256)
    for name, file in zip(("vocab.json", "merges.txt"), vocabulary_files()):
        shutil.copyfile(file, folder / name)


def no_merges(folder):
    (folder / "vocab.json").write_text(json.dumps(TRAINED.get_vocab()))


def wrong_merges(folder):
    TRAINED.model.save(str(folder))
    (folder / "merges.txt").write_text("#version: 0.2\nx yz\n")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").write_bytes(trained(301).file), "has more ids than its model, 300"),
        (gpt2s_files, "its tokenizer gpt2 (50,257 ids, sha256 1ce16647…) has more ids than its model, 300"),
        (lambda folder: (folder / "tokenizer.json").write_text("["), "tokenizer.json: expected a tokenizer.json of"),
        (no_merges, "vocab.json: not GPT-2's vocabulary; put its merges.txt or tokenizer.json beside it"),
        (wrong_merges, "vocab.json: no vocabulary that fits merges.txt"),
    ],
    ids=["one more id", "GPT-2's files", "not JSON", "no merges", "wrong merges"],
)
def test_a_tokenizer_that_does_not_fit_is_one_line_and_leaves_nothing(call_program, source, tmp_path, spoil, words):
    spoil(source)
    told = complaint(call_program("convert_gpt2", "import", source, tmp_path / "run"))
    assert f"{source}" in told and words in told
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".staging*"))


def test_a_model_of_unknown_tokens_is_imported_with_a_notice(call_program, source, import_run):
    run, finished = import_run()
    assert "has no tokenizer.json and no vocab.json; so it completes no text" in finished.stderr
    assert "tokenizer" not in read_metadata(find_weights(run)) and "test_generation" not in finished.stdout
    assert "put its tokenizer.json beside it" in complaint(call_program("test_generation", run))
    (run / "initial" / "tokenizer.json").write_bytes(trained().file)
    assert call_program("test_generation", run, "--prompt", "é", "--tokens", 2).returncode == 0


@pytest.mark.parametrize(("vocab_size", "name"), [(50_257, "gpt2"), (50_304, "gpt2"), (300, None)])
def test_gpt2s_tokenizer_is_assumed_for_a_vocabulary_of_its_size(tmp_path, capsys, vocab_size, name):
    found = tokenizer_formats.find(tmp_path, 50_256, vocab_size)
    assert (found and found.name) == name
    assert (f"{name} is assumed" if name else "completes no text") in capsys.readouterr().err


@pytest.mark.parametrize("names", [("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.json",)], ids=", ".join)
def test_a_folder_with_gpt2s_vocabulary_has_gpt2s_tokenizer(tmp_path, names):
    if "tokenizer.json" in names:
        (tmp_path / "tokenizer.json").write_bytes(content_of(gpt2_library()))
    for file, name in zip(vocabulary_files(), names if "vocab.json" in names else ()):
        shutil.copyfile(file, tmp_path / name)
    for end_id in (50_256, None):
        assert tokenizer_formats.find(tmp_path, end_id, 50_257) is tokenizer_of("gpt2")
