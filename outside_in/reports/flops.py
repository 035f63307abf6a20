"""Training FLOPs, and their share of a device's peak (MFU).

MFU is the model FLOPs utilization of "PaLM", appendix B, https://arxiv.org/abs/2204.02311: operations that the model's
definition asks for, whatever is computed twice or skipped, divided by what the device could do at its best.
"""

import re
from typing import NamedTuple

from outside_in.config import ModelConfig

FORMULA = "6 · (parameters of matrix products) + 12 · layers · width · context"
MEMORY = (
    r"([- ](SXM\d?|PCI[Ee]|\d+GB?|HBM\w+))*"  # the slot, and the memory: a laptop's or a slice of a card is another
)
OF_WINDOWS = ", or the window where a layer has one"  # after it


class Peak(NamedTuple):
    """A device's peak in dense matrix products, in TFLOP/s.

    Sums are in float32; the figures are from NVIDIA's data sheets.
    """

    bfloat16: float
    float32: float  # as TF32, which is what JAX takes for float32 products on these cards
    source: str


# By JAX's `device_kind`, which may go on with MEMORY. Data sheets give figures with sparsity: halved.
PEAKS = {
    "NVIDIA B200": Peak(2250, 1100, "https://resources.nvidia.com/en-us-blackwell-architecture"),
    "NVIDIA GH200": Peak(989.5, 494.5, "https://resources.nvidia.com/en-us-grace-cpu/grace-hopper-superchip"),
    "NVIDIA H200 NVL": Peak(835.5, 417.5, "https://www.nvidia.com/en-us/data-center/h200/"),
    "NVIDIA H200": Peak(989.5, 494.5, "https://www.nvidia.com/en-us/data-center/h200/"),
    "NVIDIA H100 PCIe": Peak(756, 378, "https://www.nvidia.com/en-us/data-center/h100/"),
    "NVIDIA H100 NVL": Peak(835.5, 417.5, "https://www.nvidia.com/en-us/data-center/h100/"),
    "NVIDIA H100": Peak(989.5, 494.5, "https://www.nvidia.com/en-us/data-center/h100/"),
    "NVIDIA A100": Peak(312, 156, "https://www.nvidia.com/en-us/data-center/a100/"),
    "NVIDIA L40S": Peak(362, 183, "https://www.nvidia.com/en-us/data-center/l40s/"),
    "NVIDIA L40": Peak(181, 90.5, "https://www.nvidia.com/en-us/data-center/l40/"),
    "NVIDIA L4": Peak(121, 60, "https://www.nvidia.com/en-us/data-center/l4/"),
    "NVIDIA GeForce RTX 4090": Peak(165.2, 82.6, "NVIDIA Ada GPU Architecture, appendix A"),
    "NVIDIA GeForce RTX 3090": Peak(71, 35.6, "NVIDIA Ampere GA102 GPU Architecture, table 2 and appendix A"),
}


def flops_per_token(model: ModelConfig) -> int:
    """Count the operations of training on one token, by `formula`.

    Every parameter of a matrix product is used once forward and twice backward, with a multiplication and an addition.
    Biases, norms and embedding lookups are left out; the output head counts, tied or not. Attention is counted as if
    every position saw the whole context, or a whole window: the convention of nanoGPT and of PaLM, which flatters a
    causal model's MFU.
    """
    width, kv_width = model.emb_dim, model.num_kv_heads * model.head_width
    of_attention = width * (2 * width + 2 * kv_width)  # queries and output, keys and values
    of_feed_forward = (3 if model.activation == "swiglu" else 2) * width * model.inner_width
    products = model.n_layers * (of_attention + of_feed_forward) + model.vocab_size * width
    seen = (min(model.window(i) or model.context_length, model.context_length) for i in range(model.n_layers))
    return 6 * products + 12 * width * sum(seen)


def formula(model: ModelConfig) -> str:
    """Say how `flops_per_token` counts."""
    return FORMULA if model.sliding_window is None else FORMULA + OF_WINDOWS


def peak_tflops(device_kind: str, precision: str) -> float | None:
    """Return a device's peak in TFLOP/s; None if it is unknown."""
    peak = find_peak(device_kind)
    return getattr(peak, precision) if peak else None


def find_peak(device_kind: str) -> Peak | None:
    return next((peak for name, peak in PEAKS.items() if re.fullmatch(re.escape(name) + MEMORY, device_kind)), None)


def describe_peak(device_kind: str, precision: str) -> str:
    """Return a line with MFU's peak and its source."""
    peak = find_peak(device_kind)
    if peak is None:
        return f"peak    unknown for this device ({device_kind}), so no MFU is shown"
    return f"peak    {getattr(peak, precision):g} TFLOP/s in {precision}, by {peak.source}"


def mfu(tokens_per_second: float, model: ModelConfig, device_kind: str, precision: str) -> float | None:
    """Return the share of the device's peak; None if that is unknown."""
    peak = peak_tflops(device_kind, precision)
    return tokens_per_second * flops_per_token(model) / 1e12 / peak if peak else None
