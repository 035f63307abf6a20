"""Loggers: what TensorBoard's, trackio's and Weights & Biases' own files hold of a run, by their own readers."""

import functools
import importlib.util
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from helpers import ROOT, complaint, on_step, send

from checkpointing import find_checkpoints
from outside_in.config import LogTo
from outside_in.reports import loggers
from outside_in.reports.loggers import LOGGERS, PROJECT
from outside_in.storage import metrics
from outside_in.training import checkpoint_writer, pictures

pytestmark = pytest.mark.slow

TRACKIO = tempfile.TemporaryDirectory(prefix="trackio-")
os.environ |= {"TRACKIO_DIR": TRACKIO.name, "WANDB_MODE": "offline"}  # which the packages read when they are imported
ALL = ["tensorboard", "trackio", "wandb"]
FROM_FILE = ("loss", "val_loss", "gradient_norm", "learning_rate", "tokens_seen", "rejected_updates")


@pytest.fixture
def train(call_program):
    return functools.partial(call_program, "train")


@pytest.fixture(autouse=True)
def a_sample_of_any_vocabulary(monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "sample", lambda state: [f"*one* {state.global_step}", "<b>two"])
    monkeypatch.setattr(pictures, "draw_charts", lambda *_: None)


def in_tensorboard(run):
    """Values by name, each a list of pairs of step and value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"), size_guidance=dict.fromkeys(("scalars", "tensors"), 0))
    reader.Reload()
    found = {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    texts = reader.Tensors("samples") if "samples" in reader.Tags()["tensors"] else ()
    return found | {"samples": [(event.step, event.tensor_proto.string_val[0].decode()) for event in texts]}


def in_trackio(run):
    import trackio

    name = json.loads((run / "loggers.json").read_text())["trackio"]["id"]
    [only] = [other for other in trackio.Api().runs(PROJECT) if other.name == name]
    rows = trackio.SQLiteStorage.get_logs(PROJECT, name, run_id=only.id)
    found = by_name((row["step"], row) for row in rows)
    return found | {"samples": [(step, text["_value"]) for step, text in found["samples"]]}


def in_wandb(run):
    """Read the newest wandb run: the records that `wandb sync` sends, of all its starts."""
    name = json.loads((run / "loggers.json").read_text())["wandb"]["id"]
    rows = []
    for folder in sorted((run / "wandb").glob(f"offline-run-*-{name}")):
        for record in wandb_records((folder / f"run-{name}.wandb").read_bytes()):
            if record.WhichOneof("record_type") == "history":
                row = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                values = {name: json.loads(value) for name, value in row.items()}
                assert values["_step"] == record.history.step.num or not record.history.step.num
                media = {name: values.pop(name) for name in list(values) if name.startswith("samples")}
                if path := media.get("samples.path") or media.get("samples", {}).get("path"):
                    values["samples"] = (folder / "files" / path).read_text()
                rows.append((values["_step"], values))
    return by_name(rows)


def wandb_records(content):
    """Yield the records of a `.wandb` file: LevelDB's log format behind seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    position, whole = 7, b""
    while position + 7 <= len(content):
        if 32_768 - position % 32_768 < 7:
            position += 32_768 - position % 32_768
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, or the last part
            yield Record.FromString(whole)
            whole = b""


def by_name(rows):
    found = {}
    for step, row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append((step, value))
    return found


READERS = {"tensorboard": in_tensorboard, "trackio": in_trackio, "wandb": in_wandb}


def check_copies(run, names=ALL):
    """Each logger has every step once, with the values of metrics.jsonl, and the samples."""
    records = metrics.read(run / "metrics.jsonl")
    assert [record["global_step"] for record in records] == list(range(1, len(records) + 1))
    for name in names:
        found = READERS[name](run)
        for key in FROM_FILE:
            expected = [(r["global_step"], r[key]) for r in records if r.get(key) is not None]
            assert [step for step, _ in found[key]] == [step for step, _ in expected], (name, key)
            np.testing.assert_array_equal(np.float32(found[key]), np.float32(expected), err_msg=f"{name} {key}")
        for (_, perplexity), (_, loss) in zip(found["val_perplexity"], found["val_loss"], strict=True):
            assert perplexity == pytest.approx(math.exp(loss), rel=1e-5)
        assert len(found["tokens_per_second"]) == len(records)
        assert [step for step, _ in found["samples"]] == [step for step, _ in found["val_loss"]]
        step, text = found["samples"][-1]
        assert f"*one* {step}\n" in text and ("<b>two" in text or "&lt;b&gt;two" in text)


