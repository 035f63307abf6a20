"""NVIDIA cards: what a program can be compiled for without one, and how fast each can be at its best.

Multiprocessors, clocks, caches and memory: XLA's public descriptions (openxla/xla, folder
xla/backends/gpu/target_config/specs) for H100, H200, A100 and B200. For the others: NVIDIA's "Ada GPU Architecture" and
"Ampere GA102 GPU Architecture", and the memory that CUDA reports on them. Bandwidths: NVIDIA's data sheets. Peaks of
matrix products: `flops.PEAKS`.
"""

from typing import NamedTuple

from outside_in.reports.flops import Peak, find_peak

GIB = 2**30
KIB = 2**10
# JAX reads these when it is imported: it shall look for no GPU, nor ask one whether the CUDA wheels suit it.
COMPILE_ONLY = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}


class Architecture(NamedTuple):
    """What the multiprocessors of a compute capability have."""

    capability: tuple[int, int]
    shared_kib: int  # of memory, each; a block may have all but one
    threads: int
    float32_units: int
    accelerated: bool = False  # features of this capability alone, such as "sm_90a"


AMPERE = Architecture((8, 0), 164, 2048, 64)
AMPERE_GA102 = Architecture((8, 6), 100, 1536, 128)
ADA = Architecture((8, 9), 100, 1536, 128)
HOPPER = Architecture((9, 0), 228, 2048, 128, accelerated=True)
BLACKWELL = Architecture((10, 0), 228, 2048, 128, accelerated=True)


class Card(NamedTuple):
    device_kind: str  # as JAX names it
    architecture: Architecture
    multiprocessors: int
    clock_ghz: float  # at most
    l2_mib: float
    memory_bytes: int  # that CUDA reports
    bandwidth: float  # bytes/s
    link: float  # bytes/s that a card can send to others of its machine: NVLink, or PCIe 4.0

    @property
    def peak(self) -> Peak:
        """Return its peak in dense matrix products."""
        peak = find_peak(self.device_kind)
        assert peak is not None, self.device_kind
        return peak

    @property
    def target_config(self) -> str:
        """Return XLA's `GpuTargetConfigProto` of the card, as text."""
        (major, minor), shared = self.architecture.capability, self.architecture.shared_kib * KIB
        features = "feature_extension: ACCELERATED_FEATURES" if self.architecture.accelerated else ""
        return f"""
gpu_device_info {{
  name: "{self.device_kind}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
  platform_version: "Compute Capability {major}.{minor}{"a" if features else ""}"
  core_count: {self.multiprocessors}
  fpus_per_core: {self.architecture.float32_units}
  clock_rate_ghz: {self.clock_ghz}
  memory_bandwidth: {self.bandwidth:.0f}
  device_memory_size: {self.memory_bytes}
  l2_cache_size: {self.l2_mib * KIB * KIB:.0f}
  shared_memory_per_core: {shared}
  shared_memory_per_block: {48 * KIB}
  shared_memory_per_block_optin: {shared - KIB}
  threads_per_core_limit: {self.architecture.threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.device_kind}"
"""


CARDS = {
    "h100": Card("NVIDIA H100 80GB HBM3", HOPPER, 132, 1.98, 50, 84_942_979_072, 3.35e12, 450e9),
    "h200": Card("NVIDIA H200", HOPPER, 132, 1.98, 50, 151_397_597_184, 4.8e12, 450e9),
    "a100-40": Card("NVIDIA A100-SXM4-40GB", AMPERE, 108, 1.41, 40, 42_331_013_120, 1.555e12, 300e9),
    "a100-80": Card("NVIDIA A100-SXM4-80GB", AMPERE, 108, 1.41, 40, 85_100_068_864, 2.039e12, 300e9),
    "b200": Card("NVIDIA B200", BLACKWELL, 148, 1.965, 126.5, 191_514_411_008, 8e12, 900e9),
    "l40s": Card("NVIDIA L40S", ADA, 142, 2.52, 96, int(44.39 * GIB), 864e9, 32e9),
    "l4": Card("NVIDIA L4", ADA, 58, 2.04, 48, int(22.03 * GIB), 300e9, 32e9),
    "rtx-4090": Card("NVIDIA GeForce RTX 4090", ADA, 128, 2.52, 72, int(23.64 * GIB), 1.008e12, 32e9),
    "rtx-3090": Card("NVIDIA GeForce RTX 3090", AMPERE_GA102, 82, 1.695, 6, int(23.68 * GIB), 936e9, 32e9),
}
