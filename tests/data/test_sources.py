"""Where token files come from; the Hub is a server on this machine, spoken to by the real client."""

import errno
import os
import shutil
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from helpers import ROOT, random_tokens
from hub import (
    COMMIT,
    FILES,
    HTML,
    LATER_COMMIT,
    LATER_FILES,
    SIZE,
    TOKENS,
    TRAIN,
    VALIDATION,
    Broken,
    Hub,
    MovingHub,
    NoHub,
    SlowHub,
    SmallFilesHub,
)
from huggingface_hub import constants, hf_hub_download
from safetensors.numpy import load_file

from outside_in.data import hub as hub_client
from outside_in.data import sources
from outside_in.data.builtin import find_builtin
from outside_in.data.hub import detect_wrong_content
from outside_in.data.sources import dataset_folder, dataset_revision
from outside_in.data.tokenizer import gpt2

TOO_OFTEN = [500] * 6  # the client tries five times more when nothing arrives
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 2096\n"


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    monkeypatch.setattr(sources, "DATA_FOLDER", folder)
    return folder


def is_from(folder, files):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == files


def refusal(dataset, **keywords):
    with pytest.raises(ValueError) as caught:
        dataset_folder(dataset, **keywords)
    line = str(caught.value)
    assert line.startswith("dataset: ")
    assert "\n" not in line
    return line


# Local folders and names


def test_a_local_folder_is_taken_as_it_is(tmp_path):
    assert dataset_folder(str(tmp_path)) == tmp_path


def test_a_local_folder_wins_over_a_hub_dataset_of_its_name(serve, tmp_path, monkeypatch):
    hub = serve(Hub)
    (tmp_path / "owner" / "both").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert dataset_folder("owner/both").samefile(tmp_path / "owner" / "both")
    assert hub.requests == []


@pytest.mark.parametrize("name", [TRAIN, VALIDATION])
@pytest.mark.parametrize(("content", "what"), [(HTML, "an HTML page"), (LFS_POINTER, "a Git LFS pointer")])
@pytest.mark.parametrize("fetch", [False, True])
def test_what_lies_in_a_token_files_place_is_named(tmp_path, name, content, what, fetch):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: expected a safetensors file, got {what}"):
        dataset_folder(str(tmp_path), fetch=fetch)