def go_back(run, step):
    """Leave a run as a kill would: its newest checkpoint is that of `step`, and other files know more."""
    for checkpoint in find_checkpoints(run / "checkpoints"):
        if checkpoint.global_step > step:
            shutil.rmtree(checkpoint.path)


def test_every_name_that_the_key_takes_has_a_logger():
    assert set(LOGGERS) == set(ALL) == set(LogTo.__args__[0].__args__[0].__args__)


def test_each_step_is_there_once_with_its_values_after_a_stop_and_after_a_kill(train, make_run, monkeypatch):
    run = make_run(train={"log_to": ALL})
    on_step(monkeypatch, "training step", 7, lambda: send(signal.SIGINT))
    stopped = train(run)
    assert stopped.returncode == 130
    assert "WARNING" not in stopped.stdout + stopped.stderr
    for package in ("trackio", "wandb"):
        assert f"* {package}" not in stopped.stdout.lower()
    check_copies(run)
    first_id = json.loads((run / "loggers.json").read_text())["wandb"]["id"]

    resumed = train(run)
    assert resumed.returncode == 0 and "made anew" not in resumed.stdout
    assert json.loads((run / "loggers.json").read_text())["wandb"]["id"] == first_id
    check_copies(run)

    go_back(run, 10)
    killed = train(run)
    assert killed.returncode == 0 and killed.stdout.count("made anew from metrics.jsonl, up to step 10") == 3
    check_copies(run)
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1  # what `wandb sync` sends is one run


def test_going_back_to_a_checkpoint_takes_the_steps_of_the_other_branch_away(train, make_run):
    run = make_run(train={"log_to": ["tensorboard", "trackio"]})
    assert train(run).returncode == 0
    before = in_tensorboard(run)["loss"]
    (run / "train.json").write_text((run / "train.json").read_text().replace("0.01", "0.002"))
    first = find_checkpoints(run / "checkpoints")[0].path.name
    assert train(run, "--from", first, "--accept-changes").returncode == 0
    check_copies(run, ["tensorboard", "trackio"])
    assert in_tensorboard(run)["loss"][:5] == before[:5] and in_tensorboard(run)["loss"] != before


def test_a_logger_that_comes_later_gets_the_whole_run(train, make_run, monkeypatch):
    run = make_run()
    on_step(monkeypatch, "training step", 7, lambda: send(signal.SIGINT))
    assert train(run).returncode == 130
    with_logger = json.loads((run / "train.json").read_text()) | {"log_to": ["tensorboard"]}
    (run / "train.json").write_text(json.dumps(with_logger))
    assert train(run).returncode == 0  # without --accept-changes
    check_copies(run, ["tensorboard"])


@pytest.mark.parametrize("name", ALL)
def test_a_copy_that_somebody_has_deleted_is_made_anew(train, make_run, monkeypatch, name):
    import trackio

    run = make_run(train={"log_to": [name]})
    on_step(monkeypatch, "training step", 7, lambda: send(signal.SIGINT))
    assert train(run).returncode == 130
    shutil.rmtree(run / name, ignore_errors=True)
    for other in trackio.Api().runs(PROJECT) if name == "trackio" else ():
        other.delete()
    resumed = train(run)
    assert resumed.returncode == 0 and "made anew from metrics.jsonl, up to step 7" in resumed.stdout
    check_copies(run, [name])


def test_a_stop_during_validation_copies_that_step_when_it_is_validated(train, make_run, monkeypatch):
    run = make_run(train={"log_to": ALL})
    on_step(monkeypatch, "evaluation step", 1, lambda: send(signal.SIGINT))
    assert train(run).returncode == 130
    assert [step for step, _ in in_tensorboard(run)["loss"]] == [1, 2, 3, 4]
    resumed = train(run)
    assert resumed.returncode == 0 and "made anew" not in resumed.stdout
    check_copies(run)


def test_two_folders_of_the_same_name_are_two_runs_of_trackio(train, make_run, tmp_path):
    import trackio

    run = make_run("same", train={"log_to": ["trackio"]})
    assert train(run).returncode == 0
    copied = tmp_path / "elsewhere" / "same"
    shutil.copytree(run, copied, symlinks=True)
    for _ in range(2):
        go_back(copied, 5)
        assert train(copied).returncode == 0
    names = [json.loads((folder / "loggers.json").read_text())["trackio"]["id"] for folder in (run, copied)]
    assert names[0] == "same" and names[1].startswith("same-")
    assert sorted(other.name for other in trackio.Api().runs(PROJECT) if other.name.startswith("same")) == names
    check_copies(run, ["trackio"])
    check_copies(copied, ["trackio"])


