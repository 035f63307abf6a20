"""The Hub as a server on this machine, which the real client talks to."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
from helpers import random_tokens
from huggingface_hub import close_session, constants
from safetensors.numpy import save

COMMIT, LATER_COMMIT = "c0ffee" * 6 + "cafe", "decaf0" * 6 + "cafe"
TRAIN, VALIDATION = "train.safetensors", "validation.safetensors"
TOKENS = {TRAIN: random_tokens(1000), VALIDATION: random_tokens(1000, seed=1)}
FILES = {name: save({"tokens": tokens}) for name, tokens in TOKENS.items()}
LATER_FILES = {name: save({"tokens": random_tokens(1000, seed=2)}) for name in FILES}
SIZE = len(FILES[TRAIN])  # bytes, as the other's

HTML = b"\n<!DOCTYPE html>\n<html><body>Please log in to the wireless network</body></html>"


class Request(NamedTuple):
    method: str
    path: str
    first_byte: int  # of the range that is asked for
    token: str | None


class HubServer(http.server.ThreadingHTTPServer):
    """What is on the Hub, what goes wrong there, and what it was asked for."""

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.newest = COMMIT
        self.revisions = {COMMIT: FILES | {"README.md": b"# Tokens"}, LATER_COMMIT: LATER_FILES}
        self.datasets = {"both": FILES.keys(), "no-validation": {TRAIN}, "no-train": {VALIDATION}}
        self.refuses = None  # status and X-Error-Code
        self.sends_instead = {}  # by name of a file
        self.hangs_up_at = []  # bytes of train.safetensors, each once
        self.requests = []
        self.downloads = []  # the requests that were answered with content
        self.bytes_sent = 0


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download needs: files are on a content delivery network, which has another name."""

    def do_HEAD(self):
        first_byte = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        request = Request(self.command, self.path, first_byte, self.headers.get("Authorization"))
        self.server.requests.append(request)
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/cdn/"):
            self.send_file(name, self.server.revisions[self.path.split("/")[2]][name])
        elif self.server.refuses:
            self.answer(self.server.refuses[0], {"X-Error-Code": self.server.refuses[1]})
        else:
            _, _, _, dataset, _, revision, _ = self.path.split("/")
            self.resolve(dataset, self.server.newest if revision == "main" else revision, name)

    def do_GET(self):
        self.do_HEAD()

    def resolve(self, dataset, revision, name):
        if dataset not in self.server.datasets:
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
        elif revision not in self.server.revisions:
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        elif name not in self.server.datasets[dataset]:
            self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": revision})
        else:
            self.send_known_file(revision, name, self.server.revisions[revision][name])

    def send_known_file(self, revision, name, content):
        location = f"http://localhost:{self.server.server_port}/cdn/{revision}/{name}"
        linked = {"X-Linked-Size": len(content), "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        self.answer(302, {"Location": location, "X-Repo-Commit": revision, "ETag": '"of the redirect"', **linked})

    def send_file(self, name, content, **headers):
        request = self.server.requests[-1]
        if self.command == "GET":
            self.server.downloads.append(request)
            content = self.server.sends_instead.get(name, content)
        if request.first_byte:
            headers["Content-Range"] = f"bytes {request.first_byte}-{len(content) - 1}/{len(content)}"
        part = content[request.first_byte :]
        self.answer(206 if request.first_byte else 200, headers | {"Content-Length": len(part)})
        if name == TRAIN and self.command == "GET" and self.server.hangs_up_at:
            part = content[request.first_byte : self.server.hangs_up_at.pop(0)]
            self.close_connection = True
        if self.command == "GET":
            self.server.bytes_sent += len(part)
            self.wfile.write(part)

    def answer(self, status, headers):
        self.send_response(status)
        for header, value in ({"Content-Length": 0} | headers).items():
            self.send_header(header, str(value))
        self.end_headers()

    def log_message(self, *args):
        pass


class SmallFilesHub(Hub):
    """The Hub for files that are in the git repository itself: it sends them itself, and git's checksum."""

    etag = '"{}"'.format

    def send_known_file(self, revision, name, content):
        checksum = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.send_file(name, content, **{"X-Repo-Commit": revision, "ETag": self.etag(checksum)})


class NoHub(Hub):
    """A server, such as a hotel's, that answers every request with the same page."""

    def do_HEAD(self):
        self.answer(200, {"Content-Length": len(HTML)})

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(HTML)


class MovingHub(Hub):
    """A Hub where a new revision appears as soon as the first question is answered."""

    def resolve(self, *args):
        self.server.newest = LATER_COMMIT
        super().resolve(*args)


class SlowHub(Hub):
    """A Hub that sends no file before two clients have asked for what there is."""

    def send_file(self, *args):
        deadline = time.monotonic() + 10
        while sum(request.method == "HEAD" for request in self.server.requests) < 4 and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        threading.Event().wait(0.2)  # for the second to come as far as it can
        super().send_file(*args)


class Broken(Hub):
    """A server that hangs up on every request."""

    def do_HEAD(self):
        self.close_connection = True


class UploadHub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a push needs. Large files go by Git LFS, since a client without Xet sends them so."""

    def do_GET(self):
        self.answer_as_the_hub()

    def do_POST(self):
        self.answer_as_the_hub()

    def do_PUT(self):
        self.answer_as_the_hub()

    def answer_as_the_hub(self):
        store, path = self.server.store, self.path.split("?")[0]
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        store.requests.append(f"{self.command} {path}")
        name, _, action = path.removeprefix("/api/models").strip("/").partition(".git/")
        name, action = "/".join(name.split("/")[:2]), action or "/".join(name.split("/")[2:])
        if status := next((status for part, status in store.refuses.items() if part in path), None):
            self.send_json({"error": "refused"}, status)
        elif path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif path.startswith("/lfs/"):
            store.objects[hashlib.sha256(content).hexdigest()] = content
            self.send_json({})
        elif self.headers.get("Authorization") != f"Bearer {store.token}":
            self.send_json({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in store.models else 200
            store.models.setdefault(name, Model(asked["visibility"] == "private", {}, []))
            self.send_json({"url": f"{self.address}/{name}"}, status)
        elif name not in store.models:
            self.send_json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif action.startswith("preupload"):
            self.send_json({"files": [self.described(name, file) for file in json.loads(content)["files"]]})
        elif action == "info/lfs/objects/batch":
            self.send_json({"objects": [self.upload_of(wanted) for wanted in json.loads(content)["objects"]]})
        elif action.startswith("commit"):
            self.commit(name, [json.loads(line) for line in content.splitlines()])
        else:
            model = store.models[name]
            self.send_json({"id": name, "private": model.is_private, "sha": model.sha, "siblings": [], "tags": []})

    def described(self, name, file):
        known = self.server.store.models[name].files.get(file["path"])
        if is_large := file["path"].endswith(".safetensors"):
            oid = known and hashlib.sha256(known).hexdigest()
        else:
            oid = known and hashlib.sha1(b"blob %d\0" % len(known) + known).hexdigest()
        mode = "lfs" if is_large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def upload_of(self, wanted):
        upload = {"href": f"{self.address}/lfs/{wanted['oid']}"}
        return wanted if wanted["oid"] in self.server.store.objects else wanted | {"actions": {"upload": upload}}

    def commit(self, name, operations):
        model = self.server.store.models[name]
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "header":
                model.commits.append(value["summary"])
            elif operation["key"] == "file":
                model.files[value["path"]] = base64.b64decode(value["content"])
            else:  # of what went by Xet, only the SHA-256 is known
                model.files[value["path"]] = self.server.store.objects.get(value["oid"], value["oid"].encode())
        self.send_json({"commitUrl": f"{self.address}/{name}/commit/{model.sha}", "commitOid": model.sha})

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def send_json(self, content, status=200, headers=()):
        body = json.dumps(content).encode()
        self.send_response(status)
        for header, value in (
            {"Content-Type": "application/json", "Content-Length": len(body)} | dict(headers)
        ).items():
            self.send_header(header, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class XetHub(UploadHub):
    """The same, for a client with Xet, which sends large files as compressed chunks to another server."""

    def answer_as_the_hub(self):
        if "/xet-write-token/" in self.path:
            self.send_json({"casUrl": f"{self.address}/cas", "accessToken": "t", "exp": 2**40})
        elif self.path.startswith("/cas/"):
            self.server.store.bytes_by_xet += len(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            known = {"/cas/v1/xorbs/": {"was_inserted": True}, "/cas/v1/shards": {"result": 1}}
            content = next((answer for path, answer in known.items() if self.path.startswith(path)), None)
            self.send_json(content, 200 if content else 404)
        else:
            super().answer_as_the_hub()


@dataclass
class Model:
    """A model on the Hub."""

    is_private: bool
    files: dict[str, bytes]
    commits: list[str]

    @property
    def sha(self):
        return f"{len(self.commits):040x}"


@dataclass
class Store:
    """What a Hub that takes uploads has, and what it was asked for."""

    address: str
    token: str = "hf_write"
    models: dict[str, Model] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    refuses: dict[str, int] = field(default_factory=dict)  # a status by a part of an address
    requests: list[str] = field(default_factory=list)
    bytes_by_xet: int = 0


@pytest.fixture
def upload_hub(serve, tmp_path, monkeypatch):
    """Be a Hub that takes uploads, with a token that it knows; returns what it has."""
    server = serve(XetHub)
    server.store = Store(f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", server.store.token)
    return server.store


@pytest.fixture
def point_client_at(tmp_path, monkeypatch):
    """Make the client take a local port for the Hub, and keep proxies and credentials out of it."""

    def point(port):
        url = f"http://127.0.0.1:{port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # bytes
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its retries
        close_session()

    yield point
    close_session()


@pytest.fixture
def serve(point_client_at):
    """Be the Hub: `serve(Hub)` returns the server."""
    with contextlib.ExitStack() as stack:

        def start(handler):
            server = stack.enter_context(HubServer(handler))
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
            stack.callback(server.shutdown)
            point_client_at(server.server_port)
            return server

        yield start
