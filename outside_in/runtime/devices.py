"""Starts JAX's devices, and keeps a CPU's freed memory."""

import ctypes
import logging
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import jax

from outside_in.runtime import target
from outside_in.runtime.compilation_cache import enable_compilation_cache
from outside_in.runtime.machine import memory_bytes

NVIDIA = Path("/dev/nvidiactl")  # there where a driver is
M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD = -8, -4, -1  # of glibc's mallopt(3)


def initialize_devices() -> str:
    """Start JAX and return a line that names the device.

    What is compiled from now on is cached. JAX's CUDA plugin logs a traceback where there is no NVIDIA driver; the
    returned line replaces it.
    """
    enable_compilation_cache()
    if target.elsewhere():
        return f"compiling for {target.devices()[0].device_kind}, which need not be here"
    messages: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return "xla_cuda" not in record.getMessage()

    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(keep)
    if not NVIDIA.exists():
        keep_freed_memory()
    check_environment()
    try:
        devices = jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # the second without a message
        if not (wanted := os.environ.get("JAX_PLATFORMS")):
            raise
        raise ValueError(
            f"JAX_PLATFORMS={wanted}: JAX cannot use such devices here ({str(error)[:200] or 'not installed'}); unset "
            "it, or install what they need (CUDA's wheels come with uv's group cuda)"
        ) from None
    finally:
        logger.removeFilter(keep)
    device = devices[0]
    if device.platform == "cpu":
        no_driver = any("cuda" in line for line in messages)
        return "running on the CPU" + (" (no usable NVIDIA GPU or driver was found)" if no_driver else "")
    return f"running on {device.device_kind}"


def check_environment() -> None:
    """Raise ValueError when an environment variable makes JAX compute otherwise than training expects."""
    options: Any = jax.config  # their names are defined as JAX starts
    if options.jax_enable_x64:
        raise ValueError("JAX_ENABLE_X64: training is in 32 bits, and its checkpoints too; unset this variable")
    if options.jax_disable_jit:
        raise ValueError("JAX_DISABLE_JIT: training needs compiled steps; unset this variable")


def device_kind() -> str:
    """Return JAX's name of the device, such as "NVIDIA H200" or "cpu"."""
    return jax.local_devices()[0].device_kind


def bytes_available() -> float:
    """Return the memory that JAX may use on the device.

    On a CPU that is the machine's; infinity when the device does not report it.
    """
    if there := target.elsewhere():
        return there.memory_bytes
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return memory_bytes()
    return (device.memory_stats() or {}).get("bytes_limit", math.inf)


def peak_memory_bytes() -> int:
    """Return the most memory that the first device has had in use; on a CPU, that this process has."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return statistics.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compiler_options() -> dict[str, bool]:
    """Return XLA's options for compiled steps on this device.

    On a GPU all products are cuBLAS's, which also adds biases and residuals and computes GELU: 3% faster than Triton's
    and separate kernels for those (docs/experiments.md). XLA_FLAGS may say otherwise.
    """
    option = "xla_gpu_enable_triton_gemm"
    chosen = option in os.environ.get("XLA_FLAGS", "")
    return {option: False} if target.platform() == "gpu" and not chosen else {}


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step on the CPU frees.

    A step takes a hundred megabytes and more, and touching fresh pages costs an eighth of its time. Works before JAX
    starts its threads: each would get an arena of its own, and glibc gives large buffers of those back at once.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries do not have it
    if mallopt:
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> None:
    """Return the memory that glibc keeps to the system. Compiling leaves hundreds of megabytes in small pieces."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim:
        malloc_trim(0)
