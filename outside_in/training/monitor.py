"""Training-time monitors: first loss, unchanged parameters, requested checks."""

import math
from collections.abc import Sequence

import jax
from flax import nnx

from outside_in.data.loader import Batch
from outside_in.diagnostics.finite_checks import make_checks
from outside_in.diagnostics.parameters import check_parameters_changed, hash_line, matching, parameter_hashes
from outside_in.runtime.log import log
from outside_in.train_step import StepReport, mean_loss_of_calls
from outside_in.training.state import TrainState
from outside_in.update_rules import MATRIX_NDIM
from outside_in.weights import named_arrays

MAX_DISTANCE = 0.5  # nats, of a first loss from that of a uniform guess


class StepMonitor:
    """Checks every global step before and after it.

    Unless more is asked for, it stops after the first accepted update. `pattern` asks for a line of hashes after every
    step, of the parameters that this shell pattern matches; raises ValueError when it matches none. `debug_checks` asks
    for a second pass through every microbatch, to find what is not finite.
    """

    def __init__(self, state: TrainState, *, pattern: str | None = None, debug_checks: bool = False) -> None:
        self._state, self._pattern = state, pattern
        self._check = make_checks(state.model) if debug_checks else None
        self._hashes: dict[str, str] | None = None  # from before the coming step; none before the first look
        self._is_proven = False  # that updates change parameters
        if pattern:
            parameter_hashes(state.model, pattern)

    def before_step(self, calls: list[Batch], seed_key: jax.Array) -> str | None:
        """Return what a check finds wrong with the coming batch."""
        if self._hashes is None:
            self._is_proven = self._state.global_step > 0
            self._hashes = self._hash()
        findings = (self._check(self._state.model, call, seed_key) for call in calls) if self._check else ()
        return next(filter(None, findings), None)

    def after_step(self, reports: Sequence[StepReport]) -> None:
        """Log the first loss and the hashes. Raises RuntimeError when the first accepted update has changed nothing."""
        state, before = self._state, self._hashes
        if state.global_step == 1 and state.config.initial_weights is None:
            log_first_loss(mean_loss_of_calls(reports), state.model_config.vocab_size)
        if not before:
            return
        self._hashes = self._hash()
        if not self._is_proven and not reports[-1].update.rejected:
            parameters = named_arrays(nnx.state(state.model, nnx.Param))
            matrices = {name for name, array in parameters.items() if array.ndim >= MATRIX_NDIM}
            check_parameters_changed(before, self._hashes, matrices)
            self._is_proven = True
        if self._pattern:
            log.info(hash_line(state.global_step, before, matching(self._hashes, self._pattern)))

    def _hash(self) -> dict[str, str]:
        if not self._is_proven:
            return parameter_hashes(self._state.model)
        return parameter_hashes(self._state.model, self._pattern) if self._pattern else {}


def log_first_loss(loss: float, vocab_size: int) -> None:
    """Log the first loss beside that of a uniform guess."""
    uniform = math.log(vocab_size)
    line = f"first loss {loss:.4f}; a uniform guess over {vocab_size:,} tokens is {uniform:.4f}"
    if math.isnan(loss):
        causes = "a parameter or an activation is not finite from the start; --debug-checks shows where"
    elif loss > uniform + MAX_DISTANCE:
        causes = "weights that start too large, or a loss that is a sum instead of a mean"
    elif loss < uniform - MAX_DISTANCE:
        causes = "targets that equal the inputs (objective), a mask that lets positions see later ones, or padding"
    else:
        log.info(line)
        return
    log.warning(f"{line}; they should be close; likely causes: {causes}")
