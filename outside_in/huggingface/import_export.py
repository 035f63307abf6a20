"""Imports a GPT-2, Llama or Qwen3 as a run, and exports a run for `transformers`."""

import tempfile
from pathlib import Path
from typing import Any

from flax import nnx
from huggingface_hub import hf_hub_download, is_offline_mode
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError

from model import count_parameters
from outside_in.config import ModelConfig
from outside_in.config_files import parse_config
from outside_in.data.hub import HUB, HUB_ID, detect_wrong_content, error_message
from outside_in.data.tokenizer import TOKENIZER_FILE, bits_per_byte
from outside_in.huggingface import formats, tokenizer_formats
from outside_in.huggingface.tokenizer_formats import write_json
from outside_in.huggingface.upload import upload
from outside_in.inference.load import find_tokenizer, find_weights, load_saved_model
from outside_in.runtime import cli, signals
from outside_in.storage import manifest
from outside_in.storage.atomic import atomic_directory
from outside_in.storage.checkpoint_folder import find_checkpoints, find_named
from outside_in.storage.run_directory import RunDirectory
from outside_in.storage.strict_json import read_json
from outside_in.storage.text import counted
from outside_in.weights import host_arrays, load_weights, read_metadata, save_weights

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_INDEX_BYTES = 10_000_000
OWN_DATA = "data/mine"  # the dataset of an imported run with another tokenizer than GPT-2's
FINE_TUNING = {  # the train.json of an imported run: a start for the user's own
    "dataset": "builtin/python-docs",
    "microbatch_size": 1,
    "gradient_accumulation_steps": 8,
    "min_train_tokens": -1,
    "learning_rate": 3e-5,
    "checkpoint_interval": 25,
}


def import_run(source: str, target: Path) -> int:
    """Create a run that starts from the weights of a GPT-2, Llama or Qwen3.

    `source` is a folder or a model of the Hub. Returns the exit code.
    """
    folder = find_folder(source)
    hf_config = read_json(folder / CONFIG)
    names = formats.of_config(hf_config, str(folder / CONFIG))
    config = names.import_config(hf_config, str(folder / CONFIG))
    tokenizer = tokenizer_formats.find(folder, hf_config.get("eos_token_id"), config.vocab_size)
    hf_arrays, metadata = open_weights(folder)
    arrays = names.import_weights(hf_arrays, config, str(folder))
    if "model.json" in metadata:  # an export of this program
        original = parse_config(metadata["model.json"], type(config), f"{folder}: model.json in its metadata")
        arrays, config = formats.before_export(arrays, config, original)
    is_gpt2 = tokenizer is not None and tokenizer.name == "gpt2"
    with atomic_directory(target) as staging:
        initial = RunDirectory(staging).initial_weights
        initial.parent.mkdir()
        save_weights(initial, arrays, config.model_dump_json(), tokenizer.identity if tokenizer else None)
        if tokenizer and tokenizer.file:
            (initial.parent / TOKENIZER_FILE).write_bytes(tokenizer.file)
        manifest.write(initial.parent)
        named = str(initial.relative_to(staging))
        write_json(RunDirectory(staging).model_config, config.model_dump())
        data = {} if is_gpt2 else {"dataset": OWN_DATA}
        write_json(RunDirectory(staging).train_config, FINE_TUNING | data | {"initial_weights": named})
    parameters = sum(array.size for array in arrays.values())
    print(
        f"{target}: {parameters:,} parameters of {source}, {counted(config.n_layers, 'layer')}, width {config.emb_dim}"
    )
    if tokenizer:
        print(f"uv run test_generation.py {target}")
    if is_gpt2:
        print(f"uv run evaluate.py {target}")
    elif tokenizer:
        print(f"uv run prepare_data.py {OWN_DATA} --text input.txt --tokenizer {target / 'initial'}    # your text")
    print(f"uv run train.py {target}    # fine-tunes it on the dataset in {RunDirectory(target).train_config}")
    return cli.DONE


