"""Several processes that train one run, over the loopback: 2 processes with 2 CPU devices each."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers import CONTEXT_LENGTH, ROOT, complaint, final_state, random_tokens

from checkpointing import find_checkpoints, verify
from outside_in.config import ModelConfig, TrainConfig
from outside_in.config_files import load_config
from outside_in.data.loader import open_streams
from outside_in.data.sources import dataset_folder
from outside_in.data.token_files import map_tokens
from outside_in.runtime import processes
from outside_in.runtime.mesh import local_sequence_slice, one_device
from outside_in.storage import metrics

pytestmark = pytest.mark.slow

SPREAD = {
    "microbatch_size": 1,
    "learning_rate": 0.003,
    "gradient_accumulation_steps": 2,
    "mesh": {"data": 2, "fsdp": 2},
    "min_train_tokens": 12 * 8 * CONTEXT_LENGTH,
}
LARGER = {"emb_dim": 64, "n_layers": 2, "vocab_size": 101}
STEP = {"microbatch_size": 1, "gradient_accumulation_steps": 8, "mesh": {"data": 1}}  # the same on one device


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(run, port, process, *arguments, devices=2, patch="", **environment):
    """Start one of the processes; what it says is in a file. `patch` is run in the first one before it begins."""
    by_hand = ["--coordinator", f"127.0.0.1:{port}", "--processes", 2, "--process", process]
    patched = f"{patch}\nimport train\nfrom outside_in.runtime import cli\ncli.run(train.main, train.make_parser())"
    program = ["-c", patched] if patch and process == 0 else [ROOT / "train.py"]
    command = [sys.executable, *program, run, "--distributed", *([] if environment else by_hand), *arguments]
    path = run.parent / f"output-{process}-{port}.txt"
    variables = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"} | environment
    with path.open("w") as output:
        started = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=output, stderr=output, env=variables)
    started.path = path
    return started


@contextlib.contextmanager
def both_processes(*arguments, **options):
    """Start both processes; they are killed if they do not end by themselves."""
    port = free_port()
    both = [start(arguments[0], port, process, *arguments[1:], **options) for process in (0, 1)]
    try:
        yield both
    finally:
        for process in both:
            process.kill()
            process.wait()


def ended(both, seconds=240):
    deadline = time.monotonic() + seconds
    codes = [process.wait(max(1, deadline - time.monotonic())) for process in both]
    return codes, [process.path.read_text() for process in both]


def wait_for(process, words, seconds=240):
    deadline = time.monotonic() + seconds
    while words not in process.path.read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.path.read_text()
        time.sleep(0.05)


def same_run(found, expected):
    one, other = metrics.read(found / "metrics.jsonl"), metrics.read(expected / "metrics.jsonl")
    assert [record["global_step"] for record in one] == [record["global_step"] for record in other]
    for key in ("loss", "gradient_norm"):
        np.testing.assert_allclose([r[key] for r in one], [r[key] for r in other], rtol=1e-5)
    validated = [[r["val_loss"] for r in records if "val_loss" in r] for records in (one, other)]
    np.testing.assert_allclose(*validated, rtol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run on one device."""
    made = {}

    def train(make_run, call_program):
        if not made:
            run = make_run("alone", model=LARGER, train=SPREAD | STEP)
            assert call_program("train", run).returncode == 0
            made["run"] = run.rename(tmp_path_factory.mktemp("alone") / "run")
        return made["run"]

    return train


SAMPLE = "from outside_in.training import checkpoint_writer\ncheckpoint_writer.sample = lambda state: ['a text']"


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2}, {"data": 1, "fsdp": 4}], ids=str)  # within one, over both
def test_two_processes_train_as_one_device_and_the_first_alone_speaks_and_samples(make_run, call_program, alone, mesh):
    run = make_run(model=LARGER, train=SPREAD | {"mesh": mesh})
    with both_processes(run, patch=SAMPLE) as both:
        codes, (first, second) = ended(both)
    assert codes == [0, 0], first + second
    assert "finished: " in first and "step    128 tokens: 2 microbatches of 1 sequence on each of 4 devices" in first
    assert not [word for word in ("tokens", "step", "run", "mesh") if word in second]  # only Gloo speaks there
    same_run(run, alone(make_run, call_program))
    assert final_state(run)["step"] == 12  # every checkpoint is whole
    assert (run / "samples.txt").read_text() == "".join(f"step {step} | a text\n" for step in (5, 10, 12))
    weights = find_checkpoints(run / "checkpoints")[-1].path / "model.safetensors"
    assert call_program("inspect_checkpoint", weights).returncode == 0


