"""The devices: which ones there are, and a quiet start on machines without a GPU."""

import logging

import jax


def describe_devices() -> str:
    """Start JAX's backend and say in one line what the program runs on.

    JAX's CUDA plugin logs a traceback where there is no NVIDIA driver; the line that this returns replaces it.
    """
    complaints: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        complaints.append(record.getMessage())
        return "xla_cuda" not in record.getMessage()

    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(keep)
    try:
        devices = jax.local_devices()
    finally:
        logger.removeFilter(keep)
    device = devices[0]
    if device.platform == "cpu":
        no_driver = any("cuda" in line for line in complaints)
        return "running on the CPU" + (" (no usable NVIDIA GPU or driver was found)" if no_driver else "")
    unused = f"; {len(devices) - 1} more are not used" if len(devices) > 1 else ""
    return f"running on {device.device_kind}{unused}"