def find_folder(source: str) -> Path:
    """Return the local folder of a model, downloaded if need be."""
    if (folder := Path(source)).is_dir() and not source.startswith(HUB):
        if RunDirectory(folder).train_config.is_file():
            raise ValueError(f"{source}: is a run already; import takes a folder in Hugging Face's format")
        return folder
    hub_id = source.removeprefix(HUB)
    is_name = HUB_ID.fullmatch(hub_id) or hub_id.isidentifier() or hub_id.startswith("gpt2-")
    if folder.exists() or not is_name:
        raise ValueError(f"{source}: expected a folder with {CONFIG} and {WEIGHTS}, or a model of the Hub")
    if source == hub_id and "/" in source and folder.parent.is_dir():  # mistyped
        raise ValueError(f"{source}: no such folder; if it is a model of the Hub, write {HUB}{source}")
    try:
        return download_model(hub_id)
    except (OSError, HTTPError, ValueError) as error:
        why = error_message(error, "model")
        raise ValueError(f"{source}: no such folder, and it could not be fetched from the Hub: {why}") from None


def open_weights(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Open the weights of a folder, in one file or several.

    Returns arrays that are read when they are used, and metadata.
    """
    if (folder / WEIGHTS).exists():
        files = {WEIGHTS}
    elif (folder / INDEX).exists():
        files = shards(folder / INDEX)
    else:
        others = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".h5")))
        hint = f"; {others} is another format; load it in transformers and use save_pretrained" if others else ""
        parts = sorted(path.name for path in folder.glob("*.safetensors"))
        hint = f"; {parts[0]} is a part of a model, so put the {INDEX} beside it" if parts else hint
        raise ValueError(f"{folder}: expected {WEIGHTS}, or several and {INDEX}, found neither{hint}")
    if lacking := sorted(file for file in files if not (folder / file).is_file()):
        raise ValueError(
            f"{folder}: lacks {', '.join(lacking[:5])}, {len(lacking)} of the {counted(len(files), 'file')} that "
            f"{INDEX} lists; download the rest"
        )
    arrays: dict[str, Any] = {}
    for file in sorted(files):
        if found := detect_wrong_content(folder / file):
            raise ValueError(f"{folder / file}: expected a safetensors file, got {found}")
        more = load_weights(folder / file)
        if duplicates := sorted(arrays.keys() & more.keys()):
            raise ValueError(f"{folder / file}: has {duplicates[0][:100]!r}, which another file has too")
        arrays |= more
    return arrays, read_metadata(folder / min(files))


def shards(index: Path) -> set[str]:
    """Return the names of the files that an index lists."""
    weight_map = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not files or not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise ValueError(f"{index}: expected a weight_map of names to files beside it")
    return set(files)


def export_folder(source: Path, target: Path, which: str | None) -> int:
    """Write a folder that `transformers` loads.

    It has weights, configs, tokenizer files and a model card. Returns the exit code.
    """
    path = find_checkpoint(source, which)
    parameters = write_export(path, target, str(target))
    print(f"{target}: {parameters:,} parameters of {path}")
    if find_tokenizer(path):
        print(f"lm_eval --model hf --model_args pretrained={target} --tasks hellaswag,lambada_openai")
    return cli.DONE


def push_run(source: Path, name: str, which: str | None, *, token: str, public: bool) -> int:
    """Upload what `export_folder` writes to the Hub as the model `name`. Returns the exit code."""
    path = find_checkpoint(source, which)
    with signals.raising(), tempfile.TemporaryDirectory(prefix="outside-in-push-") as above:
        folder = Path(above) / "export"
        parameters = write_export(path, folder, name)
        print(f"{name}: {parameters:,} parameters of {path}", flush=True)
        message = f"{source.resolve().name}: {path.resolve().parent.name}"
        print(upload(folder, name, token, message, public=public))
    return cli.DONE


def write_export(path: Path, target: Path, name: str) -> int:
    """Write the folder of an export; returns how many parameters it has.

    `path` is a weights file, and `name` that by which the model will be loaded. Raises ValueError when no format
    holds it.
    """
    model = load_saved_model(path)
    config, tokenizer, names = model.config, find_tokenizer(path), formats.of_model(model.config)
    try:
        described = names.export_config(config, tokenizer.end_of_text if tokenizer else None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    arrays = names.export_weights(host_arrays(nnx.state(model, nnx.Param)), config)
    with atomic_directory(target) as staging:
        save_weights(
            staging / WEIGHTS, arrays, config.model_dump_json(), tokenizer.identity if tokenizer else None, format="pt"
        )
        write_json(staging / CONFIG, described)
        if tokenizer:
            tokenizer_formats.write(staging, tokenizer, config)
        parameters = count_parameters(config)
        (staging / "README.md").write_text(model_card(name, path, config, parameters), encoding="utf-8")
    return parameters


def find_checkpoint(source: Path, which: str | None) -> Path:
    """Return the weights file of a run's checkpoint `which`. With None, that is what `find_weights` returns."""
    if which is None:
        return find_weights(source)
    checkpoints = find_checkpoints(RunDirectory(source).checkpoints)
    if named := find_named(checkpoints, which):
        return named.path / WEIGHTS
    names = ", ".join(checkpoint.path.name for checkpoint in checkpoints) or "none"
    raise ValueError(f"{source}: no checkpoint {which!r}; available: {names}")


def model_card(name: str, weights: Path, config: ModelConfig, parameters: int) -> str:
    """Return the README.md of an exported model.

    It says what the model is and how it was trained, as far as its checkpoint records that. `name` is that by which the
    model is loaded.
    """
    folder = weights.resolve().parent
    meta = read_json(folder / "meta.json") if (folder / "meta.json").is_file() else {}
    train = meta.get("train_config", {})
    origin = f"trained with outside-in, in JAX; checkpoint `{folder.name}`" if meta else "exported by outside-in"
    if meta and folder.parent.name == "checkpoints":
        origin += f" of the run `{folder.parent.parent.name}`"
    figures = {
        "initial weights": train.get("initial_weights"),
        "dataset": train.get("dataset"),
        "global steps": meta.get("global_step"),
        "tokens seen": meta.get("tokens_seen"),
        "training loss, mean of the last period": meta.get("avg_train_loss"),
        "validation loss": meta.get("val_loss"),
        "validation loss, bits per byte": _bits_per_byte(meta),
        "peak learning rate": train.get("learning_rate"),
        "weight decay": train.get("weight_decay"),
        "dropout": train.get("drop_rate"),
        "precision": train.get("precision"),
        "seed": train.get("seed"),
        "hours": round(meta["seconds_trained"] / 3600, 2) if "seconds_trained" in meta else None,
        "device": meta.get("versions", {}).get("device"),
    }
    rows = [f"| {what} | {_shown(value)} |" for what, value in figures.items() if value is not None]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {Path(name).name}",
        "",
    ]
    lines += [
        f"A {formats.family(config)} of {parameters:,} parameters, {origin}: {counted(config.n_layers, 'layer')}, "
        f"{counted(config.n_heads, 'head')}, width "
        f"{config.emb_dim}, context {config.context_length:,}, vocabulary {config.vocab_size:,}, "
        f"{'tied' if config.tied_head else 'untied'} head.",
        "",
        *(["| | |", "|---|---|", *rows, ""] if rows else []),
    ]
    call = f'model = AutoModelForCausalLM.from_pretrained("{name}")'
    return "\n".join([*lines, "```python", "from transformers import AutoModelForCausalLM", "", call, "```", ""])


def _bits_per_byte(meta: dict[str, Any]) -> float | None:
    loss, bytes_per_token = meta.get("val_loss"), meta.get("bytes_per_token")  # which older checkpoints lack
    return bits_per_byte(loss, bytes_per_token) if loss and bytes_per_token else None


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}" if isinstance(value, float) else str(value)


def download_model(source: str) -> Path:
    """Download a model of the Hub at one revision; return its folder. The folder is in the client's cache."""
    folder = Path(hf_hub_download(source, CONFIG)).parent

    def get(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(source, name, revision=folder.name))
        except (RemoteEntryNotFoundError, LocalEntryNotFoundError) as error:
            if isinstance(error, LocalEntryNotFoundError) and not is_offline_mode():
                raise  # the Hub cannot be asked
            return None

    if not get(TOKENIZER_FILE):
        for name in (*tokenizer_formats.GPT2_FILES, tokenizer_formats.ADDED_TOKENS):
            get(name)
    if not get(WEIGHTS) and (index := get(INDEX)):
        for name in shards(index):
            get(name)
    return folder
