"""A tokenizer rides with the data into every checkpoint, and everything that reads a model uses it or says why not."""

import contextlib
import functools
import hashlib
import importlib
import json
import math
import shutil
from contextlib import closing
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx
from helpers import TINY_MODEL, TINY_TRAIN, complaint, run_program, tiny_model
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import checkpointing
from outside_in.config import ModelConfig
from outside_in.config_files import load_config
from outside_in.data.prepare.documents import ReadOptions, find_files
from outside_in.data.prepare.pipeline import Options, Preparation
from outside_in.data.tokenizer import vocabulary_files
from outside_in.data.tokenizer_files import from_file, load
from outside_in.data.train_tokenizer import train_tokenizer
from outside_in.inference.generation import Sampling, generate, likeliest_outputs
from outside_in.runtime import cli
from outside_in.training.checkpoint_writer import sample
from outside_in.weights import host_arrays, read_metadata, save_weights

pytestmark = pytest.mark.slow

# Tokenizers of every kind, which the tests of `data` and `huggingface` share

PROSE = [topics[name][:2000] for name in sorted(topics)[:40]]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
KINDS = ("gpt2", "bytes", "trained", "llama")  # whose text comes back whatever it is
TEXTS = [
    "",
    "a",
    "Every effort moves you",
    " \n two  spaces \t\r\n ",
    "Всякое усилие движет тебя",
    "每一份努力都会推动你",
    "あらゆる努力があなたを動かす",
    "모든 노력이 당신을 움직인다",
    "كل جهد يحركك",
    "כל מאמץ מזיז אותך",
    "हर प्रयास आपको आगे बढ़ाता है",
    "ทุกความพยายาม",
    "Κάθε προσπάθεια",
    "እያንዳንዱ ጥረት",
    "ကြိုးစားမှုတိုင်း",
    "🦜👩‍👩‍👧‍👦🏳️‍🌈",
    "\x00\x01\x7f\x1b[31m\x00",
    "\u2028\ufeff\u00a0\ufffd",
    "a" * 300 + "\n" * 50,
    "<|endoftext|></s><s><unk><0x41>",
]


