import jax
import pytest

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
