"""Operations per token against the published figures, and the device table."""

import pytest

from outside_in.config import ModelConfig
from outside_in.reports.flops import describe_peak, flops_per_token, mfu, peak_tflops

SMALL = ModelConfig(vocab_size=50257, context_length=1024, emb_dim=768, n_heads=12, n_layers=12, qkv_bias=False)


@pytest.mark.parametrize("tied", [False, True])
def test_gpt2_small_takes_855_million_operations_a_token(tied: bool) -> None:
    assert flops_per_token(SMALL.model_copy(update={"tied_head": tied})) == pytest.approx(855e6, rel=1e-3)


def test_a_shell_takes_its_head_alone() -> None:
    assert flops_per_token(SMALL.model_copy(update={"n_layers": 0})) == 6 * 768 * 50257


def test_a_model_without_feed_forward_takes_less() -> None:
    without = SMALL.model_copy(update={"feed_forward": False})
    assert flops_per_token(SMALL) - flops_per_token(without) == 6 * 12 * 8 * 768**2


@pytest.mark.parametrize(
    ("kind", "bfloat16"),
    [
        ("NVIDIA H200", 989.5),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("cpu", None),
        ("NVIDIA of tomorrow", None),
    ],
)
def test_a_device_is_known_by_its_name_whatever_its_memory(kind: str, bfloat16: float | None) -> None:
    assert peak_tflops(kind, "bfloat16") == bfloat16


def test_the_share_of_the_peak_is_that_of_the_formula_where_the_peak_is_known() -> None:
    assert mfu(636_000, SMALL, "NVIDIA H200", "bfloat16") == pytest.approx(0.549, abs=5e-4)
    assert mfu(1_300, SMALL, "cpu", "float32") is None


def test_a_peak_is_told_with_its_source_and_an_unknown_one_as_such() -> None:
    known = "989.5 TFLOP/s in bfloat16, by https://www.nvidia.com/en-us/data-center/h200/"
    assert describe_peak("NVIDIA H200", "bfloat16") == f"peak    {known}"
    assert describe_peak("cpu", "float32").startswith("peak    unknown for this device (cpu)")