def llama_library(end="</s>"):
    """A BPE with byte fallback, in the form in which Llama 2's comes."""
    merges = [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        ("\u2581", "hello"),
        ("т", "ь"),
        ("\u2581", "\u2581"),
    ]
    letters = ["\u2581", *"abehlo", "т", "ь", "三"]
    tokens = ["<unk>", "<s>", end, *BYTES, *letters, *("".join(merge) for merge in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    library = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    library.decoder = spaces_decoder()
    library.add_special_tokens(["<unk>", "<s>", end])
    return library


def unigram_library(unk_id=0):
    """A Unigram model with byte fallback, in the form in which SentencePiece's comes."""
    words = [("\u2581", -2.0), ("\u2581hello", -3.0), ("a", -4.0), ("hello", -5.0), ("三", -6.0)]
    vocab = [*((token, 0.0) for token in SPECIAL), *((token, -10.0) for token in BYTES), *words]
    library = Tokenizer(models.Unigram(vocab, unk_id, byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = spaces_decoder()
    library.add_special_tokens(SPECIAL)
    return library


def spaces_decoder():
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(parts)


@functools.cache
def gpt2_library():
    """GPT-2's vocabulary as the Hub has it: the end of a text is among the added tokens alone."""
    library = Tokenizer(models.BPE.from_file(*map(str, vocabulary_files())))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    form = json.loads(library.to_str())
    del form["model"]["vocab"]["<|endoftext|>"]
    return Tokenizer.from_str(json.dumps(form))


def content_of(library, **changes):
    """The content of a library's tokenizer.json, with other parts."""
    return json.dumps(json.loads(library.to_str()) | changes).encode()


@functools.cache
def trained(vocab_size=300):
    return train_tokenizer(PROSE, vocab_size)


@functools.cache
def tokenizer_of(kind):
    if kind in ("gpt2", "bytes"):
        return load(kind)
    if kind == "trained":
        return trained()
    return from_file(content_of(llama_library() if kind == "llama" else unigram_library()), kind)


def streamed(made, ids):
    """What a stream of single tokens says, as the beginning of a text."""
    text = "".join(made.decode_stream([[i] for i in ids]))
    return text.removeprefix(" ") if made.adds_space else text


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepare(out, *paths, workers=2, stop_after=None, overwrite=False, **options):
    """Prepare a folder, or stop after so many batches; return it."""
    options.setdefault("reading", ReadOptions())
    with closing(Preparation(out, find_files(list(paths)), Options(**options), overwrite=overwrite)) as preparation:
        shown = []
        preparation.read(
            workers, lambda: stop_after is not None and len(shown) >= stop_after, lambda *_: shown.append(1)
        )
        if preparation.progress.all_read:
            preparation.finish(lambda done: None)
    return out


def spec_of(kind, folder):
    """What `--tokenizer` takes for a kind."""
    if kind in ("gpt2", "bytes"):
        return kind
    if kind == "trained":
        return "train:300"
    (folder / f"{kind}.json").write_bytes(tokenizer_of(kind).file)
    return str(folder / f"{kind}.json")


# A run on data of a trained tokenizer, made once; each test gets a copy of it


def write_run(folder, model, train):
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps(TINY_MODEL | model))
    (folder / "train.json").write_text(json.dumps(TINY_TRAIN | train))
    return folder


def train(run):
    program = importlib.import_module("train")
    with pytest.raises(SystemExit) as exit_info:
        cli.run(program.main, program.make_parser(), [str(run)])
    assert exit_info.value.code == 0


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Data of two tokenizers, and a run on one of them. Datasets are named relative to the folder."""
    folder = tmp_path_factory.mktemp("everywhere")
    text = write_lines(folder / "prose.jsonl", PROSE)
    with contextlib.chdir(folder):
        for name, tokenizer in (("tokens", "train:300"), ("bytes", "bytes")):
            prepare(Path(name), text, tokenizer=tokenizer, validation=0.2)
        train(write_run(folder / "run", {"vocab_size": 300}, {"dataset": "tokens", "keep_checkpoints": None}))
    return folder


@pytest.fixture
def folder(original, tmp_path, monkeypatch):
    """A copy of it, which is the working directory."""
    shutil.copytree(original, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def checkpoints_of(run):
    return [checkpoint.path for checkpoint in checkpointing.find_checkpoints(run / "checkpoints")]


def replace_tokenizer(folder):
    """Put another tokenizer with the same ids into a folder of tokens, and say so in its data.json."""
    content = content_of(Tokenizer.from_file(str(folder / "tokenizer.json")), post_processor=None)
    (folder / "tokenizer.json").write_bytes(content)
    description = json.loads((folder / "data.json").read_text())
    changes = {"tokenizer_sha256": hashlib.sha256(content).hexdigest()}
    (folder / "data.json").write_text(json.dumps(description | changes))


def test_every_checkpoint_holds_the_tokenizer_of_the_data(folder):
    content = (folder / "tokens" / "tokenizer.json").read_bytes()
    identity = {"name": "tokenizer.json", "sha256": hashlib.sha256(content).hexdigest(), "end_of_text": "<|endoftext|>"}
    found = checkpoints_of(folder / "run")
    assert len(found) == 3
    for path in found:
        assert (path / "tokenizer.json").read_bytes() == content
        assert json.loads(read_metadata(path / "model.safetensors")["tokenizer"]) == identity
        assert json.loads((path / "meta.json").read_text())["tokenizer"] == identity
        assert "tokenizer.json" in json.loads((path / "manifest.json").read_text())


@pytest.mark.parametrize("options", [("--temperature", 0), ("--samples", 2), ("--special-tokens", "--ignore-end")])
def test_a_checkpoint_completes_text_wherever_it_is(call_program, folder, tmp_path, options):
    moved = shutil.copytree(checkpoints_of(folder / "run")[0], tmp_path / "moved")
    shutil.rmtree(folder)
    finished = call_program("test_generation", moved, "--prompt", "a<|endoftext|>é", "--tokens", 8, *options)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("a<|endoftext|>é") == (2 if "--samples" in options else 1)
    assert len(finished.stdout) > len("a<|endoftext|>é\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "tokenizer.json: expected gpt2, bytes, or a tokenizer.json, found no such file"),
        (b"{", "tokenizer.json: expected a tokenizer.json of Hugging Face's tokenizers"),
        (content_of(llama_library()), "tokenizer.json: has no token '<|endoftext|>'"),
        (content_of(gpt2_library()), "tokenizer.json: expected the tokenizer of"),
    ],
    ids=["none", "garbage", "of other tokens", "GPT-2's"],
)
def test_a_checkpoint_without_its_tokenizer_completes_nothing(call_program, folder, content, words):
    path = checkpoints_of(folder / "run")[-1]
    (path / "tokenizer.json").unlink()
    if content:
        (path / "tokenizer.json").write_bytes(content)
    told = complaint(call_program("test_generation", path))
    assert f"{path}/{words}" in told


def test_the_program_says_in_one_line_that_the_tokenizer_is_another(folder):
    path = checkpoints_of(folder / "run")[-1]
    (path / "tokenizer.json").write_bytes(trained(299).file)
    told = complaint(run_program("test_generation.py", path))
    assert (
        f"{path}/tokenizer.json: expected the tokenizer of {path}/model.safetensors, whose sha256 begins with" in told
    )


def test_a_run_is_not_resumed_on_data_whose_tokenizer_has_changed(call_program, folder):
    replace_tokenizer(folder / "tokens")
    first = checkpoints_of(folder / "run")[0].name
    told = complaint(call_program("train", folder / "run", "--from", first))
    assert "the tokenizer of the data differs from the checkpoint's" in told and "start a new run" in told


def test_a_run_is_resumed_on_the_same_data(call_program, folder):
    first = checkpoints_of(folder / "run")[0].name
    finished = call_program("train", folder / "run", "--from", first)
    assert finished.returncode == 0, finished.stderr
    resumed = checkpoints_of(folder / "run")[-1]
    assert (resumed / "tokenizer.json").read_bytes() == (folder / "tokens" / "tokenizer.json").read_bytes()


def test_data_whose_tokenizer_file_is_another_one_are_refused(call_program, folder):
    (folder / "tokens" / "tokenizer.json").write_bytes(trained(299).file)
    told = complaint(call_program("train", folder / "run", "--from", checkpoints_of(folder / "run")[0].name))
    assert "tokens/tokenizer.json: expected the tokenizer of tokens/data.json" in told


def with_initial_weights(folder, dataset):
    weights = checkpoints_of(folder / "run")[-1] / "model.safetensors"
    changes = {"dataset": dataset, "initial_weights": str(weights), "min_train_tokens": 128}
    return write_run(folder / f"from-{dataset}", {"vocab_size": 300}, changes)


def test_initial_weights_of_another_tokenizer_are_refused(call_program, folder):
    told = complaint(call_program("train", with_initial_weights(folder, "bytes")))
    assert "initial_weights: " in told and "was trained with the tokenizer tokenizer.json (300 ids" in told
    assert "but bytes has tokens of bytes (257 ids" in told


def test_initial_weights_of_the_same_tokenizer_are_taken(call_program, folder):
    finished = call_program("train", with_initial_weights(folder, "tokens"))
    assert finished.returncode == 0 and "starting from the weights in" in finished.stdout


# Evaluation


def test_bits_per_byte_are_those_of_the_text(call_program, folder):
    finished = call_program("evaluate", folder / "run", "--json", folder / "out.json")
    assert finished.returncode == 0, finished.stderr
    found = json.loads((folder / "out.json").read_text())
    made, [row] = load(folder / "tokens"), found["models"]
    predicted = load_file(folder / "tokens" / "validation.safetensors")["tokens"][1:]
    text = made.decode(predicted).replace("<|endoftext|>", "")
    assert found["judged_on"]["tokens"] == len(predicted)
    assert row["bits_per_byte"] == pytest.approx(row["loss"] * len(predicted) / math.log(2) / len(text.encode()))


def test_a_model_is_not_evaluated_on_tokens_of_another_tokenizer(call_program, folder):
    told = complaint(call_program("evaluate", folder / "run", "--dataset", "bytes"))
    assert "was trained with the tokenizer tokenizer.json" in told and "prepare the text with the model's" in told


def test_every_model_that_is_evaluated_must_have_the_tokenizer_of_the_data(call_program, folder):
    other = save_model(folder / "other", tiny_model(vocab_size=300), "bytes")
    told = complaint(
        call_program("evaluate", folder / "run", checkpoints_of(folder / "run")[0], other, "--dataset", "tokens")
    )
    assert f"error: {other}: was trained with the tokenizer bytes" in told


def test_the_data_of_a_run_whose_tokenizer_has_changed_are_not_its_own(call_program, folder):
    replace_tokenizer(folder / "tokens")
    assert "was trained with the tokenizer" in complaint(call_program("evaluate", folder / "run"))


# The size of the vocabulary


@pytest.mark.parametrize(("dataset", "vocab_size"), [("tokens", 300), ("bytes", 257), ("builtin/every-token", 50_257)])
def test_a_new_run_takes_its_vocabulary_from_the_data(call_program, folder, dataset, vocab_size):
    write_run(folder / "like", {"vocab_size": 1000}, {"dataset": "elsewhere"})
    finished = call_program("train", "--new", folder / "new", "--like", folder / "like", f"dataset={dataset}")
    assert finished.returncode == 0, finished.stderr
    assert load_config(folder / "new" / "model.json", ModelConfig).vocab_size == vocab_size


def test_a_new_run_keeps_the_vocabulary_that_is_asked_for(call_program, folder):
    arguments = ("--new", folder / "new", "--like", folder / "run", "dataset=bytes", "model.vocab_size=320")
    assert call_program("train", *arguments).returncode == 0
    assert load_config(folder / "new" / "model.json", ModelConfig).vocab_size == 320


def test_a_vocabulary_that_is_smaller_than_the_tokenizers_is_refused(call_program, folder):
    run = write_run(folder / "small", {"vocab_size": 299}, {"dataset": "tokens"})
    told = complaint(call_program("train", run))
    assert "model.json: vocab_size=299, but tokens has tokens of tokenizer.json (300 ids" in told
    assert "use vocab_size 300 or more" in told


def test_a_vocabulary_may_be_larger_than_the_tokenizers(call_program, folder):
    changes = {"dataset": "bytes", "min_train_tokens": 300, "sample_prompt": "é"}
    run = write_run(folder / "large", {"vocab_size": 300}, changes)
    assert call_program("train", run).returncode == 0
    lines = (run / "samples.txt").read_text().splitlines()
    assert len(lines) == 3 and all(line.startswith("step 3 | é") for line in lines)
    for options in (("--temperature", 0), ("--temperature", 5, "--samples", 4)):
        finished = call_program("test_generation", run, "--prompt", "é", "--tokens", 20, *options)
        assert finished.returncode == 0, finished.stderr
    finished = call_program("evaluate", run, "--json", folder / "out.json")
    assert finished.returncode == 0, finished.stderr
    [row] = json.loads((folder / "out.json").read_text())["models"]
    predicted = load_file(folder / "bytes" / "validation.safetensors")["tokens"][1:]
    assert row["bits_per_byte"] == pytest.approx(row["loss"] * predicted.size / math.log(2) / (predicted < 256).sum())


def save_model(folder, model, kind):
    """Save a model of a tokenizer that has no file."""
    folder.mkdir()
    arrays = host_arrays(nnx.state(model, nnx.Param))
    identity = tokenizer_of(kind).identity
    save_weights(folder / "model.safetensors", arrays, model.config.model_dump_json(), identity)
    return folder


@pytest.fixture(scope="module")
def beyond():
    """A model of 300 ids that would always say one of the last 43, else an A."""
    model = tiny_model(vocab_size=300)
    model.output_norm.scale[...] = np.zeros(32, np.float32)
    model.output_norm.bias[...] = np.ones(32, np.float32)
    logits_V = np.zeros(300, np.float32)
    logits_V[257:], logits_V[ord("A")] = 2, 1
    model.head.embedding[...] = np.tile(logits_V[:, None], 32)
    return model


@pytest.mark.parametrize("temperature", [None, 1.0, 100.0])
def test_ids_that_the_tokenizer_lacks_are_never_chosen(beyond, temperature):
    options = {"num_tokens": 20, "num_samples": 8 if temperature else 1}
    free = generate(beyond, [1, 2], sampling=Sampling(temperature), **options)
    assert (free >= 257).any()
    restricted = generate(beyond, [1, 2], sampling=Sampling(temperature, vocab_size=257), **options)
    assert (restricted < 257).all()
    assert temperature == 100 or (restricted == ord("A")).all()


@pytest.mark.parametrize("limits", [{"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_the_likeliest_are_chosen_among_ids_that_the_tokenizer_has(beyond, limits):
    drawn = generate(beyond, [1], num_tokens=20, num_samples=8, sampling=Sampling(20.0, vocab_size=257, **limits))
    assert (drawn < 257).all() and (drawn == ord("A")).any()


def test_the_likeliest_outputs_are_ids_that_the_tokenizer_has(beyond):
    assert min(likeliest_outputs(beyond, [1, 2, 3])) >= 257
    assert likeliest_outputs(beyond, [1, 2, 3], 257) == [ord("A")] * 3


def test_a_completion_has_no_id_that_the_tokenizer_lacks(call_program, tmp_path, beyond):
    weights = save_model(tmp_path / "beyond", beyond, "bytes")
    greedy = call_program("test_generation", weights, "--prompt", "x", "--tokens", 12, "--temperature", 0)
    sampled = call_program("test_generation", weights, "--prompt", "x", "--tokens", 12, "--samples", 2)
    assert greedy.stdout == "x" + "A" * 12 + "\n" and sampled.stdout == greedy.stdout * 2


def test_a_text_maps_to_itself_in_ids_that_the_tokenizer_has(call_program, tmp_path):
    model = tiny_model(vocab_size=300, n_layers=0, emb_dim=300, position_embedding=False, output_norm=False)
    identity = np.eye(300, dtype=np.float32)
    model.token_embedding.embedding[...] = identity
    identity[257:] = 2  # likelier than the input itself
    model.head.embedding[...] = identity
    weights = save_model(tmp_path / "identity", model, "bytes")
    finished = call_program("test_a_to_a", weights, "--text", "Aé🦜")
    assert finished.returncode == 0 and "7 of 7 tokens map to themselves" in finished.stdout
    assert "output:\nAé🦜" in finished.stdout


# Samples


def test_samples_are_three_lines_for_each_checkpoint_and_the_same_in_equal_runs(folder):
    lines = (folder / "run" / "samples.txt").read_text().splitlines()
    assert [line.partition(" | ")[0] for line in lines] == ["step 5"] * 3 + ["step 10"] * 3 + ["step 12"] * 3
    assert all(line.partition(" | ")[2].startswith("Every effort moves you") for line in lines)
    assert len(set(lines)) == 9
    again = write_run(folder / "again", {"vocab_size": 300}, {"dataset": "tokens"})
    train(again)
    assert (again / "samples.txt").read_bytes() == (folder / "run" / "samples.txt").read_bytes()


def sample_of(model, kind, **config):
    return sample(
        SimpleNamespace(
            tokenizer=tokenizer_of(kind),
            model=model,
            mesh=SimpleNamespace(devices=np.zeros(1)),
            config=SimpleNamespace(**{"sample_prompt": "x", "objective": "next-token"} | config),
            bytes_per_token=1.0,
        )
    )


def test_a_sample_ends_where_the_text_ends():
    model = tiny_model(vocab_size=257)
    model.output_norm.scale[...] = np.zeros(32, np.float32)
    model.output_norm.bias[...] = np.ones(32, np.float32)
    logits_V = np.full(257, -100, np.float32)
    logits_V[[256, ord("A")]] = 0
    model.head.embedding[...] = np.tile(logits_V[:, None] / 32, 32)
    texts = sample_of(model, "bytes")
    assert len(texts) == 3 and len(set(texts)) > 1
    assert all(set(text.removeprefix("x")) <= {"A"} and len(text) < 100 for text in texts)


def test_a_sample_has_no_id_that_the_tokenizer_lacks(beyond):
    assert sample_of(beyond, "bytes") == ["x" + "A" * 120] * 3
    assert sample_of(beyond, "bytes", objective="a-to-a", sample_prompt="xyz") == ["xyz → AAA"]


# Data whose tokenizer only a file says


def test_a_tokenizer_file_beside_tokens_without_a_description_is_theirs(call_program, folder):
    bare = folder / "bare"
    bare.mkdir()
    for split in ("train", "validation"):
        tokens = load_file(folder / "tokens" / f"{split}.safetensors")["tokens"]
        save_file({"tokens": tokens[:1000]}, bare / f"{split}.safetensors")
    (bare / "tokenizer.json").write_bytes((folder / "tokens" / "tokenizer.json").read_bytes())
    assert call_program("evaluate", folder / "run", "--dataset", bare).returncode == 0
    (bare / "tokenizer.json").write_bytes(trained(299).file)
    told = complaint(call_program("evaluate", folder / "run", "--dataset", bare))
    assert "has tokens of tokenizer.json (299 ids" in told
