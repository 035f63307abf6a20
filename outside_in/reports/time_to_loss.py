"""What a run took to reach a validation loss: the measure of modded-nanogpt's speedruns.

https://github.com/KellerJordan/modded-nanogpt
"""

from typing import NamedTuple

import numpy as np

from outside_in.config import ModelConfig
from outside_in.reports.flops import flops_per_token
from outside_in.storage.records import Records


class Reached(NamedTuple):
    tokens: float
    steps: float
    seconds: float  # of steps alone
    flops: float


def reach(records: Records, model_config: ModelConfig, loss: float) -> Reached | None:
    """Return what it took to reach a validation loss; None if it never did.

    Between two validations the loss is taken to fall evenly. A loss that the first one has passed counts from there.
    """
    validation = records.column("val_loss")
    validated = np.flatnonzero(~np.isnan(validation))
    below = np.flatnonzero(validation[validated] <= loss)
    if not len(below):
        return None
    after = validated[below[0]]
    before = validated[below[0] - 1] if below[0] else after
    share = 1.0 if before == after else (validation[before] - loss) / (validation[before] - validation[after])
    columns = (records.column("tokens_seen"), records.column("global_step"), records.column("seconds").cumsum())
    tokens, steps, seconds = (float(x[before] + share * (x[after] - x[before])) for x in columns)
    return Reached(tokens, steps, seconds, tokens * flops_per_token(model_config))
