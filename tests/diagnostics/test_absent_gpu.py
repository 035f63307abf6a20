"""Compiling for a GPU that is not there: for real where the CUDA wheels are installed, else for CPUs in its place."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from helpers import ROOT, complaint, run_program

from outside_in.diagnostics import absent_gpu, memory
from outside_in.reports.cards import CARDS, COMPILE_ONLY
from outside_in.runtime import target

HAS_WHEELS = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
SKIP_WITHOUT_WHEELS = pytest.mark.skipif(not HAS_WHEELS, reason="needs JAX's CUDA wheels: uv run --group cuda")

LAYERS, WIDTH, HEADS, LENGTH, VOCAB, PADDED_VOCAB = 2, 128, 2, 64, 101, 128
SEQUENCES, MICROBATCHES = 2, 3
MODEL = {"n_layers": LAYERS, "emb_dim": WIDTH, "n_heads": HEADS, "context_length": LENGTH}
TRAIN = {
    "microbatch_size": SEQUENCES,
    "gradient_accumulation_steps": MICROBATCHES,
    "min_train_tokens": 10 * SEQUENCES * MICROBATCHES * LENGTH,
    "precision": "bfloat16",
    "mesh": {},
}


def needs_wheels(test):
    return pytest.mark.slow(SKIP_WITHOUT_WHEELS(test))


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in COMPILE_ONLY:  # the program sets them; they shall not outlive the test
        monkeypatch.setenv(name, os.environ.get(name, ""))
    for name in ("check_compute_capability", "is_cuda_compute_capability_equal"):
        monkeypatch.setattr(absent_gpu.cudnn, name, getattr(absent_gpu.cudnn, name))


@pytest.fixture
def cpus_instead(monkeypatch):
    """Let the topology of a card be as many CPU devices."""

    def topology(name, platform, topology, target_config):
        hosts, count, processes = map(int, topology.split("x"))
        assert (hosts, processes, platform) == (1, 1, "cuda") and CARDS[name].target_config == target_config
        return SimpleNamespace(devices=jax.devices()[:count])

    monkeypatch.setattr(absent_gpu.topologies, "get_topology_desc", topology)


PROGRAM = """
ENTRY %main (x: f32[250]) -> f32[250] {
  %x = f32[250]{0} parameter(0)
  %sum = f32[250]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %copy.1 = f32[250]{0} copy(%sum)
}
"""


@pytest.fixture
def no_compiler(cpus_instead, monkeypatch):
    """Let every step be one small program that needs a gibibyte for each sequence of a microbatch."""

    def compile_for_shapes(model, config):
        return SimpleNamespace(text=PROGRAM, bytes_needed=2**30 * config.microbatch_size)

    monkeypatch.setattr(memory, "compile_for_shapes", compile_for_shapes)


@pytest.fixture
def run(make_run):
    return make_run(model=MODEL, train=TRAIN)


def as_users_do(*arguments):
    """Start a program of its own, compiled as users compile."""
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", *COMPILE_ONLY)}
    return run_program(*arguments, env=environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"})


@needs_wheels
def test_a_step_is_compiled_for_a_gpu_that_is_not_there(run):
    finished = as_users_do("train.py", run, "--check", "--device", "h100")
    assert finished.returncode == 0, finished.stderr
    kernels = 2 * LAYERS * MICROBATCHES  # forward and backward
    assert f"cudnn   takes the attention, {kernels} kernels a step" in finished.stdout
    assert re.search(r"^needs   0\.\d\d GiB by XLA's account", finished.stdout, re.M)
    assert re.search(r"^bound   [\d.]+ ms a step \(.*% bytes\): at most .* tokens/s, MFU", finished.stdout, re.M)
    assert "NVIDIA H100" in finished.stdout.splitlines()[0] and "sent " not in finished.stdout


@needs_wheels
def test_cudnn_takes_grouped_queries_rotations_and_windows(make_run, tmp_path):
    parts = {"position": "rope", "qk_norm": True, "n_kv_heads": 1, "sliding_window": 16, "window_pattern": "SL"}
    run, report = make_run(model=MODEL | parts, train=TRAIN), tmp_path / "report.json"
    finished = as_users_do("benchmarks/roofline.py", run, "--device", "h100", "--json", report)
    assert finished.returncode == 0, finished.stderr
    pairs = LENGTH / 2 + 16 * (1 - 16 / (2 * LENGTH))  # each query's, in both layers
    attention = 2 * (2 + 5) * MICROBATCHES * SEQUENCES * LENGTH * pairs * WIDTH
    kinds = json.loads(report.read_text())["kinds"]
    assert kinds["attention by cuDNN"]["teraflops"] == pytest.approx(attention / 1e12, rel=1e-6)


@needs_wheels
def test_the_operations_are_those_of_the_model(run, tmp_path):
    report = tmp_path / "report.json"
    finished = as_users_do("benchmarks/roofline.py", run, "--device", "h100", "--json", report)
    assert finished.returncode == 0, finished.stderr
    kinds = json.loads(report.read_text())["kinds"]
    tokens = MICROBATCHES * SEQUENCES * LENGTH
    products = 6 * (LAYERS * 12 * WIDTH**2 + PADDED_VOCAB * WIDTH) * tokens
    attention = (2 + 5) * tokens * LENGTH * WIDTH * LAYERS  # causal: half of the scores
    assert kinds["products"]["teraflops"] == pytest.approx(products / 1e12, rel=1e-6)
    assert kinds["attention by cuDNN"]["teraflops"] == pytest.approx(attention / 1e12, rel=1e-6)


@needs_wheels
def test_several_gpus_say_what_they_send(run):
    finished = as_users_do("train.py", run, "--check", "--device", "h100", "--devices", "4")
    assert finished.returncode == 0, finished.stderr
    assert re.search(r"^sent    all-reduce: \d+ a step, .* GB from each device", finished.stdout, re.M)
    assert "mesh    4 devices" in finished.stdout


@needs_wheels
def test_float32_says_why_cudnn_does_not_take_the_attention(make_run):
    run = make_run(model=MODEL, train=TRAIN | {"precision": "float32"})
    finished = as_users_do("train.py", run, "--check", "--device", "rtx-3090")
    assert 'attention in plain XLA, which is slower than cuDNN\'s: it takes precision "bfloat16"' in finished.stdout


@needs_wheels
def test_xla_knows_every_card():
    program = (
        "from jax.experimental import topologies; from outside_in.reports.cards import CARDS\n"
        "for name, card in CARDS.items():\n"
        "    made = topologies.get_topology_desc(name, 'cuda', topology='1x2x1', target_config=card.target_config)\n"
        "    print(len(made.devices), made.devices[0].platform, made.devices[0].device_kind)"
    )
    environment = os.environ | COMPILE_ONLY | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert finished.stdout.splitlines() == [f"2 gpu {card.device_kind}" for card in CARDS.values()], finished.stderr


@pytest.mark.skipif(HAS_WHEELS, reason="the CUDA wheels are installed")
def test_without_the_wheels_one_line_says_what_installs_them(call_program, run):
    line = complaint(call_program("train", run, "--check", "--device", "l4"))
    assert "--device l4: expected JAX's CUDA wheels, which are not installed" in line
    assert "uv run --group cuda train.py RUN --check --device l4 installs them" in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--check", "--device", "h10"], "argument --device: invalid choice: 'h10' (choose from"),
        (["--device", "h100"], "--device h100: expected with --check or --find-microbatch"),
        (["--overfit-one-batch", "--device", "h100"], "--device h100: expected with --check or --find-microbatch"),
        (["--check", "--devices", "2"], "--devices 2: expected a positive number, and --device"),
        (["--check", "--device", "h100", "--devices", "0"], "--devices 0: expected a positive number"),
    ],
)
def test_wrong_arguments_are_one_line(call_program, run, arguments, named):
    assert named in complaint(call_program("train", run, *arguments))


def test_a_mesh_that_does_not_fit_is_one_line(call_program, make_run, cpus_instead):
    run = make_run(model=MODEL, train=TRAIN | {"mesh": {"data": 2, "fsdp": 2}})
    line = complaint(call_program("train", run, "--check", "--device", "h100", "--devices", "3"))
    assert "mesh: data=2 and fsdp=2 do not fit the 3 devices" in line


@pytest.mark.parametrize(("mesh", "devices"), [({}, 1), ({"fsdp": 4}, 4), ({"data": 2, "fsdp": 2}, 4)])
def test_there_are_as_many_devices_as_the_mesh_names(call_program, make_run, no_compiler, mesh, devices):
    run = make_run(model=MODEL, train=TRAIN | {"mesh": mesh})
    finished = call_program("train", run, "--check", "--device", "a100-40")
    assert finished.returncode == 0, finished.stderr
    assert (f"mesh    {devices} devices" in finished.stdout) == (devices > 1)
    assert f"step    {devices * SEQUENCES * MICROBATCHES * LENGTH:,} tokens" in finished.stdout
    assert target.elsewhere() is None  # afterwards


def test_a_step_that_does_not_fit_is_an_error_after_its_account(call_program, make_run, no_compiler):
    run = make_run(model=MODEL, train=TRAIN | {"microbatch_size": 20})
    finished = call_program("train", run, "--check", "--device", "l4")
    assert "--device l4: the step needs 20.00 GiB, JAX takes 16.52 GiB of such a card" in complaint(finished)
    assert "bound " in finished.stdout


def test_the_account_is_that_of_a_global_step_in_all_its_calls(call_program, make_run, no_compiler):
    run = make_run(model=MODEL, train=TRAIN | {"microbatches_per_call": 1, "mesh": {"data": 2}})
    lines = call_program("train", run, "--check", "--device", "l4").stdout.splitlines()
    assert "kernels 3 a step: 0.0 GB moved, 0.00 TFLOP in products" in lines
    [sent] = [line for line in lines if line.startswith("sent")]
    assert sent.startswith("sent    all-reduce: 3 a step") and sent.endswith("0% of it beside other kernels")


def test_jax_takes_the_share_of_the_memory_that_it_is_told(run, cpus_instead, monkeypatch):
    for share, told in ((0.75, None), (0.9, "0.9")):
        if told:
            monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", told)
        with absent_gpu.compiling_for("h100", 1) as card:
            assert memory.bytes_available() == share * card.memory_bytes


def test_the_microbatch_is_found_for_the_card_s_memory(call_program, make_run, no_compiler, monkeypatch):
    run = make_run(model=MODEL, train=TRAIN | {"gradient_accumulation_steps": 16})
    arguments = ("train", run, "--find-microbatch", "--device", "l4")
    assert call_program(*arguments).stdout.splitlines()[-3:] == [
        "microbatch_size 16: 16.00 GiB of 16.52 GiB",
        "microbatch_size 32: 32.00 GiB of 16.52 GiB",
        '2,048 tokens a step: "microbatch_size": 16, "gradient_accumulation_steps": 2',
    ]
    monkeypatch.setitem(CARDS, "l4", CARDS["l4"]._replace(memory_bytes=1000))
    assert "not even microbatch_size 1 fits" in complaint(call_program(*arguments))


def test_what_the_compiler_refuses_is_one_line(call_program, run, cpus_instead, monkeypatch):
    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such option\nat line 3")

    monkeypatch.setattr(memory, "compile_for_shapes", refuse)
    line = complaint(call_program("train", run, "--check", "--device", "b200"))
    assert line.endswith("--device b200: XLA refuses to compile the step: INVALID_ARGUMENT: no such option")
    monkeypatch.setattr(absent_gpu.topologies, "get_topology_desc", refuse)
    line = complaint(call_program("train", run, "--check", "--device", "b200"))
    assert line.endswith("--device b200: XLA does not know such a card: INVALID_ARGUMENT: no such option")


def test_a_card_has_the_peaks_of_its_data_sheet():
    assert {name: (card.peak.bfloat16, card.architecture.capability) for name, card in CARDS.items()} == {
        "h100": (989.5, (9, 0)),
        "h200": (989.5, (9, 0)),
        "a100-40": (312, (8, 0)),
        "a100-80": (312, (8, 0)),
        "b200": (2250, (10, 0)),
        "l40s": (362, (8, 9)),
        "l4": (121, (8, 9)),
        "rtx-4090": (165.2, (8, 9)),
        "rtx-3090": (71, (8, 6)),
    }
