"""What looks on while a run trains: the first loss, whether parameters change, and the checks that are asked for."""

import jax

from data import Batch
from debug_checks import make_checks
from inspection import check_parameters_changed, first_loss_line, hash_line, matching, parameter_hashes
from training import Report, Training, mean_of_calls


class Watcher:
    """Looks at every global step before and after it; without wishes at the first one of the run alone.

    `pattern` asks for a line of hashes after every step, of the parameters that it matches (a shell's pattern);
    `debug_checks` for every microbatch to be gone through once more, looking for what is not finite.
    """

    def __init__(self, training: Training, *, pattern: str | None = None, debug_checks: bool = False) -> None:
        self._training, self._pattern = training, pattern
        self._check = make_checks(training.model) if debug_checks else None
        self._is_first = training.global_step == 0
        self._hashes = parameter_hashes(training.model) if pattern or self._is_first else {}
        if pattern:
            matching(self._hashes, pattern)  # a pattern that matches nothing should show before compiling

    def before_step(self, calls: list[Batch], seed_key: jax.Array) -> None:
        """Raise RuntimeError when a check finds something in the batch of the coming global step."""
        if self._check:
            for call in calls:
                self._check(self._training.model, call, seed_key)

    def after_step(self, reports: list[Report]) -> list[str]:
        """Return what there is to say; raises RuntimeError when the first update changed nothing."""
        training, lines = self._training, []
        if not self._hashes:
            return lines
        before, after = self._hashes, parameter_hashes(training.model)
        if self._is_first:
            first_loss = mean_of_calls(jax.device_get(reports))
            lines.append(first_loss_line(first_loss, training.model_config.vocab_size))
            check_parameters_changed(before, after, rejected=bool(reports[-1]["rejected"]))
        if self._pattern:
            lines.append(hash_line(training.global_step, before, matching(after, self._pattern)))
        self._is_first, self._hashes = False, after if self._pattern else {}
        return lines
