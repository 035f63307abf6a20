"""Where token files come from: a folder, built-in data, or the Hub; and of which tokenizer they are."""

from pathlib import Path

from safetensors.numpy import save_file

from outside_in.config import load_config
from outside_in.data.builtin import Builtin, find_builtin
from outside_in.data.hub import (
    HUB_FILE,
    HUB_ID,
    TOKEN_FILES,
    TRAIN,
    HubSnapshot,
    detect_wrong_content,
    download_dataset,
    missing,
)
from outside_in.data.tokenizer import TOKENIZER_FILE, Tokenizer
from outside_in.data.tokenizer_files import folder_tokenizer, load
from outside_in.storage.atomic import atomic_directory

DATA_FOLDER = Path(__file__).parents[2] / "data"


def dataset_folder(dataset: str, *, fetch: bool = True) -> Path:
    """Return the folder with the token files of a dataset.

    Takes a built-in name, a local folder or a Hub dataset id. With `fetch`, built-in data are made and Hub data
    downloaded if they are missing.
    Raises ValueError when the dataset does not exist or cannot be fetched, or when a file is of the wrong kind.
    """
    if builtin := find_builtin(dataset):
        folder = DATA_FOLDER / dataset / builtin.version
        if fetch and not folder.exists():
            _write_token_files(folder, builtin)
        return folder
    folder = Path(dataset)
    if not folder.is_dir():
        if not HUB_ID.fullmatch(dataset):
            raise ValueError(f"dataset: no folder {dataset!r}, and it is not a Hub id (owner/name) or built-in name")
        owner, folder = folder.parent, DATA_FOLDER / dataset
        if owner.is_dir() and not folder.is_dir():  # "data/mine", mistyped
            inside = ", ".join(sorted(path.name for path in owner.iterdir() if path.is_dir())[:10])
            raise ValueError(f"dataset: no folder {dataset!r}; {owner} has {inside or 'none'}")
        if fetch and missing(folder):
            download_dataset(dataset, folder)
    for path in (folder / name for name in TOKEN_FILES):
        if path.is_file() and (found := detect_wrong_content(path)):
            raise ValueError(f"{path}: expected a safetensors file, got {found}; put the file itself there")
    return folder


def dataset_revision(folder: Path) -> str | None:
    """Return the commit of the Hub dataset that a folder holds.

    Returns None when the folder was not downloaded, by this program or by the Hub's.
    """
    if (folder / HUB_FILE).is_file():
        return load_config(folder / HUB_FILE, HubSnapshot).revision
    metadata = folder / ".cache" / "huggingface" / "download" / f"{TRAIN}.metadata"
    return metadata.read_text().split("\n")[0] if metadata.is_file() else None


def dataset_tokenizer(dataset: str) -> Tokenizer | None:
    """Return the tokenizer of a dataset's tokens; None where nothing says which, or the data are not here yet.

    Raises ValueError when the one that its `data.json` names is missing.
    """
    if (builtin := find_builtin(dataset)) and builtin.tokenizer in ("gpt2", "bytes"):
        return load(builtin.tokenizer)
    return folder_tokenizer(dataset_folder(dataset, fetch=False))


def _write_token_files(folder: Path, builtin: Builtin) -> None:
    splits, made = builtin.make()
    try:
        with atomic_directory(folder) as staging:
            for split, ids in splits.items():
                save_file({"tokens": ids}, staging / f"{split}.safetensors")
            if made.file:
                (staging / TOKENIZER_FILE).write_bytes(made.file)
    except OSError:
        if not folder.exists():  # else another process has made the same one
            raise