def test_sigterm_on_one_saves_on_all_and_one_process_goes_on(make_run, call_program, alone):
    run = make_run(model=LARGER, train=SPREAD | {"checkpoint_interval": 4})
    with both_processes(run) as both:
        wait_for(both[0], "step 4:")
        both[1].send_signal(signal.SIGTERM)
        codes, (first, second) = ended(both)
    stopped = [record["global_step"] for record in metrics.read(run / "metrics.jsonl")][-1]
    if stopped < 12:
        assert codes == [143, 143], first + second
        assert f"stopped and saved at step {stopped} of 12" in first
    assert find_checkpoints(run / "checkpoints")[-1].global_step == stopped
    (run / "train.json").write_text(
        json.dumps(json.loads((run / "train.json").read_text()) | {"mesh": {"data": 2}, "checkpoint_interval": 5})
    )
    finished = call_program("train", run)
    assert finished.returncode == 0, finished.stderr
    expected, found = (metrics.read(path / "metrics.jsonl") for path in (alone(make_run, call_program), run))
    np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in expected], rtol=1e-4)


def wait_for_four_steps(process, after):
    if after:
        wait_for(process, f"resuming from step {after:,} of")
    wait_for(process, f"step {after + 4:,}:")


def test_a_process_that_dies_ends_the_other_within_a_minute_and_the_run_resumes(make_run):
    run = make_run(model=LARGER, train=SPREAD | {"min_train_tokens": -1, "epochs": 400, "checkpoint_interval": 4})
    reached = 0
    for victim in (0, 1):
        with both_processes(run) as both:
            wait_for_four_steps(both[0], after=reached)
            both[victim].kill()
            died = time.monotonic()
            codes, outputs = ended(both)
            assert time.monotonic() - died < 60
        assert codes[1 - victim] not in (0, 130, 143)
        assert outputs[1 - victim].strip(), "it says why"
        for checkpoint in find_checkpoints(run / "checkpoints"):
            verify(checkpoint)
        reached = find_checkpoints(run / "checkpoints")[-1].global_step
    with both_processes(run) as both:
        wait_for_four_steps(both[0], after=reached)
        both[0].send_signal(signal.SIGINT)
        codes, outputs = ended(both)
    assert codes == [130, 130], outputs


ONE_FULL_DISK = """
import errno
from outside_in.storage import {module}
original, calls = {module}.{function}, []
def once(*arguments, **options):
    calls.append({counted})
    if sum(calls) == {number} and calls[-1]:
        raise OSError(errno.ENOSPC, "No space left on device")
    return original(*arguments, **options)
{module}.{function} = once
"""
FULL_DISKS = {
    "the last manifest": {"module": "manifest", "function": "write", "counted": "True", "number": 3},
    "metrics at a checkpoint": {
        "module": "metrics",
        "function": "append",
        "counted": "options.get('durable', False)",
        "number": 1,
    },
}


@pytest.mark.parametrize("disk", FULL_DISKS)
def test_a_disk_that_is_full_once_is_a_warning_and_all_go_on_in_the_same_way(make_run, disk):
    run = make_run(model=LARGER, train=SPREAD)
    with both_processes(run, patch=ONE_FULL_DISK.format(**FULL_DISKS[disk])) as both:
        codes, outputs = ended(both)
    assert codes == [0, 0], outputs
    assert "could not be saved ([Errno 28] No space left on device" in outputs[0]
    assert find_checkpoints(run / "checkpoints")[-1].global_step == 12
    assert not list((run / "checkpoints").glob(".staging*"))


def test_a_stop_at_a_milestone_is_made_up_for_by_all(make_run):
    run = make_run(model=LARGER, train=SPREAD | {"min_train_tokens": -1, "epochs": 400, "checkpoint_interval": 1})
    for first_words in ("step 2:", "resuming from step"):
        with both_processes(run) as both:
            wait_for(both[0], first_words)
            both[1].send_signal(signal.SIGINT)
            codes, outputs = ended(both)
        assert codes == [130, 130], outputs


def test_numbers_that_are_not_finite_can_be_put_on_devices():
    sharding = jax.sharding.NamedSharding(one_device(), jax.sharding.PartitionSpec())
    assert np.isnan(processes.device_put_global(np.float32("nan"), sharding))


def test_two_runs_in_one_folder_are_one_error(make_run):
    run = make_run(model=LARGER, train=SPREAD | {"min_train_tokens": -1, "epochs": 400})
    with both_processes(run) as first:
        wait_for(first[0], "step 5:")
        with both_processes(run) as second:
            codes, outputs = ended(second)
        assert codes == [2, 1], outputs
        assert f"error: {run}: is being trained by process {first[0].pid}" in outputs[0]
        assert "error: process 0 of 2 failed; its output says why" in outputs[1]
        assert first[0].poll() is None


