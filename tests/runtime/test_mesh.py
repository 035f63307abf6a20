import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from helpers import ROOT

from outside_in.config import MeshConfig
from outside_in.runtime.devices import initialize_devices
from outside_in.runtime.mesh import array_spec, describe_mesh, make_mesh

BROKEN_PLUGIN = """
def initialize():
    raise RuntimeError("no driver\\nand more lines")
"""


def describe_in_a_process(search_path=None, **environment):
    inherited = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "PYTHONPATH")}
    environment = inherited | ({"PYTHONPATH": str(search_path)} if search_path else {}) | environment
    command = [
        sys.executable,
        "-c",
        "from outside_in.runtime.devices import initialize_devices; print(initialize_devices())",
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def broken_plugin(folder, name):
    package = folder / "jax_plugins" / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(BROKEN_PLUGIN)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="describes a machine without a GPU")
def test_a_cuda_plugin_without_a_driver_is_one_line_and_no_traceback(tmp_path):
    broken_plugin(tmp_path, "xla_cuda12_fake")
    done = describe_in_a_process(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "running on the CPU (no usable NVIDIA GPU or driver was found)\n"
    # the fake is noticed: without our filter JAX does log a traceback
    bare = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": ""}
    assert "Traceback" in subprocess.run(bare, env=environment, capture_output=True, text=True, timeout=120).stderr


def test_a_machine_that_is_asked_for_its_cpu_says_so_in_one_line():
    done = describe_in_a_process(JAX_PLATFORMS="cpu")
    assert (done.returncode, done.stdout, done.stderr) == (0, "running on the CPU\n", "")


def test_gpus_are_named(monkeypatch):
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu] * 4)
    assert initialize_devices() == "running on NVIDIA H200"


def test_other_log_lines_pass_and_nothing_is_filtered_afterwards(monkeypatch, caplog):
    logger = logging.getLogger("jax._src.xla_bridge")
    devices = jax.local_devices()

    def start():
        logger.error("Jax plugin configuration error: Exception when calling jax_plugins.xla_cuda12.initialize()")
        logger.warning("something else is wrong")
        return devices

    monkeypatch.setattr(jax, "local_devices", start)
    filters = list(logger.filters)
    initialize_devices()
    assert [record.getMessage() for record in caplog.records] == ["something else is wrong"]
    assert logger.filters == filters


def test_a_backend_that_does_not_start_is_an_error_and_leaves_no_filter(monkeypatch):
    def fail():
        raise RuntimeError("no backend")

    monkeypatch.setattr(jax, "local_devices", fail)
    filters = list(logging.getLogger("jax._src.xla_bridge").filters)
    with pytest.raises(RuntimeError, match="no backend"):
        initialize_devices()
    assert logging.getLogger("jax._src.xla_bridge").filters == filters


@pytest.mark.parametrize(
    ("wanted", "shape"),
    [
        ({}, (8, 1)),
        ({"fsdp": 8}, (1, 8)),
        ({"data": 2, "fsdp": 4}, (2, 4)),
        ({"fsdp": 2}, (4, 2)),
        ({"data": 1}, (1, 1)),
    ],
    ids=str,
)
def test_a_mesh_takes_the_devices_that_it_names_and_minus_1_the_rest(wanted, shape):
    mesh = make_mesh(MeshConfig(**wanted))
    assert mesh.devices.shape == shape and mesh.axis_names == ("data", "fsdp")


@pytest.mark.parametrize("wanted", [{"fsdp": 3}, {"data": 9}, {"data": 3, "fsdp": 3}, {"fsdp": 16}], ids=str)
def test_a_mesh_that_does_not_fit_says_which_do(wanted):
    with pytest.raises(ValueError, match=r"do not fit the 8 devices here \(divisors: 1, 2, 4, 8\)"):
        make_mesh(MeshConfig(**wanted))


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((50257, 768), (None, "fsdp")),  # 50,257 is a prime
        ((768, 2304), (None, "fsdp")),
        ((3072, 768), ("fsdp",)),
        ((4096,), ("fsdp",)),
        ((768,), ()),  # small
        ((), ()),
        ((2049, 3), ()),  # not divisible
    ],
    ids=str,
)
def test_the_largest_divisible_axis_is_spread_and_small_arrays_are_whole(shape, spec):
    assert tuple(array_spec(shape, make_mesh(MeshConfig(data=2, fsdp=4)))) == spec
    assert tuple(array_spec(shape, make_mesh(MeshConfig(data=8)))) == ()


def test_it_is_said_what_became_of_each_array():
    shapes = {"head.embedding": (50257, 768), "output_norm.scale": (768,)}
    assert describe_mesh(shapes, make_mesh(MeshConfig(data=2, fsdp=2))) == [
        "mesh    4 devices: data 2 × fsdp 2; 4 more are not used",
        "        head.embedding [50257, 768]: axis 1 over fsdp",
        "        output_norm.scale [768]: whole on every device",
    ]
    assert describe_mesh(shapes, make_mesh(MeshConfig())) == ["mesh    8 devices: data 8 × fsdp 1"]
