"""`convert_gpt2.py push`, by the real client to a Hub on this machine."""

import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from helpers import complaint, run_program, send, tiny_model
from hub import Model
from safetensors.numpy import load

import checkpointing
from outside_in.data.tokenizer_files import load as load_tokenizer
from outside_in.huggingface import import_export
from outside_in.weights import host_arrays, save_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # as the Hub's client calls its own
]
NAME = "somebody/tiny"


@pytest.fixture
def run(tmp_path):
    """A run that only has the weights that it starts from."""
    path = tmp_path / "run" / "initial" / "model.safetensors"
    path.parent.mkdir(parents=True)
    model = tiny_model(vocab_size=257)
    arrays = host_arrays(nnx.state(model, nnx.Param))
    save_weights(path, arrays, model.config.model_dump_json(), load_tokenizer("bytes").identity)
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """A folder for temporary files, which must be empty in the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


@pytest.fixture
def push(call_program, run):
    return lambda *options: call_program("convert_gpt2", "push", run, NAME, *options)


def test_what_arrives_is_the_export_and_private(push, call_program, run, upload_hub, tmp_path):
    finished = push()
    assert finished.returncode == 0, finished.stderr
    model = upload_hub.models[NAME]
    assert model.is_private and len(model.commits) == 1
    assert finished.stdout.splitlines()[-1].endswith(f"/{NAME}/commit/{model.sha}")
    assert call_program("convert_gpt2", "export", run, tmp_path / NAME).returncode == 0
    exported = {path.name: path.read_bytes() for path in (tmp_path / NAME).iterdir()}
    card, of_folder = (files.pop("README.md").decode() for files in (model.files, exported))
    assert card == of_folder.replace(str(tmp_path / NAME), NAME) and f'from_pretrained("{NAME}")' in card
    pushed, weights = (load(files.pop("model.safetensors")) for files in (model.files, exported))  # their metadata
    assert model.files == exported and pushed.keys() == weights.keys()  # are in random order
    for name, array in weights.items():
        np.testing.assert_array_equal(pushed[name], array)
    assert model.commits == ["run: initial"]


def test_a_trained_run_arrives_with_its_figures(make_run, call_program, upload_hub, tmp_path):
    (tmp_path / "text.txt").write_text("Water, water, every where,\nNor any drop to drink.\n" * 40)
    prepared = ("--text", tmp_path / "text.txt", "--tokenizer", "bytes", "--validation", "10%")
    assert call_program("prepare_data", tmp_path / "bytes", *prepared).returncode == 0
    run = make_run(model={"vocab_size": 257}, train={"min_train_tokens": 300, "dataset": str(tmp_path / "bytes")})
    assert call_program("train", run).returncode == 0
    assert call_program("convert_gpt2", "push", run, NAME).returncode == 0
    model = upload_hub.models[NAME]
    [checkpoint] = checkpointing.find_checkpoints(run / "checkpoints")
    assert model.commits == [f"run: {checkpoint.path.name}"]
    bits_per_byte = checkpoint.meta["val_loss"] / np.log(2) / checkpoint.meta["bytes_per_token"]
    assert f"| validation loss, bits per byte | {bits_per_byte:.5g} |" in model.files["README.md"].decode()


def test_a_client_with_xet_pushes_too(run, upload_hub):
    environment = {"HF_ENDPOINT": upload_hub.address, "HF_TOKEN": upload_hub.token, "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(run / "home")}
    finished = run_program("convert_gpt2.py", "push", run, NAME, env=os.environ | environment)
    assert finished.returncode == 0, finished.stderr
    model = upload_hub.models[NAME]
    assert model.is_private and len(model.commits) == 1
    assert len(model.files["model.safetensors"]) == 64 and upload_hub.bytes_by_xet > 1000
    assert not any(request.startswith("PUT") for request in upload_hub.requests)


def test_public_is_said(push, upload_hub):
    assert push("--public").returncode == 0
    assert not upload_hub.models[NAME].is_private


def test_a_second_push_is_another_commit(push, upload_hub):
    assert push().returncode == 0
    upload_hub.models[NAME].files |= {"picture.png": b"png", "config.json": b"{}"}
    again = push()
    model = upload_hub.models[NAME]
    assert again.returncode == 0 and again.stdout.endswith(f"/{NAME}/commit/{model.sha}\n")
    assert len(model.commits) == 2 and model.files["picture.png"] == b"png" and len(model.files["config.json"]) > 10


def test_what_is_public_already_takes_no_push_unless_it_is_said(push, upload_hub):
    upload_hub.models[NAME] = Model(False, {}, [])
    assert "exists and is public; say --public" in complaint(push())
    assert not upload_hub.models[NAME].files
    assert push("--public").returncode == 0 and upload_hub.models[NAME].files


def test_what_is_private_already_stays_so(push, upload_hub):
    upload_hub.models[NAME] = Model(True, {}, [])
    finished = push("--public")
    assert finished.returncode == 0 and "exists and stays private" in finished.stderr
    assert upload_hub.models[NAME].is_private and upload_hub.models[NAME].files


def test_without_a_token_nothing_is_asked(push, upload_hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "no token for the Hub; log in with: uv run hf auth login" in complaint(push())
    assert not upload_hub.requests


def test_a_token_that_the_hub_does_not_know_is_one_line(push, upload_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    told = complaint(push())
    assert f"{NAME}: could not be pushed to the Hub: 401, it does not know the token; log in again" in told


@pytest.mark.parametrize("step", ["/api/repos/create", "/preupload/", "/lfs/objects/batch", "/lfs/", "/commit/"])
@pytest.mark.parametrize(
    ("status", "words"), [(500, "500"), (403, "403, the token may not write to somebody; use one that may")], ids=str
)
def test_a_refusal_is_one_line(push, upload_hub, step, status, words):
    upload_hub.refuses = {step: status}
    told = complaint(push())
    assert f"{NAME}: could not be pushed to the Hub: " in told and words in told
    assert not any(model.commits for model in upload_hub.models.values())


def test_a_hub_that_is_not_there_is_one_line(push, upload_hub, point_client_at):
    point_client_at(9)
    assert f"{NAME}: could not be pushed to the Hub: " in complaint(push())


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "some body/tiny", "somebody/tiny.git", "../tiny", "somebody/"])
def test_a_name_that_the_hub_refuses_is_one_line(call_program, run, upload_hub, name):
    assert f"{name}: " in complaint(call_program("convert_gpt2", "push", run, name))
    assert not upload_hub.requests


def test_options_of_other_actions_are_refused(call_program, run, upload_hub, tmp_path):
    assert "--public: only for push" in complaint(
        call_program("convert_gpt2", "export", run, tmp_path / "x", "--public")
    )
    assert "no checkpoint 'worst'" in complaint(
        call_program("convert_gpt2", "push", run, NAME, "--checkpoint", "worst")
    )
    assert not upload_hub.requests


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
def test_a_signal_leaves_no_folder_behind(push, upload_hub, monkeypatch, temporary, number, code):
    def interrupted(folder: Path, *_, **__):
        assert (folder / "model.safetensors").exists() and list(temporary.iterdir())
        send(number)

    monkeypatch.setattr(import_export, "upload", interrupted)
    assert push().returncode == code
