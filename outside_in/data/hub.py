"""Downloads from the Hugging Face Hub, at one revision, verified."""

import functools
import hashlib
import re
import shutil
import warnings
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from outside_in.config_files import Config, load_config
from outside_in.data.token_files import TRAIN, VALIDATION
from outside_in.runtime.log import log
from outside_in.storage import atomic
from outside_in.storage.text import sized

HUB = "hub:"  # before the id of what is meant to come from the Hub
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILE, PARTIAL = "hub.json", ".incomplete"
TOKEN_FILES = (TRAIN, VALIDATION)


class HubFile(Config):
    """The Hub's facts about a file.

    The ETag is the SHA-256 of a large file (Git LFS), and git's SHA-1 of a small one.
    """

    size: int  # bytes
    etag: str


class HubSnapshot(Config):
    """`hub.json`: the commit and files of a Hub dataset."""

    revision: str
    files: dict[str, HubFile]


def detect_wrong_content(path: Path) -> str | None:
    """Name the wrong content that failed downloads often leave in a file. Returns None when there is none."""
    try:
        with path.open("rb") as file:
            start = file.read(512).lstrip().lower()
    except OSError:  # for those who open the file to say
        return None
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (`git lfs pull` fetches the file)"
    return "an HTML page" if start.startswith((b"<!doctype html", b"<html")) else None


def missing(folder: Path) -> list[str]:
    """List the files still to be downloaded, `train.safetensors` last. So if that file is there, so are the others."""
    expected = load_config(folder / HUB_FILE, HubSnapshot).files if (folder / HUB_FILE).exists() else (TRAIN,)
    return [name for name in reversed(TOKEN_FILES) if name in expected and not (folder / name).exists()]


def download_dataset(dataset: str, folder: Path) -> None:
    """Download the missing files of a Hub dataset, all at one revision.

    That is the newest when the download began. Raises ValueError when that fails.
    """
    hub_id = dataset.removeprefix(HUB)
    try:
        newest = _expected(hub_id, folder, retry=True)
        folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder / ".lock"):
            if not (folder / HUB_FILE).exists():  # else another process has begun
                _begin(folder, newest)
            snapshot = load_config(folder / HUB_FILE, HubSnapshot)
            if lacking := missing(folder):
                size, free = _size_and_free(snapshot, folder)
                log.info(f"fetching {' and '.join(lacking)} of {hub_id} from the Hub: {sized(size)}, into {folder}")
                check_space(size, free)
            for name in lacking:
                _fetch(hub_id, snapshot, folder / name)
    except (OSError, HTTPError, ValueError) as error:
        raise _refusal(dataset, error) from None


def describe_download(dataset: str, folder: Path) -> str:
    """Return what `download_dataset` will fetch; raises ValueError where it would. Nothing is fetched yet."""
    try:
        size, free = _size_and_free(_expected(dataset.removeprefix(HUB), folder), folder)
        check_space(size, free)
    except (OSError, HTTPError, ValueError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, ValueError) or status in (401, 403, 404):
            raise _refusal(dataset, error) from None
        return f"will be fetched (of unknown size: the Hub cannot be reached now; {sized(_free(folder))} free)"
    need, left = sized(size), sized(free)
    return f"will be fetched ({need}, {left.removesuffix(' GB') if need.endswith(' GB') else left} free)"


def check_space(size: int, free: int) -> None:
    """Raise ValueError when a download would fill the disk."""
    if size > free:
        raise ValueError(f"{sized(size)} to fetch, but the disk has {sized(free)} free; free some")


def _refusal(dataset: str, error: Exception) -> ValueError:
    local = "" if dataset.startswith(HUB) else f"no folder {dataset!r}, and "
    what = "it" if local else repr(dataset)
    return ValueError(f"dataset: {local}{what} could not be fetched from the Hub: {error_message(error)}")


def _size_and_free(snapshot: HubSnapshot, folder: Path) -> tuple[int, int]:
    """Return how many bytes are still to be fetched, and how many the disk has."""
    lacking = [name for name in snapshot.files if not (folder / name).exists()]
    partial = [path for name in lacking if (path := folder / f"{name}{PARTIAL}").exists()]
    size = sum(snapshot.files[name].size for name in lacking) - sum(path.stat().st_size for path in partial)
    return max(0, size), _free(folder)


