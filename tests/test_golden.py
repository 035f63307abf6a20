"""Golden losses: 20 steps of a tiny model, as they were.

A refactor leaves `tests/golden/` untouched. A change of the numbers regenerates it, in a commit that says why:
`uv run --no-group cuda python tests/test_golden.py`.
"""

import json
from pathlib import Path

import jax
import numpy as np
from helpers import CONTEXT_LENGTH, random_tokens, tiny_model, tiny_train_config

from outside_in.data.loader import TokenStream
from outside_in.optimizer import make_optimizer
from outside_in.train_step import train_step

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
STEPS = 20


def run():
    """Train on one global step's worth of tokens again and again, with dropout, so that the loss must fall."""
    config = tiny_train_config(drop_rate=0.1)
    model = tiny_model(drop_rate=0.1)
    optimizer = make_optimizer(model, config, STEPS)
    data = TokenStream(jax.device_put(random_tokens(129)), (4, 2, CONTEXT_LENGTH), "next-token", 0, shuffle=False)
    reports = [train_step(model, optimizer, *data.calls(step), jax.random.key(1), config) for step in range(STEPS)]
    return {
        "loss": [float(report.loss) for report in reports],
        "gradient_norm": [float(report.update.gradient_norm) for report in reports],
    }


def test_twenty_steps_give_the_golden_losses():
    found, golden = run(), json.loads(GOLDEN.read_text())
    message = f"was the change of numbers meant? then regenerate {GOLDEN.name} in a commit that says why"
    for name, values in golden.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-4, err_msg=message)
    assert found["loss"][-1] < found["loss"][0] - 0.5


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(run(), indent=1) + "\n")
