import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from conftest import ROOT

from mesh import describe_devices

BROKEN_PLUGIN = """
def initialize():
    raise RuntimeError("no driver\\nand more lines")
"""


def describe_in_a_process(search_path=None, **environment):
    inherited = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "PYTHONPATH")}
    environment = inherited | ({"PYTHONPATH": str(search_path)} if search_path else {}) | environment
    command = [sys.executable, "-c", "from mesh import describe_devices; print(describe_devices())"]
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


@pytest.mark.parametrize(
    ("count", "line"), [(1, "running on NVIDIA H200"), (4, "running on NVIDIA H200; 3 more are not used")]
)
def test_gpus_are_named_and_idle_ones_counted(monkeypatch, count, line):
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu] * count)
    assert describe_devices() == line


def test_other_log_lines_pass_and_nothing_is_filtered_afterwards(monkeypatch, caplog):
    logger = logging.getLogger("jax._src.xla_bridge")
    devices = jax.local_devices()

    def start():
        logger.error("Jax plugin configuration error: Exception when calling jax_plugins.xla_cuda12.initialize()")
        logger.warning("something else is wrong")
        return devices

    monkeypatch.setattr(jax, "local_devices", start)
    filters = list(logger.filters)
    describe_devices()
    assert [record.getMessage() for record in caplog.records] == ["something else is wrong"]
    assert logger.filters == filters


def test_a_backend_that_does_not_start_is_an_error_and_leaves_no_filter(monkeypatch):
    def fail():
        raise RuntimeError("no backend")

    monkeypatch.setattr(jax, "local_devices", fail)
    filters = list(logging.getLogger("jax._src.xla_bridge").filters)
    with pytest.raises(RuntimeError, match="no backend"):
        describe_devices()
    assert logging.getLogger("jax._src.xla_bridge").filters == filters