def test_tensorboard_has_the_configs_as_hyperparameters(train, make_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run = make_run(train={"log_to": ["tensorboard"]})
    assert train(run).returncode == 0
    reader = EventAccumulator(str(run / "tensorboard"))
    reader.Reload()
    [content] = reader.PluginTagToContent("hparams").values()
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["model.emb_dim"].number_value == 32
    assert found["train.learning_rate"].number_value == 0.01
    assert found["train.mesh"].string_value == '{"data": 1, "fsdp": 1}'


@pytest.mark.parametrize("method", ["__init__", "log", "close"])
def test_a_logger_that_fails_is_one_warning_and_training_goes_on(train, make_run, monkeypatch, method):
    original = getattr(loggers.TensorBoard, method)

    def fail(*arguments):
        if method != "__init__":
            original(*arguments)
        raise OSError(28, "No space left on device")

    run = make_run(train={"log_to": ["tensorboard", "trackio"]})
    with monkeypatch.context() as patched:
        patched.setattr(loggers.TensorBoard, method, fail)
        finished = train(run)
    assert finished.returncode == 0
    assert finished.stdout.count("WARNING") == finished.stdout.count("WARNING log_to tensorboard: [Errno 28]") == 1
    check_copies(run, ["trackio"])
    go_back(run, 10)
    assert train(run).returncode == 0
    check_copies(run, ["tensorboard", "trackio"])


def test_wandb_without_a_login_is_kept_offline(train, make_run, monkeypatch):
    import wandb

    original = wandb.init

    def init(*args, mode=None, **options):
        if mode != "offline":
            raise wandb.UsageError("No API key configured. Use `wandb login` to log in.")
        return original(*args, mode=mode, **options)

    monkeypatch.setattr(wandb, "init", init)
    run = make_run(train={"log_to": ["wandb"]})
    finished = train(run)
    assert finished.returncode == 0
    assert f"offline (No API key configured. Use `wandb login` to log in.); uv run wandb sync {run}" in finished.stdout
    check_copies(run, ["wandb"])


@pytest.mark.parametrize("options", [[], ["--check"]])
@pytest.mark.parametrize("spec", [None, importlib.util.spec_from_loader("wandb", None)])
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(train, make_run, monkeypatch, options, spec):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "wandb" else find(name))
    run = make_run(train={"log_to": ["tensorboard", "wandb"]})
    assert complaint(train(run, *options)).endswith(
        f"log_to: wandb not installed; this line installs what it needs: uv run --group wandb train.py {run}"
    )
    assert not (run / "checkpoints").exists()


def test_in_a_folder_of_runs_a_missing_package_of_the_last_one_shows_at_once(train, make_run, tmp_path, monkeypatch):
    folder = tmp_path / "ladder"
    folder.mkdir()
    make_run("ladder/1")
    make_run("ladder/2", train={"log_to": ["trackio"]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "trackio not installed" in complaint(train(folder))
    assert not (folder / "1" / "checkpoints").exists()


def test_in_a_folder_of_runs_each_has_its_own(train, make_run, tmp_path):
    (tmp_path / "ladder").mkdir()
    runs = [make_run(f"ladder/{i}", train={"log_to": ALL}) for i in (1, 2)]
    assert train(tmp_path / "ladder").returncode == 0
    for run in runs:
        check_copies(run)


def test_notes_that_are_nonsense_are_as_none(train, make_run):
    run = make_run(train={"log_to": ["tensorboard"]})
    for nonsense in ("", "[1]", '{"tensorboard": 7}', "{"):
        (run / "loggers.json").write_text(nonsense)
        go_back(run, 10)
        finished = train(run)
        assert finished.returncode == 0 and "WARNING" not in finished.stdout
        check_copies(run, ["tensorboard"])


def test_trackio_never_meets_matplotlib_halfway_imported():
    code = "from outside_in.reports.loggers import *; Trackio(RunDirectory(Path()), {}, None); import sys; "
    code = f"from pathlib import Path; {code} sys.exit('matplotlib.figure' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_no_logger_is_imported_unless_asked_for():
    code = f"import sys, train, outside_in.training.run; sys.exit(any(name in sys.modules for name in {ALL}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
