"""Does it fit? What the training step needs by XLA's own account, against what the device has."""

import bisect
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from config import MEMORY_BYTES, ModelConfig, TrainConfig
from data import Batch
from model import GPTModel
from optimizer import make_optimizer
from steps import Compiled, compile_train_step

GIB = 2**30


def bytes_available() -> int:
    """Return how much memory JAX may use on the device; on a CPU that is the machine's."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", MEMORY_BYTES)


def check(step: Compiled, model_config: ModelConfig, config: TrainConfig) -> str:
    """Say what a compiled step needs; raises ValueError, with what would fit, when the device does not have it."""
    needed, available = step.bytes_needed, bytes_available()
    if needed > available:
        raise ValueError(advice(model_config, config, needed))
    return f"memory  the compiled step needs {needed / GIB:.2f} GiB of the device's {available / GIB:.1f}"


def advice(model_config: ModelConfig, config: TrainConfig, needed: int | None = None) -> str:
    """Say that a run does not fit, and the largest `microbatch_size` that does at the same tokens per global step."""
    found, needs = largest_microbatch(model_config, config, config.microbatch_size)
    needed = needs[config.microbatch_size] if needed is None else needed
    line = f"out of memory: a step needs {needed / GIB:.2f} GiB, the device has {bytes_available() / GIB:.2f}"
    if found is None:
        return f"{line}; not even microbatch_size 1 fits, which needs {needs[1] / GIB:.2f}: use a smaller model"
    if found == config:
        return f"{line}, so it should fit: does another program use the device?"
    return (
        f"{line}; the largest that fits is microbatch_size {found.microbatch_size} with "
        f"gradient_accumulation_steps {found.gradient_accumulation_steps}, the same tokens per step"
    )


def largest_microbatch(
    model_config: ModelConfig, config: TrainConfig, limit: int | None = None
) -> tuple[TrainConfig | None, dict[int, int]]:
    """Find the largest `microbatch_size` (up to `limit`) whose step fits, at the same tokens per global step.

    Compiles for shapes alone, so that nothing can run out of memory. Returns the config with it (None: nothing fits),
    and the bytes that each size needs which was tried.
    """
    sequences = config.microbatch_size * config.gradient_accumulation_steps
    sizes = [size for size in range(1, (limit or sequences) + 1) if sequences % size == 0]
    available, needs = bytes_available(), {}

    def is_too_large(size: int) -> bool:
        needs[size] = bytes_needed(model_config, with_microbatch(config, size))
        return needs[size] > available

    count = bisect.bisect_left(sizes, True, key=is_too_large)
    for size in sizes[:1] + sizes[-1:]:
        if size not in needs:
            is_too_large(size)
    return (with_microbatch(config, sizes[count - 1]) if count else None), needs


def with_microbatch(config: TrainConfig, size: int) -> TrainConfig:
    """Return the config with another `microbatch_size` and the same sequences per global step."""
    accumulated = config.microbatch_size * config.gradient_accumulation_steps // size
    per_call = config.microbatches_per_call and math.gcd(config.microbatches_per_call, accumulated)
    changes = {"gradient_accumulation_steps": accumulated, "microbatches_per_call": per_call}
    return config.model_copy(update={"microbatch_size": size} | changes)


def bytes_needed(model_config: ModelConfig, config: TrainConfig) -> int:
    """Compile the training step of a run that need not exist, and return what the device must hold while it runs."""

    def build() -> tuple[GPTModel, nnx.Optimizer]:
        model = GPTModel(model_config, nnx.Rngs(0), drop_rate=config.drop_rate, dtype=jnp.dtype(config.precision))
        return model, make_optimizer(model, config, total_steps=1)

    model, optimizer = nnx.eval_shape(build)
    calls = config.gradient_accumulation_steps // config.calls_per_step
    tokens = jax.ShapeDtypeStruct((calls, config.microbatch_size, model_config.context_length), np.uint16)
    batch = Batch(tokens, tokens, jax.ShapeDtypeStruct((2,), np.uint32))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return compile_train_step(model, optimizer, batch, key, config).bytes_needed