def test_a_safetensors_file_is_no_impostor_whatever_byte_it_begins_with(tmp_path):
    path = tmp_path / TRAIN
    for content in (FILES[TRAIN], ord("<").to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        assert detect_wrong_content(path) is None


@pytest.mark.parametrize("fetch", [False, True])
def test_an_unknown_built_in_name_lists_the_known_ones(fetch):
    line = refusal("builtin/klingon", fetch=fetch)
    assert "no built-in data named 'builtin/klingon'" in line
    assert "builtin/every-token, builtin/python-docs" in line


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    told = "dataset: no folder 'data/mien'; data has mine; if it is a Hub dataset, write hub:data/mien"
    assert refusal("data/mien") == told


@pytest.mark.parametrize(
    "name", ["nonsense", "a/b/c", "../up", "/nowhere", "two words/x", "owner/", "/name", "a/..", "x\ny/z"]
)
def test_what_can_be_no_name_is_refused(name):
    assert "it is not a Hub id (owner/name) or built-in name" in refusal(name)


# Built-in data


def set_builtin(monkeypatch, make, version="v1"):
    """Let `builtin/small` be what `make` returns, as GPT-2's tokens."""
    small = SimpleNamespace(version=version, make=lambda: (make(), gpt2()))
    monkeypatch.setattr(sources, "find_builtin", lambda name: small if name == "builtin/small" else find_builtin(name))


@pytest.fixture
def maker(monkeypatch):
    """A small built-in dataset; with each call of it, it has been made once more."""
    make = Mock(side_effect=lambda: {"train": random_tokens(50), "validation": random_tokens(20, seed=1)})
    set_builtin(monkeypatch, make)
    return make


def test_built_in_data_are_written_once(maker, data_folder):
    folder = dataset_folder("builtin/small")
    assert folder == dataset_folder("builtin/small") == data_folder / "builtin" / "small" / "v1"
    assert maker.call_count == 1
    assert sorted(path.name for path in folder.iterdir()) == ["train.safetensors", "validation.safetensors"]
    assert (load_file(folder / "train.safetensors")["tokens"] == random_tokens(50)).all()


def test_built_in_data_of_another_version_are_made_anew(maker, monkeypatch):
    first = dataset_folder("builtin/small")
    set_builtin(monkeypatch, maker, "v2")
    assert dataset_folder("builtin/small") != first
    assert maker.call_count == 2


def test_without_fetching_nothing_is_made(maker, data_folder):
    assert dataset_folder("builtin/small", fetch=False) == data_folder / "builtin" / "small" / "v1"
    assert not maker.called
    assert not data_folder.exists()


def test_a_failure_between_two_files_leaves_no_data_that_look_whole(maker, data_folder, monkeypatch):
    save_file = sources.save_file

    def fail_on_the_second(tensors, path):
        if path.name == "validation.safetensors":
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(sources, "save_file", fail_on_the_second)
    with pytest.raises(OSError, match="No space left"):
        dataset_folder("builtin/small")
    assert list((data_folder / "builtin" / "small").iterdir()) == []
    monkeypatch.setattr(sources, "save_file", save_file)
    assert len(list(dataset_folder("builtin/small").iterdir())) == 2


def test_two_processes_that_make_the_same_data_do_not_disturb_each_other(monkeypatch, data_folder):
    def make():  # the other process is faster
        set_builtin(monkeypatch, lambda: {"train": random_tokens(9)})
        dataset_folder("builtin/small")
        return {"train": random_tokens(9)}

    set_builtin(monkeypatch, make)
    folder = dataset_folder("builtin/small")
    assert (load_file(folder / "train.safetensors")["tokens"] == random_tokens(9)).all()
    assert list(folder.parent.iterdir()) == [folder]


# The Hub


@pytest.mark.parametrize("handler", [Hub, SmallFilesHub])
@pytest.mark.parametrize(("dataset", "names"), [("both", [TRAIN, VALIDATION]), ("no-validation", [TRAIN])])
def test_a_hub_dataset_is_downloaded_with_or_without_validation(serve, data_folder, handler, dataset, names):
    serve(handler)
    folder = dataset_folder(f"owner/{dataset}")
    assert folder == data_folder / "owner" / dataset
    assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == ["hub.json", *names]
    for name in names:
        tokens = load_file(folder / name)["tokens"]
        assert tokens.dtype == np.uint16
        assert (tokens == TOKENS[name]).all()


def test_nothing_but_the_token_files_is_asked_for(serve):
    hub = serve(Hub)
    dataset_folder("owner/both")
    assert {request.path.rpartition("/")[2] for request in hub.requests} == {TRAIN, VALIDATION}


def test_the_revision_of_a_download_is_known_and_other_folders_have_none(serve, tmp_path):
    serve(Hub)
    assert dataset_revision(dataset_folder("owner/both")) == COMMIT
    assert dataset_revision(tmp_path) is None


def test_the_revision_of_a_download_by_the_hubs_own_client_is_known(serve, tmp_path):
    serve(Hub)
    hf_hub_download("owner/both", TRAIN, repo_type="dataset", local_dir=tmp_path)
    assert dataset_revision(tmp_path) == COMMIT


def test_a_hub_dataset_is_downloaded_once(serve):
    hub = serve(Hub)
    folder = dataset_folder("owner/both")
    assert len(hub.downloads) == 2
    hub.requests.clear()
    assert dataset_folder("owner/both") == folder
    assert hub.requests == []


def test_a_file_that_was_lost_is_downloaded_again(serve):
    hub = serve(Hub)
    folder = dataset_folder("owner/both")
    (folder / VALIDATION).unlink()
    hub.downloads.clear()
    dataset_folder("owner/both")
    assert [request.path for request in hub.downloads] == [f"/cdn/{COMMIT}/{VALIDATION}"]
    assert is_from(folder, FILES)


def test_without_fetching_nothing_is_downloaded(serve, data_folder):
    hub = serve(Hub)
    assert dataset_folder("owner/both", fetch=False) == data_folder / "owner" / "both"
    assert hub.requests == []


def test_two_that_fetch_the_same_dataset_at_once_download_it_once(serve):
    hub = serve(SlowHub)
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(dataset_folder("owner/both"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(hub.downloads) == 2
    assert len(folders) == 2
    assert is_from(folders[0], FILES)


# Refusals of the Hub


@pytest.mark.parametrize(
    ("handler", "dataset", "reason"),
    [
        (Hub, "none", "404, the Hub has no dataset of that name; check the name"),
        (Hub, "no-train", "404, it has no train.safetensors; "),
        (NoHub, "both", "the answer lacks a commit, ETag or size, so it is not from the Hub; check HF_ENDPOINT"),
        (Broken, "both", "disconnected"),
    ],
)
def test_a_download_that_fails_is_refused_in_one_line(serve, data_folder, handler, dataset, reason):
    serve(handler)
    line = refusal(f"owner/{dataset}")
    assert line.startswith(f"dataset: no folder 'owner/{dataset}', and it could not be fetched from the Hub: ")
    assert reason in line
    assert not data_folder.exists()


@pytest.mark.parametrize("status_and_code", [(401, "RepoNotFound"), (401, ""), (401, "GatedRepo"), (403, "GatedRepo")])
def test_a_dataset_that_takes_a_token_says_so(serve, monkeypatch, status_and_code):
    hub = serve(Hub)
    hub.refuses = status_and_code
    assert f"{status_and_code[0]}, it is private or gated, or does not exist; set HF_TOKEN" in refusal("owner/both")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", "hf_one")
    assert f"{status_and_code[0]}, the token (HF_TOKEN) has no access" in refusal("owner/both")


def test_an_unreachable_hub_is_refused_in_one_line(point_client_at):
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        point_client_at(nobody_listens.getsockname()[1])
        assert "could not be fetched from the Hub: " in refusal("owner/both")


def test_offline_what_is_here_is_taken_and_what_is_not_is_named(serve, monkeypatch):
    hub = serve(Hub)
    folder = dataset_folder("owner/both")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert dataset_folder("owner/both") == folder
    (folder / VALIDATION).unlink()
    assert f"{folder} lacks {VALIDATION}, and HF_HUB_OFFLINE is set" in refusal("owner/both")
    shutil.rmtree(folder)
    assert f"{folder} lacks {TRAIN}, and HF_HUB_OFFLINE is set" in refusal("owner/both")
    assert hub.requests == []


@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_environment_names_the_hub_and_the_token_and_forbids_requests(serve, data_folder, tmp_path, offline):
    hub = serve(Hub)
    code = (
        "import pathlib, sys\n"
        "from outside_in.data import sources\n"
        "sources.DATA_FOLDER = pathlib.Path(sys.argv[1])\n"
        "sources.dataset_folder('owner/both')"
    )
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    variables |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": "hf_mine", "HF_HOME": str(tmp_path)}
    variables |= {"HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", code, str(data_folder)]
    process = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if offline == "1":
        assert process.returncode == 1
        assert "HF_HUB_OFFLINE is set" in process.stderr.splitlines()[-1]
        assert hub.requests == []
    else:
        assert process.returncode == 0, process.stderr
        assert is_from(data_folder / "owner" / "both", FILES)
        tokens = {(request.token, request in hub.downloads) for request in hub.requests}
        assert tokens == {("Bearer hf_mine", False), (None, True)}  # which the delivery network must not see


# Downloads that break


def test_a_download_that_breaks_goes_on_where_it_broke(serve):
    hub = serve(Hub)
    hub.hangs_up_at = [500, 1500]
    folder = dataset_folder("owner/both")
    assert is_from(folder, FILES)
    assert [request.first_byte for request in hub.downloads if TRAIN in request.path] == [0, 500, 1500]
    assert hub.bytes_sent == 2 * SIZE


def test_a_download_that_was_given_up_goes_on_where_it_stopped(serve):
    hub = serve(Hub)
    hub.hangs_up_at = list(TOO_OFTEN)
    line = refusal("owner/both")
    assert "try again, and the download resumes" in line
    assert hub.hangs_up_at == []
    hub.downloads.clear()
    hub.bytes_sent = 0
    assert is_from(dataset_folder("owner/both"), FILES)
    assert [(request.path, request.first_byte) for request in hub.downloads] == [(f"/cdn/{COMMIT}/{TRAIN}", 500)]
    assert hub.bytes_sent == SIZE - 500


@pytest.mark.parametrize("reason", ["503", "401", "No space left on device"])
def test_a_refusal_in_between_leaves_what_is_there(serve, monkeypatch, reason):
    hub = serve(Hub)
    hub.hangs_up_at = list(TOO_OFTEN)
    refusal("owner/both")
    with monkeypatch.context() as patch:
        if reason.isdigit():
            hub.refuses = (int(reason), "")
        else:
            patch.setattr(hub_client, "http_get", Mock(side_effect=OSError(errno.ENOSPC, reason)))
        assert reason in refusal("owner/both")
    hub.refuses = None
    assert is_from(dataset_folder("owner/both"), FILES)
    assert hub.downloads[-1].first_byte == 500


def test_a_download_that_was_interrupted_while_it_was_verified_is_verified_again(serve, monkeypatch):
    hub = serve(Hub)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hub_client, "_checksum", Mock(side_effect=KeyboardInterrupt))
        dataset_folder("owner/both")
    folder = dataset_folder("owner/both", fetch=False)
    assert is_from(folder, {})
    dataset_folder("owner/both")
    assert is_from(folder, FILES)
    assert hub.bytes_sent == 2 * SIZE


def test_a_download_that_was_interrupted_is_no_dataset_yet(serve):
    hub = serve(Hub)
    hub.hangs_up_at = list(TOO_OFTEN)
    refusal("owner/both")
    folder = dataset_folder("owner/both", fetch=False)
    assert not (folder / TRAIN).exists()


def test_both_files_are_of_one_revision_when_the_hub_moves_on_between_them(serve):
    serve(MovingHub)
    folder = dataset_folder("owner/both")
    assert is_from(folder, FILES)
    assert dataset_revision(folder) == COMMIT


def test_a_download_is_finished_at_its_revision_after_the_hub_has_moved_on(serve):
    hub = serve(Hub)
    hub.hangs_up_at = list(TOO_OFTEN)
    refusal("owner/both")
    hub.newest = LATER_COMMIT
    folder = dataset_folder("owner/both")
    assert is_from(folder, FILES)
    assert dataset_revision(folder) == COMMIT


def test_a_download_whose_revision_is_gone_says_so_and_is_not_mixed(serve):
    hub = serve(Hub)
    hub.hangs_up_at = list(TOO_OFTEN)
    refusal("owner/both")
    hub.newest = LATER_COMMIT
    del hub.revisions[COMMIT]
    folder = dataset_folder("owner/both", fetch=False)
    line = refusal("owner/both")
    assert f"404, revision {COMMIT}, at which this download began, is gone; remove {folder} to" in line
    shutil.rmtree(folder)
    assert is_from(dataset_folder("owner/both"), LATER_FILES)
    assert dataset_revision(folder) == LATER_COMMIT


def test_a_file_of_unknown_revision_is_neither_mixed_in_nor_touched(serve, data_folder):
    hub = serve(Hub)
    path = data_folder / "owner" / "both" / VALIDATION
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    assert f"{path} already exists, at an unknown revision; move it away" in refusal("owner/both")
    assert path.read_bytes() == b"mine"
    assert hub.downloads == []


def test_the_beginning_of_a_longer_file_is_given_up(serve, data_folder):
    serve(Hub)
    partial = data_folder / "owner" / "both" / f"{TRAIN}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * (SIZE + 1))
    assert is_from(dataset_folder("owner/both"), FILES)


# Files that are not what the Hub says


@pytest.mark.parametrize("handler", [Hub, SmallFilesHub])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (FILES[TRAIN][:-1] + b"!", "expected checksum "),
        (FILES[TRAIN] + b"!", f"expected {SIZE:,} bytes, got {SIZE + 1:,}"),
        (b"Access denied", f"expected {SIZE:,} bytes, got 13"),
        (HTML, "expected a safetensors file, got an HTML page"),
        (LFS_POINTER, "expected a safetensors file, got a Git LFS pointer"),
    ],
)
def test_a_wrong_file_is_named_and_removed_and_fetched_afresh(serve, handler, content, complaint):
    hub = serve(handler)
    hub.sends_instead = {TRAIN: content}
    line = refusal("owner/both")
    assert complaint in line
    assert line.endswith("; the file is removed, try again")
    hub.sends_instead = {}
    folder = dataset_folder("owner/both")
    assert is_from(folder, FILES)
    assert hub.downloads[-1].first_byte == 0


def test_a_file_without_a_checksum_is_taken_with_a_warning(serve, monkeypatch):
    serve(SmallFilesHub)
    monkeypatch.setattr(SmallFilesHub, "etag", '"mirror-{}"'.format)
    with pytest.warns(UserWarning, match="gave no checksum .ETag mirror-.*so only its size is verified"):
        folder = dataset_folder("owner/both")
    assert is_from(folder, FILES)
