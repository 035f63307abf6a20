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
FUSED = "query_key_value"  # and that it is three matrices side by side: (D, D), (D, K), (D, K)
MATRICES = contrib.MuonDimensionNumbers(-2, -1)  # the axes of a matrix, also in a stack


def adamw(config: TrainConfig, learning_rate: Any) -> optax.GradientTransformation:
    """Return AdamW: https://arxiv.org/abs/1711.05101."""
    moments = {"b1": config.beta1, "b2": config.beta2, "eps": config.epsilon}
    return optax.adamw(learning_rate, **moments, weight_decay=config.weight_decay, mask=_decays(config))


def muon(config: TrainConfig, learning_rate: Any) -> optax.GradientTransformation:
    """Return Muon for the matrices of blocks, and AdamW for all else: https://kellerjordan.github.io/posts/muon.

    Muon makes the momentum of a matrix (nearly) orthogonal, and scales it by √max(1, outputs / inputs). Queries, keys
    and values are three matrices to it, although they are stored as one.
    """
    ratio = (config.muon_learning_rate or config.learning_rate) / config.learning_rate
    options: Any = {"weight_decay": config.weight_decay, "muon_weight_dimension_numbers": MATRICES}
    rules: Any = {
        "muon": _on_separate_matrices(contrib.muon(learning_rate * ratio, **options)),
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
    taken = {name: shape for name, shape in shapes.items() if _is_for_muon(name, len(shape))}
    matrices = sum(3 if FUSED in name.split(".") else 1 for name in taken)
    peak = config.muon_learning_rate or config.learning_rate
    return (
        f"rule    muon on {sum(map(math.prod, taken.values())):,} parameters in "
        f"{counted(matrices, 'matrix', 'matrices')} of blocks, peak {peak:g}; adamw on all others"
    )


def _decays(config: TrainConfig) -> Any:
    """Return what tells the parameters that decay; None: all."""
    return _are_matrices if config.weight_decay_on == "matrices" else None


def _are_matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim >= MATRIX_NDIM, params)


def _on_separate_matrices(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return a rule that gets the matrices that are stored as one in a stack of three."""

    def stacked(matrices: Any) -> Any:
        return jax.tree_util.tree_map_with_path(_stack, matrices)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        changes, state = rule.update(stacked(updates), state, stacked(params))
        return jax.tree.map(_unstack, changes, updates), state

    return optax.GradientTransformation(lambda params: rule.init(stacked(params)), update)


def _stack(path: tuple[Any, ...], matrix: jax.Array) -> jax.Array:
    """Stack queries, keys and values, (3, D, D). Columns of zeros fill up those of fewer heads, and remain zeros."""
    if FUSED not in _name(path).split("."):
        return matrix
    width, columns = matrix.shape
    parts = jnp.split(matrix, (width, (width + columns) // 2), axis=1)
    return jnp.stack([jnp.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts])


def _unstack(matrices: jax.Array, like: jax.Array) -> jax.Array:
    if matrices.ndim == like.ndim:
        return matrices
    kv_width = (like.shape[1] - like.shape[0]) // 2
    return jnp.concatenate([matrices[0], matrices[1, :, :kv_width], matrices[2, :, :kv_width]], axis=1)


def _muon_or_adamw(path: tuple[Any, ...], array: Any) -> str:
    return "muon" if _is_for_muon(_name(path), array.ndim) else "adamw"


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(part, "key", part)) for part in path)


def _is_for_muon(name: str, ndim: int) -> bool:
    parts = name.split(".")
    return BLOCKS in parts and ndim == MATRIX_NDIM and "embedding" not in parts
