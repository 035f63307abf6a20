"""What looks on while a run trains: the first loss, whether parameters change, and the checks that are asked for."""

import jax
from flax import nnx

from outside_in.data.loader import Batch
from outside_in.diagnostics.finite_checks import make_checks
from outside_in.diagnostics.parameters import (
    check_parameters_changed,
    first_loss_line,
    hash_line,
    matching,
    parameter_hashes,
)
from outside_in.optimizer import MATRIX_NDIM
from outside_in.training.state import Report, Training, mean_of_calls
from outside_in.weights import named_arrays


class Watcher:
    """Looks at every global step before and after it; without wishes only until the first update is accepted.

    `pattern` asks for a line of hashes after every step, of the parameters that it matches (a shell's pattern; raises
    ValueError when it matches none); `debug_checks` for every microbatch to be gone through once more, looking for what
    is not finite.
    """

    def __init__(self, training: Training, *, pattern: str | None = None, debug_checks: bool = False) -> None:
        self._training, self._pattern = training, pattern
        self._check = make_checks(training.model) if debug_checks else None
        self._hashes: dict[str, str] | None = None  # from before the coming step; none before the first look
        self._is_proven = False  # that updates change parameters
        if pattern:
            parameter_hashes(training.model, pattern)

    def before_step(self, calls: list[Batch], seed_key: jax.Array) -> str | None:
        """Return what a check finds wrong with the batch of the coming global step."""
        if self._hashes is None:
            self._is_proven = self._training.global_step > 0
            self._hashes = self._hash()
        findings = (self._check(self._training.model, call, seed_key) for call in calls) if self._check else ()
        return next(filter(None, findings), None)

    def after_step(self, reports: list[Report]) -> list[str]:
        """Return what there is to say; raises RuntimeError when the first accepted update has changed nothing."""
        training, lines, before = self._training, [], self._hashes
        if training.global_step == 1 and training.config.initial_weights is None:
            first_loss = mean_of_calls(jax.device_get(reports))
            lines.append(first_loss_line(first_loss, training.model_config.vocab_size))
        if not before:
            return lines
        self._hashes = self._hash()
        if not self._is_proven and not reports[-1]["rejected"]:
            parameters = named_arrays(nnx.state(training.model, nnx.Param))
            matrices = {name for name, array in parameters.items() if array.ndim >= MATRIX_NDIM}
            check_parameters_changed(before, self._hashes, matrices)
            self._is_proven = True
        if self._pattern:
            lines.append(hash_line(training.global_step, before, matching(self._hashes, self._pattern)))
        return lines

    def _hash(self) -> dict[str, str]:
        if not self._is_proven:
            return parameter_hashes(self._training.model)
        return parameter_hashes(self._training.model, self._pattern) if self._pattern else {}