def test_processes_with_different_configs_name_the_key(make_run, tmp_path):
    runs = [make_run(name, model=LARGER, train=SPREAD | {"seed": seed}) for name, seed in (("one", 1), ("two", 2))]
    port = free_port()
    both = [start(run, port, process) for process, run in enumerate(runs)]
    codes, outputs = ended(both)
    assert codes == [1, 2], outputs
    assert "train.json: seed is 2 in process 1, but 1 in process 0" in outputs[1]


def test_a_coordinator_that_is_not_there_is_one_line(make_run):
    run = make_run()
    script = "from outside_in.runtime import cli, processes; processes.START_SECONDS = 3; import train;"
    script += "cli.run(train.main, train.make_parser())"
    arguments = [run, "--distributed", "--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--process", 1]
    command = [sys.executable, "-c", script, *map(str, arguments)]
    began = time.monotonic()
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert time.monotonic() - began < 60
    assert "did not meet at 127.0.0.1:" in complaint(finished)


def test_torchruns_variables_are_understood(make_run, call_program):
    run = make_run(
        model=LARGER, train=SPREAD | {"mesh": {}, "gradient_accumulation_steps": 4, "min_train_tokens": 1024}
    )
    port = free_port()
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port - 1), "WORLD_SIZE": "2"}
    both = [start(run, port, process, devices=1, RANK=str(process), LOCAL_RANK="0", **common) for process in (0, 1)]
    codes, outputs = ended(both)
    assert codes == [0, 0], outputs
    assert "mesh    2 devices: data 2 × fsdp 1" in outputs[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--distributed", "--processes", 2), "expected all of --coordinator, --processes and --process"),
        (("--process", 1), "expected together with --distributed"),
        (("--distributed", "--debug-checks"), "--debug-checks: runs in one process"),
        (("--distributed", "--coordinator", "here", "--processes", 2, "--process", 0), "expected HOST:PORT, got here"),
        (("--distributed", "--coordinator", "a:1", "--processes", 2, "--process", 2), "expected a number from 0 to"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_one_line(call_program, make_run, arguments, words):
    assert words in complaint(call_program("train", make_run(), *arguments))


# What each process reads


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_processes_together_read_what_one_would(make_run, shuffle):
    train = SPREAD | {
        "shuffle": shuffle,
        "epochs": 2,
        "min_train_tokens": 5 * 8 * CONTEXT_LENGTH,
        "start_train_token": 7,
    }
    run = make_run(train=train)
    model, config = load_config(run / "model.json", ModelConfig), load_config(run / "train.json", TrainConfig)
    folder = dataset_folder(config.dataset)
    whole, _ = open_streams(folder, model, config, 5, 4)
    parts = [open_streams(folder, model, config, 5, 4, local_sequences)[0] for local_sequences in ((0, 2), (2, 4))]
    for step in range(10):
        inputs, targets = whole.batch(step)
        for side, joined in zip((inputs, targets), zip(*(part.batch(step) for part in parts))):
            np.testing.assert_array_equal(np.concatenate(joined, axis=1), side)
    share = parts[0]._local_windows(1)
    assert share.shape == (5, 2, 2, CONTEXT_LENGTH + 1) and share.dtype == np.uint16
    assert isinstance(parts[0].tokens, np.memmap)


def test_mapped_tokens_are_those_of_the_file(token_folder):
    mapped = map_tokens(token_folder / "train.safetensors", 101, 30, 100)
    np.testing.assert_array_equal(mapped, random_tokens(2000)[30:130])
    with pytest.raises(ValueError, match=r"expected ids from 0 to 49"):
        map_tokens(token_folder / "train.safetensors", 50, 0, 100)
    with pytest.raises(ValueError, match=r"expected at least 2,001 tokens, got 2,000"):
        map_tokens(token_folder / "train.safetensors", 101, 1, 2000)


def test_processes_with_other_overrides_are_told_which(monkeypatch):
    monkeypatch.setattr(processes, "broadcast", lambda value: value | {"the command line": {"learning_rate": 0.1}})
    message = "the command line: learning_rate is 0.2 in process 0, but 0.1 in process 0; all need the same files and"
    with pytest.raises(ValueError, match=message):
        processes.check_same({"the command line": {"learning_rate": 0.2}})


def test_one_process_has_all_columns_and_agrees_with_itself():
    assert local_sequence_slice(one_device(), 3) is None
    assert processes.broadcast({"a": [1, None]}) == {"a": [1, None]}
    processes.check_same({"train.json": {"seed": 1}})
    with processes.propagate_errors():
        pass
    assert jax.process_count() == 1
