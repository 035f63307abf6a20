"""Weights in Hugging Face's format, given to any program, lead to the line that imports them."""

import json
import shutil

import pytest
from helpers import GPT2_FIXTURE, complaint
from safetensors.numpy import load_file, save_file

ADVICE = "is in transformers' format; import it: uv run convert_gpt2.py import"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]


@pytest.fixture
def folder(tmp_path):
    """A folder as `save_pretrained` writes it; its name has a space."""
    folder = tmp_path / "my gpt2"
    folder.mkdir()
    config = json.loads((GPT2_FIXTURE / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(arrays(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def arrays():
    found = load_file(GPT2_FIXTURE / "tied.safetensors")
    return {name: array for name, array in found.items() if name not in ("tokens", "logits")}


def shard(folder):
    """Put the weights into two files and an index."""
    names = sorted(arrays())
    weight_map = {name: SHARDS[i % 2] for i, name in enumerate(names)}
    (folder / "model.safetensors").unlink()
    for file in SHARDS:
        part = {name: arrays()[name] for name in names if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def only_a_file(folder, names=lambda name: name, **metadata):
    """Return a weights file with nothing beside it."""
    path = folder.parent / "alone" / "weights.safetensors"
    path.parent.mkdir()
    save_file({names(name): array for name, array in arrays().items()}, path, metadata=metadata or None)
    return path


FORMS = {
    "a folder": lambda folder: folder,
    "its weights": lambda folder: folder / "model.safetensors",
    "a folder of several files": shard,
    "one of several files": lambda folder: shard(folder) / SHARDS[0],
    "a file alone": lambda folder: only_a_file(folder, format="pt"),
    "without metadata": lambda folder: only_a_file(folder),
    "OpenAI's names": lambda folder: only_a_file(folder, lambda name: name.removeprefix("transformer.")),
    "pickled": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
}
PROGRAMS = {
    "evaluate": (),
    "test_generation": (),
    "test_a_to_a": (),
    "inspect_checkpoint": (),
    "convert_gpt2": ("export",),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_names_the_line_that_imports_them(call_program, folder, tmp_path, form, program):
    path = FORMS[form](folder)
    target = (tmp_path / "out",) if program == "convert_gpt2" else ()
    told = complaint(call_program(program, *PROGRAMS[program], path, *target))
    source = path if path.is_dir() else path.parent
    quoted = f"'{source}'" if " " in str(source) else source
    assert f"{ADVICE} {quoted} RUN" in told


@pytest.mark.parametrize("form", FORMS)
def test_a_run_cannot_start_from_them(call_program, make_run, folder, form):
    run = make_run(train={"initial_weights": str(FORMS[form](folder))})
    for arguments in ((run,), (run, "--check")):
        assert ADVICE in complaint(call_program("train", *arguments))


@pytest.mark.parametrize("arguments", [(), ("--check",)])
def test_they_are_no_run(call_program, folder, arguments):
    assert ADVICE in complaint(call_program("train", folder, *arguments))


def test_the_line_works_when_it_is_typed(call_program, folder, tmp_path):
    told = complaint(call_program("evaluate", folder))
    assert told.endswith(f"convert_gpt2.py import '{folder}' RUN")
    assert call_program("convert_gpt2", "import", folder, tmp_path / "run").returncode == 0
    assert call_program("inspect_checkpoint", tmp_path / "run").returncode == 0


def test_a_model_of_the_hub_must_be_imported(call_program):
    told = complaint(call_program("evaluate", "openai-community/gpt2"))
    assert told.endswith("must be imported: uv run convert_gpt2.py import openai-community/gpt2 RUN")
    assert "must be imported" not in complaint(call_program("evaluate", "runs/gpt-2-samll"))


@pytest.mark.parametrize("lost", [SHARDS[:1], SHARDS[1:], SHARDS])
def test_a_missing_file_of_several_is_named(call_program, folder, tmp_path, lost):
    shard(folder)
    for name in lost:
        (folder / name).unlink()
    told = complaint(call_program("convert_gpt2", "import", folder, tmp_path / "run"))
    assert f"{folder}: lacks {', '.join(lost)}, {len(lost)} of the 2 files that model.safetensors.index.json" in told


def test_a_missing_index_is_named(call_program, folder, tmp_path):
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()
    told = complaint(call_program("convert_gpt2", "import", folder, tmp_path / "run"))
    assert f"{SHARDS[0]} is a part of a model, so put the model.safetensors.index.json beside it" in told


def test_a_missing_folder_asks_no_stranger(call_program, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "models" / "gpt2")
    told = complaint(call_program("convert_gpt2", "import", "models/gtp2", tmp_path / "run"))
    assert "models/gtp2: no such folder; if it is a model of the Hub, write hub:models/gtp2" in told
