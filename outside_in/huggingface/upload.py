"""Uploads a folder to the Hugging Face Hub as a model, in one commit."""

import sys
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import logging, validate_repo_id

LOGIN = "uv run hf auth login"


def check_name(name: str) -> None:
    """Raise ValueError unless this is the name of a model as the Hub has them, `owner/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name}: the Hub takes no such name: {error}") from None
    if "/" not in name:
        raise ValueError(f"{name}: expected owner/name, the owner being you or an organization of yours")


def find_token() -> str:
    """Return the user's token for the Hub. Raises ValueError without one."""
    if is_offline_mode():
        raise ValueError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    if token := get_token():
        return token
    raise ValueError(f"no token for the Hub; log in with: {LOGIN}    # or set HF_TOKEN to one that may write")


def upload(folder: Path, name: str, token: str, message: str, *, public: bool) -> str:
    """Upload the files of a folder as a commit, and return its address.

    The model is created where it is missing: private, unless `public`. Raises ValueError when that fails, and for a
    public model unless `public`.
    """
    logging.set_verbosity_error()  # the client tells of each of its retries
    api = HfApi(token=token)
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        is_private = bool(api.model_info(name).private)
        if is_private and public:
            print(f"notice: {name} exists and stays private; its settings on the Hub change that", file=sys.stderr)
        if public or is_private:
            return api.upload_folder(repo_id=name, folder_path=folder, commit_message=message).commit_url
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: could not be pushed to the Hub: {_reason(error, name)}") from None
    raise ValueError(f"{name}: exists and is public; say --public to push into it, or choose another name")


def _reason(error: BaseException, name: str) -> str:
    """Return one line: why the Hub's client failed, and what helps."""
    if isinstance(error, RuntimeError) and error.__cause__:  # it says only which file
        return _reason(error.__cause__, name)
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return f"401, it does not know the token; log in again with: {LOGIN} --force    # or set another HF_TOKEN"
    if status == 403:
        return f"403, the token may not write to {name.partition('/')[0]}; use one that may, or another owner"
    message = " ".join(str(error).split()) or type(error).__name__
    return f"{message[:300]}; try again"
