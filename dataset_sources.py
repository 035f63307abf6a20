"""Where token files come from: a local folder, the built-in data, or a dataset on the Hugging Face Hub."""

import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from builtin_data import BUILTIN

DATA_FOLDER = Path(__file__).parent / "data"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def dataset_folder(dataset: str, *, fetch: bool = True) -> Path:
    """Find the folder that holds `train.safetensors` for a built-in name, a local folder or a Hub dataset id.

    With `fetch`, built-in data are made and Hub data downloaded when they are not there yet.
    Raises ValueError when the dataset does not exist or cannot be fetched.
    """
    if dataset in BUILTIN:
        make, version = BUILTIN[dataset]
        folder = DATA_FOLDER / dataset / version
        if fetch and not folder.exists():
            _write_token_files(folder, make())
        return folder
    if dataset.startswith("builtin/"):
        raise ValueError(f"dataset: no built-in data named {dataset!r}; use one of {', '.join(BUILTIN)}")
    if Path(dataset).is_dir():
        return Path(dataset)
    if not HUB_ID.fullmatch(dataset):
        raise ValueError(f"dataset: no folder {dataset!r}, and it is not a Hub id (owner/name) or built-in name")
    folder = DATA_FOLDER / dataset
    if fetch and not (folder / "train.safetensors").exists():
        _download(dataset, folder)
    return folder


def dataset_revision(folder: Path) -> str | None:
    """Return the commit of the Hub dataset that a folder was downloaded from, as the client has noted it there."""
    note = folder / ".cache" / "huggingface" / "download" / "train.safetensors.metadata"
    return note.read_text().split("\n")[0] if note.is_file() else None


def _write_token_files(folder: Path, tokens: dict[str, np.ndarray]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder.parent))
    try:
        for split, ids in tokens.items():
            save_file({"tokens": ids}, staging / f"{split}.safetensors")
        staging.rename(folder)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if not (isinstance(error, OSError) and folder.exists()):  # else another process has made the same one
            raise


def _download(dataset: str, folder: Path) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError

    try:
        for split in ("validation", "train"):  # train last: its presence says that the download is complete
            try:
                hf_hub_download(dataset, f"{split}.safetensors", repo_type="dataset", local_dir=folder)
            except EntryNotFoundError as error:
                if split == "train" or isinstance(error, LocalEntryNotFoundError):
                    raise
    except (OSError, HTTPError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"dataset: no folder {dataset!r} here, and the Hub dataset of that name could not be fetched: {reason}"
        ) from None
