from types import SimpleNamespace

import jax
import pytest

from outside_in.runtime import target
from outside_in.runtime.devices import compiler_options


@pytest.mark.parametrize(
    ("platform", "flags", "options"),
    [
        ("cpu", "", {}),
        ("gpu", "", {"xla_gpu_enable_triton_gemm": False}),
        ("gpu", "--xla_gpu_autotune_level=4", {"xla_gpu_enable_triton_gemm": False}),
        ("gpu", "--xla_gpu_autotune_level=4 --xla_gpu_enable_triton_gemm=true", {}),
    ],
)
def test_a_gpu_multiplies_with_cublas_unless_told_otherwise(monkeypatch, platform, flags, options):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert compiler_options() == options


def test_an_absent_gpu_decides_what_is_compiled(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with target.compiling_for(target.Target([SimpleNamespace(platform="gpu")], 1e9)):
        assert target.platform() == "gpu" and len(target.devices()) == 1
        assert compiler_options() == {"xla_gpu_enable_triton_gemm": False}
    assert target.platform() == "cpu" and target.devices() == jax.devices()
