import json
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import complaint, tiny_model, tiny_train_config
from safetensors.numpy import load_file, save_file

from checkpointing import MODEL_FILE, copy_to_host, find_checkpoints, save
from outside_in.optimizer import make_optimizer


@pytest.fixture
def inspect(call_program):
    return partial(call_program, "inspect_checkpoint")


@pytest.fixture
def run(tmp_path):
    """A run folder with two checkpoints, that differ in one parameter."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (1, 2):
        model = tiny_model()
        model.output_norm.scale[...] = jnp.full(32, float(step))
        state = copy_to_host(model, make_optimizer(model, tiny_train_config(), 10))
        save(folder / "checkpoints", state, {"global_step": step, "is_best": False}, "{}")
    return folder


def rows(finished):
    assert finished.returncode == 0, finished.stderr
    lines = [line for line in finished.stdout.splitlines() if line.startswith("|")]
    return {cells[1]: cells[2:-1] for cells in ([cell.strip() for cell in line.split("|")] for line in lines)}


def test_a_run_a_checkpoint_and_a_file_are_all_understood(inspect, run):
    newest = find_checkpoints(run / "checkpoints")[-1].path
    tables = [rows(inspect(path)) for path in (run, newest, newest / MODEL_FILE)]
    assert tables[0] == tables[1] == tables[2]
    assert len(tables[0]) == 2 + 16
    assert tables[0]["output_norm.scale"] == ["32", f"{2 * 32**0.5:.4g}", "2", "0", "0.00%", "0"]


def test_two_side_by_side_show_what_moved(inspect, run):
    first, second = (checkpoint.path for checkpoint in find_checkpoints(run / "checkpoints"))
    changes = {name: row[-1] for name, row in list(rows(inspect(first, second)).items())[2:]}
    assert {name: change for name, change in changes.items() if change != "0"} == {"output_norm.scale": "1"}


def test_the_overrides_of_a_checkpoint_are_shown(inspect, run):
    newest = find_checkpoints(run / "checkpoints")[-1].path
    assert inspect(newest).stdout.splitlines()[0] == str(newest / MODEL_FILE)
    meta = json.loads((newest / "meta.json").read_text()) | {
        "overrides": {"learning_rate": 0.1, "sample_prompt": "a b"}
    }
    save(newest.parent, copy_to_host(model := tiny_model(), make_optimizer(model, tiny_train_config(), 10)), meta, "{}")
    shown = inspect(find_checkpoints(run / "checkpoints")[-1].path).stdout.splitlines()[0]
    assert shown.endswith(f"{MODEL_FILE}, trained with learning_rate=0.1 'sample_prompt=a b'")


def test_what_is_not_finite_is_counted_not_refused(inspect, tmp_path):
    save_file({"a": np.array([1.0, np.nan, np.inf], np.float32)}, tmp_path / MODEL_FILE)
    assert rows(inspect(tmp_path))["a"] == ["3", "1", "1", "0", "0.00%", "2"]


def test_bad_input_is_one_line(inspect, run, tmp_path):
    assert "expected one path or two" in complaint(inspect(run, run, run))
    assert "found nothing" in complaint(inspect(tmp_path / "nowhere"))
    assert "a checkpoint, or a run that has one, found a folder" in complaint(inspect(tmp_path))
    (tmp_path / "text").write_text("hello")
    assert "not a readable safetensors file" in complaint(inspect(tmp_path / "text"))
    file = find_checkpoints(run / "checkpoints")[-1].path / MODEL_FILE
    arrays = load_file(file)
    arrays["output_norm.scale"] *= 3
    save_file(arrays, file)
    assert "differs from the manifest" in complaint(inspect(run))
