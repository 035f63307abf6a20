"""Whether a training step fits the device's memory, by XLA's count."""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from model import GPTModel, model_of
from outside_in.config import ModelConfig, TrainConfig, tokens_per_global_step
from outside_in.data.loader import BATCH_SPECS, Batch
from outside_in.diagnostics.preflight import GIB
from outside_in.optimizer import make_optimizer
from outside_in.runtime.cli import is_out_of_device_memory
from outside_in.runtime.devices import bytes_available, initialize_devices
from outside_in.runtime.log import log
from outside_in.runtime.mesh import array_shardings, make_mesh
from outside_in.storage.run_directory import RunDirectory
from outside_in.train_step import Compiled, compile_train_step

MAX_DOUBLINGS = 6


def check(step: Compiled, model_config: ModelConfig, config: TrainConfig) -> None:
    """Log the memory that a compiled step needs. Raises ValueError, with what would fit, when the device has less."""
    if step.bytes_needed > bytes_available():
        raise ValueError(advice(model_config, config))
    log.info(f"memory  the compiled step needs {gib(step.bytes_needed)} of the device's {gib(bytes_available())}")


def find_microbatch(_run: RunDirectory, model_config: ModelConfig, config: TrainConfig) -> None:
    """Print the memory that each `microbatch_size` needs: `--find-microbatch`."""
    log.info(initialize_devices())
    print(*report(model_config, config), sep="\n")


def report(model_config: ModelConfig, config: TrainConfig) -> list[str]:
    """Return a line per `microbatch_size` tried, and JSON for the largest. Raises ValueError when none fits."""
    found, needs = largest_microbatch(model_config, config)
    if found is None:
        raise ValueError("not even microbatch_size 1 fits: use a smaller model or a shorter context_length")
    larger = found if found.gradient_accumulation_steps > 1 else larger_microbatch(model_config, found, needs)
    tried = [f"microbatch_size {size:,}: {gib(needs[size])} of {gib(bytes_available())}" for size in sorted(needs)]
    configs = [found] if larger == found else [found, larger]
    devices = make_mesh(config.mesh).devices.size
    sizes = [f"{tokens_per_global_step(model_config, x, devices):,} tokens a step: {as_json(x)}" for x in configs]
    return [*tried, *sizes]


def larger_microbatch(model_config: ModelConfig, config: TrainConfig, needs: dict[int, float]) -> TrainConfig:
    """Double `microbatch_size`, and the tokens per global step with it, as long as it fits; at most 6 times.

    `config` is one that fits. What each size needs is added to `needs`.
    """
    for _ in range(MAX_DOUBLINGS):
        doubled = config.model_copy(update={"microbatch_size": 2 * config.microbatch_size})
        needs[doubled.microbatch_size] = bytes_needed(model_config, doubled)
        if needs[doubled.microbatch_size] > bytes_available():
            break
        config = doubled
    return config


def advice(model_config: ModelConfig, config: TrainConfig, message: str = "") -> str:
    """Return an error message with the largest `microbatch_size` that fits.

    The tokens per global step stay the same. `message` is XLA's, if XLA ran out of memory.
    """
    found, needs = largest_microbatch(model_config, config, config.microbatch_size)
    line = f"out of memory: a step needs {gib(needs[config.microbatch_size])}, the device has {gib(bytes_available())}"
    if found is None:
        return f"{line}; not even microbatch_size 1 fits, which needs {gib(needs[1])}: use a smaller model"
    if found == config:
        return f"{line}, which fits; is another program using it? XLA's message: {' '.join(message.split())[:200]}"
    return f"{line}; the largest that fits, at the same tokens per step, is {as_json(found)}"


def largest_microbatch(
    model_config: ModelConfig, config: TrainConfig, limit: int | None = None
) -> tuple[TrainConfig | None, dict[int, float]]:
    """Find the largest `microbatch_size` (up to `limit`) whose step fits.

    The tokens per global step stay the same. Compiles for shapes alone, the largest first. Returns the config with it
    (None: nothing fits), and the bytes that each size tried needs: infinity where compiling itself took too much.
    """
    sequences = config.microbatch_size * config.gradient_accumulation_steps
    needs: dict[int, float] = {}
    for size in range(limit or sequences, 0, -1):
        if sequences % size == 0:
            smaller = with_microbatch(config, size)
            needs[size] = bytes_needed(model_config, smaller)
            if needs[size] <= bytes_available():
                return smaller, needs
    return None, needs


def as_json(config: TrainConfig) -> str:
    """Return the keys of `train.json` that divide a global step."""
    keys = ["microbatch_size", "gradient_accumulation_steps"]
    if config.microbatches_per_call:
        keys.append("microbatches_per_call")
    return ", ".join(f'"{key}": {getattr(config, key)}' for key in keys)


def gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if math.isfinite(count) else "an unknown amount"


def with_microbatch(config: TrainConfig, size: int) -> TrainConfig:
    """Return the config with another `microbatch_size`, sequences per global step unchanged."""
    accumulated = config.microbatch_size * config.gradient_accumulation_steps // size
    per_call = config.microbatches_per_call and math.gcd(config.microbatches_per_call, accumulated)
    changes = {"gradient_accumulation_steps": accumulated, "microbatches_per_call": per_call}
    return config.model_copy(update={"microbatch_size": size} | changes)


def bytes_needed(model_config: ModelConfig, config: TrainConfig) -> float:
    """Compile a run's training step; return the device memory that it needs.

    Infinity when compiling itself, which tries products out on a GPU, runs out of memory.
    """
    try:
        return compile_for_shapes(model_config, config).bytes_needed
    except Exception as error:
        if is_out_of_device_memory(error):
            return math.inf
        raise


def compile_for_shapes(model_config: ModelConfig, config: TrainConfig) -> Compiled:
    """Compile a run's training step without a single array. The run need not exist."""

    def build() -> tuple[GPTModel, nnx.Optimizer]:
        model = model_of(model_config, config)
        return model, make_optimizer(model, config.model_copy(update={"warmup_tokens": None}), total_steps=1)

    mesh = make_mesh(config.mesh)
    model, optimizer = nnx.eval_shape(build)
    for module in (model, optimizer):
        state = nnx.state(module)
        nnx.update(module, jax.tree.map(_abstract, state, array_shardings(state, mesh)))
    per_call = config.gradient_accumulation_steps // config.calls_per_step
    sequences = config.microbatch_size * mesh.devices.size
    tokens = jax.ShapeDtypeStruct((per_call, sequences, model_config.context_length), np.uint16)
    batch = Batch(tokens, tokens, jax.ShapeDtypeStruct((2,), np.uint32))
    batch = jax.tree.map(lambda x, spec: _abstract(x, NamedSharding(mesh, spec)), batch, BATCH_SPECS)
    key: Any = _abstract(jax.eval_shape(lambda: jax.random.key(0)), NamedSharding(mesh, PartitionSpec()))
    return compile_train_step(model, optimizer, batch, key, config, mesh)


def _abstract(array: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
