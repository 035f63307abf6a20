"""The rules that turn gradients into updates: AdamW, Muon, Lion, Adafactor. All are optax's."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from outside_in.config import TrainConfig
from outside_in.config_files import MAX_COUNT
from outside_in.storage.text import counted

MATRIX_NDIM = 2  # matrices and tables have so many axes, or more; biases and norms have one
BLOCKS = "blocks"  # the part of a parameter's name that says that it is a block's


def adamw(config: TrainConfig, learning_rate: Any) -> optax.GradientTransformation:
    """Return AdamW: https://arxiv.org/abs/1711.05101."""
    moments = {"b1": config.beta1, "b2": config.beta2, "eps": config.epsilon}
    return optax.adamw(learning_rate, **moments, weight_decay=config.weight_decay, mask=_decays(config))


def muon(config: TrainConfig, learning_rate: Any) -> optax.GradientTransformation:
    """Return Muon for the matrices of blocks, and AdamW for all else: https://kellerjordan.github.io/posts/muon.

    Muon makes the momentum of a matrix (nearly) orthogonal, and scales it by √max(1, outputs / inputs).
    """
    ratio = (config.muon_learning_rate or config.learning_rate) / config.learning_rate
    rules: Any = {
        "muon": contrib.muon(learning_rate * ratio, weight_decay=config.weight_decay),
        "adamw": adamw(config, learning_rate),
    }
    labels: Any = partial(jax.tree_util.tree_map_with_path, _muon_or_adamw)
    return optax.partition(rules, labels)


def lion(config: TrainConfig, learning_rate: Any) -> optax.GradientTransformation:
    """Return Lion, which goes by the sign of the momentum: https://arxiv.org/abs/2302.06675."""
    betas = {"b1": config.beta1, "b2": config.beta2}
    return optax.lion(learning_rate, **betas, weight_decay=config.weight_decay, mask=_decays(config))


def adafactor(config: TrainConfig, learning_rate: Any) -> optax.GradientTransformation:
    """Return Adafactor, which keeps sums of rows and columns: https://arxiv.org/abs/1804.04235.

    Its updates are relative to the size of the parameters. Decay goes with the learning rate, as in the others.
    """
    decay = {"weight_decay_rate": config.weight_decay * learning_rate, "weight_decay_mask": _decays(config)}
    return optax.adafactor(learning_rate, **decay)


RULES: dict[str, Callable[[TrainConfig, Any], optax.GradientTransformation]] = {
    "adamw": adamw,
    "muon": muon,
    "lion": lion,
    "adafactor": adafactor,
}


def count_moments(config: TrainConfig, shapes: dict[str, tuple[int, ...]]) -> int:
    """Count the numbers that a rule remembers of parameters with these names and shapes."""
    if (parameters := sum(map(math.prod, shapes.values()))) > MAX_COUNT:
        return 2 * parameters  # about: JAX cannot count so far, and no device holds them
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    state = jax.eval_shape(RULES[config.optimizer](config, config.learning_rate).init, params)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(state))


def describe_rule(config: TrainConfig, shapes: dict[str, tuple[int, ...]]) -> str:
    """Return a line that names the rule; of Muon also what it takes, and at which peak."""
    if config.optimizer != "muon":
        return f"rule    {config.optimizer}"
    taken = [shape for name, shape in shapes.items() if _is_for_muon(name, len(shape))]
    peak = config.muon_learning_rate or config.learning_rate
    return (
        f"rule    muon on {sum(map(math.prod, taken)):,} parameters in {counted(len(taken), 'matrix', 'matrices')} of "
        f"blocks, peak {peak:g}; adamw on all others"
    )


def _decays(config: TrainConfig) -> Any:
    """Return what tells the parameters that decay; None: all."""
    return _are_matrices if config.weight_decay_on == "matrices" else None


def _are_matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim >= MATRIX_NDIM, params)


def _muon_or_adamw(path: tuple[Any, ...], array: Any) -> str:
    return "muon" if _is_for_muon(".".join(str(getattr(part, "key", part)) for part in path), array.ndim) else "adamw"


def _is_for_muon(name: str, ndim: int) -> bool:
    parts = name.split(".")
    return BLOCKS in parts and ndim == MATRIX_NDIM and "embedding" not in parts
