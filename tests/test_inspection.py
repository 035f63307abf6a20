import json
import math
import subprocess
import sys

import jax.numpy as jnp
import pytest
from conftest import ROOT, TINY_MODEL, tiny_model
from flax import nnx

from inspection import check_parameters_changed, first_loss_line, parameter_hashes

PRINT_HASHES = """
import json, sys
from flax import nnx
from config import ModelConfig
from inspection import parameter_hashes
from model import GPTModel
print(json.dumps(parameter_hashes(GPTModel(ModelConfig(**json.loads(sys.argv[1])), nnx.Rngs(0)))))
"""
UNIFORM = math.log(50257)  # 10.8249


class Pair(nnx.Module):
    def __init__(self):
        self.first = nnx.Param(jnp.zeros(2))
        self.inner = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
        self.inner.kernel[...] = jnp.ones((1, 1))


def test_hashes_are_blake2_of_the_bytes_under_dot_joined_names():
    # b2sum --length=64 of 8 zero bytes, and of 00 00 80 3f
    assert parameter_hashes(Pair()) == {"first": "ca08ea5bca49cc18", "inner.kernel": "06e0f1055650bd76"}


def test_another_process_with_the_same_seed_gets_the_same_hashes():
    config = TINY_MODEL | {"n_layers": 0}
    command = [sys.executable, "-c", PRINT_HASHES, json.dumps(config)]
    other = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout)
    assert other == parameter_hashes(tiny_model(n_layers=0))
    assert other != parameter_hashes(tiny_model(seed=1, n_layers=0))


def test_a_changed_parameter_changes_exactly_its_own_hash():
    model = tiny_model(n_layers=1)
    before = parameter_hashes(model)
    kernel = model.blocks[0].attention.output.kernel
    kernel[0, 0] = jnp.nextafter(kernel[0, 0], 1.0)  # by one bit
    after = parameter_hashes(model)
    assert {name for name in before if before[name] != after[name]} == {"blocks.0.attention.output.kernel"}
    assert before.keys() == after.keys()


def test_an_update_that_changes_nothing_is_an_error():
    hashes = {"a": "1", "b": "2"}
    with pytest.raises(RuntimeError, match="changed no parameter"):
        check_parameters_changed(hashes, dict(hashes))
    check_parameters_changed(hashes, hashes | {"b": "3"})


@pytest.mark.parametrize(
    ("loss", "warns"),
    [
        (10.8242, False),
        (UNIFORM + 0.49, False),
        (UNIFORM - 0.49, False),
        (UNIFORM + 0.51, True),
        (UNIFORM - 0.51, True),
        (0.0, True),
        (math.nan, True),
        (math.inf, True),
    ],
)
def test_the_first_loss_is_compared_with_a_uniform_guess(loss, warns):
    line = first_loss_line(loss, 50257)
    assert ("WARNING" in line) == warns
    assert f"{loss:.4f}" in line and "10.8249" in line and "50,257" in line and "\n" not in line
