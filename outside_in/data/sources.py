"""Where token files come from: a local folder, the built-in data, or a dataset on the Hugging Face Hub."""

import functools
import hashlib
import re
import warnings
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from outside_in.config import Config, load_config
from outside_in.data.builtin import BUILTIN
from outside_in.storage.atomic import appearing

DATA_FOLDER = Path(__file__).parents[2] / "data"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
NOTE = "hub.json"
TRAIN = "train.safetensors"
TOKEN_FILES = (TRAIN, "validation.safetensors")


class HubFile(Config):
    """What the Hub says of a file: its ETag is the SHA-256 of a large one (Git LFS), git's own SHA-1 of a small one."""

    size: int  # bytes
    etag: str


class HubNote(Config):
    """`hub.json`: the commit of a Hub dataset that a folder holds, or will once its download is complete."""

    revision: str
    files: dict[str, HubFile]


def dataset_folder(dataset: str, *, fetch: bool = True) -> Path:
    """Find the folder that holds `train.safetensors` for a built-in name, a local folder or a Hub dataset id.

    With `fetch`, built-in data are made and Hub data downloaded when they are not there yet.
    Raises ValueError when the dataset does not exist or cannot be fetched, or a file of it holds something else.
    """
    if dataset in BUILTIN:
        make, version = BUILTIN[dataset]
        folder = DATA_FOLDER / dataset / version
        if fetch and not folder.exists():
            _write_token_files(folder, make())
        return folder
    if dataset.startswith("builtin/"):
        raise ValueError(f"dataset: no built-in data named {dataset!r}; use one of {', '.join(BUILTIN)}")
    folder = Path(dataset)
    if not folder.is_dir():
        if not HUB_ID.fullmatch(dataset):
            raise ValueError(f"dataset: no folder {dataset!r}, and it is not a Hub id (owner/name) or built-in name")
        folder = DATA_FOLDER / dataset
        if fetch and _missing(folder):
            _download(dataset, folder)
    for path in (folder / name for name in TOKEN_FILES):
        if path.is_file() and (found := impostor(path)):
            raise ValueError(f"{path}: expected a safetensors file, got {found}; put the file itself there")
    return folder


def dataset_revision(folder: Path) -> str | None:
    """Return the commit of the Hub dataset that a folder was downloaded from, by this program or the Hub's own."""
    if (folder / NOTE).is_file():
        return load_config(folder / NOTE, HubNote).revision
    note = folder / ".cache" / "huggingface" / "download" / f"{TRAIN}.metadata"
    return note.read_text().split("\n")[0] if note.is_file() else None


def impostor(path: Path) -> str | None:
    """Name what is often found in a file's place after a download that went wrong; None when it is not there."""
    try:
        with path.open("rb") as file:
            start = file.read(512).lstrip().lower()
    except OSError:  # for those who open the file to say
        return None
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (`git lfs pull` fetches the file)"
    return "an HTML page" if start.startswith((b"<!doctype html", b"<html")) else None


def _write_token_files(folder: Path, tokens: dict[str, np.ndarray]) -> None:
    try:
        with appearing(folder) as staging:
            for split, ids in tokens.items():
                save_file({"tokens": ids}, staging / f"{split}.safetensors")
    except OSError:
        if not folder.exists():  # else another process has made the same one
            raise


def _missing(folder: Path) -> list[str]:
    """Name what is still to be fetched, `train.safetensors` last: its presence says that the rest is there."""
    expected = load_config(folder / NOTE, HubNote).files if (folder / NOTE).exists() else (TRAIN,)
    return [name for name in reversed(TOKEN_FILES) if name in expected and not (folder / name).exists()]


def _download(dataset: str, folder: Path) -> None:
    """Fetch what a folder lacks of a Hub dataset, all of it at the revision at which the download began."""
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import WeakFileLock

    try:
        if is_offline_mode():
            missing = " and ".join(_missing(folder))
            raise ValueError(f"{folder} lacks {missing}, and HF_HUB_OFFLINE is set; unset it or put the files there")
        newest = None if (folder / NOTE).exists() else _look_up(dataset)
        folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder / ".lock"):
            if newest and not (folder / NOTE).exists():  # else another process has begun
                _begin(folder, newest)
            for name in _missing(folder):
                _fetch(dataset, load_config(folder / NOTE, HubNote), folder / name)
    except (OSError, HTTPError, ValueError) as error:
        raise ValueError(
            f"dataset: no folder {dataset!r} here, and the Hub dataset of that name could not be fetched: "
            f"{reason(error)}"
        ) from None


