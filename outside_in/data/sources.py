"""Where token files come from: a folder, built-in data, or the Hub; and of which tokenizer they are."""

from pathlib import Path

from safetensors.numpy import save_file

from outside_in.config_files import load_config
from outside_in.data.builtin import Builtin, find_builtin
from outside_in.data.hub import (
    HUB,
    HUB_FILE,
    HUB_ID,
    TOKEN_FILES,
    HubSnapshot,
    describe_download,
    detect_wrong_content,
    download_dataset,
    missing,
)
from outside_in.data.token_files import TRAIN, open_tokens
from outside_in.data.tokenizer import TOKENIZER_FILE, Tokenizer
from outside_in.data.tokenizer_files import folder_tokenizer, load
from outside_in.storage.atomic import atomic_directory

DATA_FOLDER = Path(__file__).parents[2] / "data"


def dataset_folder(dataset: str, *, fetch: bool = True) -> Path:
    """Return the folder with the token files of a dataset.

    Takes a built-in name, a local folder, or hub:owner/name. With `fetch`, built-in data are made and Hub data
    downloaded if they are missing.
    Raises ValueError when the dataset does not exist or cannot be fetched, or when a file is of the wrong kind.
    """
    if builtin := find_builtin(dataset):
        folder = DATA_FOLDER / dataset / builtin.version
        if fetch and not folder.exists():
            _write_token_files(folder, builtin)
        return folder
    folder = Path(dataset)
    if is_on_hub(dataset):
        folder = hub_folder(dataset)
        if fetch and missing(folder):
            download_dataset(dataset, folder)
    for path in (folder / name for name in TOKEN_FILES):
        if path.is_file() and (found := detect_wrong_content(path)):
            raise ValueError(f"{path}: expected a safetensors file, got {found}; put the file itself there")
    return folder


def is_on_hub(dataset: str) -> bool:
    """Return whether a dataset is neither a built-in one nor a local folder."""
    return dataset.startswith(HUB) or not (find_builtin(dataset) or Path(dataset).is_dir())


def hub_folder(dataset: str) -> Path:
    """Return the folder of hub:owner/name; owner/name will do where there is no local folder `owner`.

    Raises ValueError for other names.
    """
    hub_id = dataset.removeprefix(HUB)
    folder, owner = DATA_FOLDER / hub_id, Path(hub_id).parent
    if not HUB_ID.fullmatch(hub_id):
        if dataset != hub_id:
            raise ValueError(f"dataset: expected {HUB}owner/name for a Hub dataset, got {dataset!r}")
        raise ValueError(f"dataset: no folder {dataset!r}, and it is not a Hub id (owner/name) or built-in name")
    is_local = owner.is_dir() or str(owner) == DATA_FOLDER.name  # "data/mine", mistyped, or not made yet
    if dataset == hub_id and is_local and not folder.is_dir():
        inside = sorted(path.name for path in owner.iterdir() if path.is_dir()) if owner.is_dir() else []
        raise ValueError(
            f"dataset: no folder {dataset!r}; {owner} has {', '.join(inside[:10]) or 'none'}; "
            f"if it is a Hub dataset, write {HUB}{dataset}"
        )
    return folder


def availability(dataset: str) -> str:
    """Return whether a dataset's tokens are found here, or how they will come; nothing is fetched yet.

    Raises ValueError where they are missing.
    """
    folder = dataset_folder(dataset, fetch=False)
    if is_on_hub(dataset) and missing(folder):
        return describe_download(dataset, folder)
    if find_builtin(dataset) and not folder.exists():
        return "will be made on this machine"
    open_tokens(folder / TRAIN)  # raises ValueError when it is missing, or no token file
    return "found"


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
