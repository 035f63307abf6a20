"""Where token files come from; the Hub is a server on this machine, spoken to by the real client."""

import contextlib
import hashlib
import http.server
import socket
import threading

import numpy as np
import pytest
from conftest import random_tokens
from huggingface_hub import close_session, constants
from safetensors.numpy import load_file, save

import dataset_sources
from dataset_sources import dataset_folder, dataset_revision

COMMIT = "c0ffee" * 6 + "cafe"
SEEDS = {"train": 0, "validation": 1}
DATASETS = {"both": ["train", "validation"], "no-validation": ["train"], "no-train": ["validation"]}
FILES = {
    f"/datasets/owner/{dataset}/resolve/main/{split}.safetensors": save({"tokens": random_tokens(1000, SEEDS[split])})
    for dataset, splits in DATASETS.items()
    for split in splits
}


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    monkeypatch.setattr(dataset_sources, "DATA_FOLDER", folder)
    return folder


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download needs."""

    def do_HEAD(self):
        self.server.requests.append((self.command, self.path))
        content = FILES.get(self.path)
        known = any(path.startswith(self.path.rpartition("/")[0] + "/") for path in FILES)
        self.send_response(404 if content is None else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        else:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(FILES.get(self.path, b""))

    def log_message(self, *args):
        pass


class Broken(Hub):
    """A server that hangs up on every request."""

    def do_HEAD(self):
        self.close_connection = True


@pytest.fixture
def point_client_at(tmp_path, monkeypatch):
    """Make the client take a local port for the Hub, and keep proxies and credentials out of it."""

    def point(port):
        url = f"http://127.0.0.1:{port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its retries
        close_session()

    yield point
    close_session()


@pytest.fixture
def serve(point_client_at):
    """Be the Hub: `serve(Hub)` returns the list of requests that come in."""
    with contextlib.ExitStack() as stack:

        def start(handler):
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            server.requests = []
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
            stack.callback(server.shutdown)
            point_client_at(server.server_port)
            return server.requests

        yield start


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
    requests = serve(Hub)
    (tmp_path / "owner" / "both").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert dataset_folder("owner/both").samefile(tmp_path / "owner" / "both")
    assert requests == []


@pytest.mark.parametrize("fetch", [False, True])
def test_an_unknown_built_in_name_lists_the_known_ones(fetch):
    line = refusal("builtin/klingon", fetch=fetch)
    assert "no built-in data named 'builtin/klingon'" in line
    assert "builtin/every-token, builtin/python-docs" in line


@pytest.mark.parametrize(
    "name", ["nonsense", "a/b/c", "../up", "/nowhere", "two words/x", "owner/", "/name", "a/..", "x\ny/z"]
)
def test_what_can_be_no_name_is_refused(name):
    assert "it is not a Hub id (owner/name) or built-in name" in refusal(name)


# Built-in data


@pytest.fixture
def maker(monkeypatch):
    """A small built-in dataset, and the list of its makings."""
    calls = []

    def make():
        calls.append(1)
        return {"train": random_tokens(50), "validation": random_tokens(20, seed=1)}

    monkeypatch.setitem(dataset_sources.BUILTIN, "builtin/small", (make, "v1"))
    return calls


def test_built_in_data_are_written_once(maker, data_folder):
    folder = dataset_folder("builtin/small")
    assert folder == dataset_folder("builtin/small") == data_folder / "builtin" / "small" / "v1"
    assert len(maker) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["train.safetensors", "validation.safetensors"]
    assert (load_file(folder / "train.safetensors")["tokens"] == random_tokens(50)).all()


def test_built_in_data_of_another_version_are_made_anew(maker, monkeypatch):
    first = dataset_folder("builtin/small")
    make, _ = dataset_sources.BUILTIN["builtin/small"]
    monkeypatch.setitem(dataset_sources.BUILTIN, "builtin/small", (make, "v2"))
    assert dataset_folder("builtin/small") != first
    assert len(maker) == 2


def test_without_fetching_nothing_is_made(maker, data_folder):
    assert dataset_folder("builtin/small", fetch=False) == data_folder / "builtin" / "small" / "v1"
    assert maker == []
    assert not data_folder.exists()


def test_a_failure_between_two_files_leaves_no_data_that_look_whole(maker, data_folder, monkeypatch):
    save_file = dataset_sources.save_file

    def fail_on_the_second(tensors, path):
        if path.name == "validation.safetensors":
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(dataset_sources, "save_file", fail_on_the_second)
    with pytest.raises(OSError, match="No space left"):
        dataset_folder("builtin/small")
    assert list((data_folder / "builtin" / "small").iterdir()) == []
    monkeypatch.setattr(dataset_sources, "save_file", save_file)
    assert len(list(dataset_folder("builtin/small").iterdir())) == 2


def test_two_processes_that_make_the_same_data_do_not_disturb_each_other(monkeypatch, data_folder):
    def make():  # the other process is faster
        monkeypatch.setitem(dataset_sources.BUILTIN, "builtin/small", (lambda: {"train": random_tokens(9)}, "v1"))
        dataset_folder("builtin/small")
        return {"train": random_tokens(9)}

    monkeypatch.setitem(dataset_sources.BUILTIN, "builtin/small", (make, "v1"))
    folder = dataset_folder("builtin/small")
    assert (load_file(folder / "train.safetensors")["tokens"] == random_tokens(9)).all()
    assert list(folder.parent.iterdir()) == [folder]


# The Hub


@pytest.mark.parametrize("dataset", ["both", "no-validation"])
def test_a_hub_dataset_is_downloaded_with_or_without_validation(serve, data_folder, dataset):
    serve(Hub)
    folder = dataset_folder(f"owner/{dataset}")
    assert folder == data_folder / "owner" / dataset
    assert sorted(path.stem for path in folder.glob("*.safetensors")) == DATASETS[dataset]
    for split in DATASETS[dataset]:
        tokens = load_file(folder / f"{split}.safetensors")["tokens"]
        assert tokens.dtype == np.uint16
        assert (tokens == random_tokens(1000, SEEDS[split])).all()


def test_the_revision_of_a_download_is_known_and_other_folders_have_none(serve, tmp_path):
    serve(Hub)
    assert dataset_revision(dataset_folder("owner/both")) == COMMIT
    assert dataset_revision(tmp_path) is None


def test_a_hub_dataset_is_downloaded_once(serve):
    requests = serve(Hub)
    folder = dataset_folder("owner/both")
    assert sum(method == "GET" for method, _ in requests) == 2
    requests.clear()
    assert dataset_folder("owner/both") == folder
    assert requests == []


def test_without_fetching_nothing_is_downloaded(serve, data_folder):
    requests = serve(Hub)
    assert dataset_folder("owner/both", fetch=False) == data_folder / "owner" / "both"
    assert requests == []


@pytest.mark.parametrize(
    ("handler", "dataset", "reason"),
    [(Hub, "none", "404"), (Hub, "no-train", "404"), (Broken, "both", "disconnected")],
)
def test_a_download_that_fails_is_refused_in_one_line(serve, handler, dataset, reason):
    serve(handler)
    line = refusal(f"owner/{dataset}")
    assert line.startswith(f"dataset: no folder 'owner/{dataset}' here, and the Hub dataset of that name could not be")
    assert reason in line


def test_an_unreachable_hub_is_refused_in_one_line(point_client_at):
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        point_client_at(nobody_listens.getsockname()[1])
        assert "could not be fetched: " in refusal("owner/both")


def test_a_download_that_was_interrupted_is_taken_up_again(serve, monkeypatch):
    requests = serve(Hub)
    train = next(path for path in FILES if "both" in path and "train" in path)
    with monkeypatch.context() as patch:
        patch.delitem(FILES, train)
        refusal("owner/both")
    folder = dataset_folder("owner/both")
    assert (load_file(folder / "train.safetensors")["tokens"] == random_tokens(1000)).all()
    assert sum(method == "GET" for method, _ in requests) == 2