def _free(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def _expected(hub_id: str, folder: Path, *, retry: bool = False) -> HubSnapshot:
    """Return the files of a dataset at the revision at which its download began, or else at the newest."""
    if is_offline_mode():
        lacking = " and ".join(missing(folder))
        raise ValueError(f"{folder} lacks {lacking}, and HF_HUB_OFFLINE is set; unset it or put the files there")
    if (folder / HUB_FILE).exists():
        return load_config(folder / HUB_FILE, HubSnapshot)
    return _look_up(hub_id, retry=retry)


def _look_up(hub_id: str, *, retry: bool) -> HubSnapshot:
    """Ask the Hub for a dataset's newest revision and its token files."""
    revision, files = None, {}
    for name in TOKEN_FILES:
        url = hf_hub_url(hub_id, name, repo_type="dataset", revision=revision)
        try:
            metadata = get_hf_file_metadata(url, retry_on_errors=retry)
        except EntryNotFoundError:
            if name == TRAIN:
                raise ValueError(f"404, it has no {TRAIN}; choose another dataset or add that file to it") from None
            continue
        revision = revision or metadata.commit_hash
        if revision is None or metadata.etag is None or metadata.size is None:
            raise ValueError("the answer lacks a commit, ETag or size, so it is not from the Hub; check HF_ENDPOINT")
        files[name] = HubFile(size=metadata.size, etag=metadata.etag)
    return HubSnapshot(revision=str(revision), files=files)


def _begin(folder: Path, snapshot: HubSnapshot) -> None:
    """Record the revision of a download before it begins."""
    for path in (folder / name for name in snapshot.files):
        if path.exists():
            raise ValueError(f"{path} already exists, at an unknown revision; move it away")
    atomic.write_text(folder / HUB_FILE, snapshot.model_dump_json(indent=2))


def _fetch(hub_id: str, snapshot: HubSnapshot, path: Path) -> None:
    """Download a file, or the rest of it; rename it when verified.

    The client's `hf_hub_download` throws away the partial file when it is interrupted.
    """
    expected, partial = snapshot.files[path.name], path.with_name(f"{path.name}{PARTIAL}")
    url = hf_hub_url(hub_id, path.name, repo_type="dataset", revision=snapshot.revision)
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
            f"404, revision {snapshot.revision}, at which this download began, is gone; "
            f"remove {path.parent} to fetch the newest"
        ) from None
    except OSError as error:
        if isinstance(error, HTTPError) or error.errno is not None:
            raise  # else the answer was whole, but of another size
    _verify(partial, expected)
    partial.replace(path)


def _verify(path: Path, expected: HubFile) -> None:
    """Raise ValueError unless a file is the Hub's. The file is then removed, so that the next attempt starts afresh."""
    size = path.stat().st_size
    if found := detect_wrong_content(path):
        mismatch = f"a safetensors file, got {found}"
    elif size != expected.size:
        mismatch = f"{expected.size:,} bytes, got {size:,}"
    elif (checksum := _checksum(path, expected.etag)) != expected.etag:
        mismatch = f"checksum {expected.etag}, got {checksum}"
    else:
        return
    path.unlink()
    raise ValueError(f"{path.name}: expected {mismatch}; the file is removed, try again")


def _checksum(path: Path, etag: str) -> str:
    """Return a file's checksum, in hexadecimal, of the ETag's kind."""
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


def error_message(error: Exception, kind: str = "dataset") -> str:
    """Return one line: why the Hub's client failed, and what helps."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        if "authorization" in build_hf_headers():
            return f"{status}, the token (HF_TOKEN) has no access; request it on its page or use another token"
        return f"{status}, it is private or gated, or does not exist; set HF_TOKEN to a token with access"
    if isinstance(error, RepositoryNotFoundError):
        return f"{status}, the Hub has no {kind} of that name; check the name, or HF_TOKEN if it is private"
    if isinstance(error, LocalEntryNotFoundError):
        return "the Hub cannot be reached (no network, or HF_HUB_OFFLINE is set)"
    message = " ".join(str(error).split()) or type(error).__name__
    return message if isinstance(error, ValueError) else f"{message[:300]}; try again, and the download resumes"