def _look_up(dataset: str) -> HubNote:
    """Ask the Hub for the newest revision of a dataset, and what it says of the token files there."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    revision, files = None, {}
    for name in TOKEN_FILES:
        url = hf_hub_url(dataset, name, repo_type="dataset", revision=revision)
        try:
            metadata = get_hf_file_metadata(url, retry_on_errors=True)
        except EntryNotFoundError:
            if name == TRAIN:
                raise ValueError(f"404, it has no {TRAIN}; choose another dataset or add that file to it") from None
            continue
        revision = revision or metadata.commit_hash
        if revision is None or metadata.etag is None or metadata.size is None:
            raise ValueError("the answer names no commit, ETag or size, so it is not the Hub's; check HF_ENDPOINT")
        files[name] = HubFile(size=metadata.size, etag=metadata.etag)
    return HubNote(revision=str(revision), files=files)


def _begin(folder: Path, note: HubNote) -> None:
    """Write down which revision a folder is to hold, before anything of it is fetched."""
    for path in (folder / name for name in note.files):
        if path.exists():
            raise ValueError(f"{path} is there already, of an unknown revision; move it away")
    temporary = folder / f"{NOTE}.tmp"
    temporary.write_text(note.model_dump_json(indent=2))
    temporary.replace(folder / NOTE)


def _fetch(dataset: str, note: HubNote, path: Path) -> None:
    """Fetch a file, from where an earlier try has stopped; it gets its name when it is known to be the Hub's.

    The client's own `hf_hub_download` throws away what it has when it is interrupted.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HTTPError, RevisionNotFoundError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    expected, partial = note.files[path.name], path.with_name(f"{path.name}.incomplete")
    url = hf_hub_url(dataset, path.name, repo_type="dataset", revision=note.revision)
    headers = build_hf_headers(headers={"Accept-Encoding": "identity"})
    if partial.exists() and partial.stat().st_size > expected.size:
        partial.unlink()  # nothing can follow it
    try:
        with partial.open("ab") as file:
            http_get(
                url,
                file,
                resume_size=file.tell(),
                headers=headers,
                expected_size=expected.size,
                displayed_filename=path.name,
            )
    except RevisionNotFoundError:
        raise ValueError(
            f"404, it no longer has revision {note.revision}, at which this download began; "
            f"remove {path.parent} to fetch the newest"
        ) from None
    except OSError as error:
        if isinstance(error, HTTPError) or error.errno is not None:
            raise  # else the answer was whole, but of another size
    _verify(partial, expected)
    partial.replace(path)


def _verify(path: Path, expected: HubFile) -> None:
    """Raise ValueError unless a file is what the Hub says it is; remove it then, for the next try to begin afresh."""
    size = path.stat().st_size
    if found := impostor(path):
        complaint = f"a safetensors file, got {found}"
    elif size != expected.size:
        complaint = f"{expected.size:,} bytes, got {size:,}"
    elif (checksum := _checksum(path, expected.etag)) != expected.etag:
        complaint = f"checksum {expected.etag}, got {checksum}"
    else:
        return
    path.unlink()
    raise ValueError(f"{path.name}: expected {complaint}; it is removed, try again")


def _checksum(path: Path, etag: str) -> str:
    """Compute the checksum of a file that an ETag of the Hub is, in hexadecimal."""
    if re.fullmatch("[0-9a-f]{64}", etag):
        start = hashlib.sha256
    elif re.fullmatch("[0-9a-f]{40}", etag):
        start = functools.partial(hashlib.sha1, b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    else:
        warnings.warn(
            f"{path.name}: the Hub gave no checksum (ETag {etag}), so only its size is verified", stacklevel=2
        )
        return etag
    with path.open("rb") as file:
        return hashlib.file_digest(file, start).hexdigest()


def reason(error: Exception, kind: str = "dataset") -> str:
    """Say in one line why the Hub's client failed, and what helps."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.utils import build_hf_headers

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        if "authorization" in build_hf_headers():
            return f"{status}, the token (HF_TOKEN) may not read it; ask for access on its page or use another token"
        return f"{status}, it is private or gated, or does not exist; set HF_TOKEN to a token that may read it"
    if isinstance(error, RepositoryNotFoundError):
        return f"{status}, the Hub shows no {kind} of that name; check the name, or HF_TOKEN if it is private"
    told = " ".join(str(error).split()) or type(error).__name__
    return told if isinstance(error, ValueError) else f"{told[:300]}; try again, and it goes on where it stopped"
