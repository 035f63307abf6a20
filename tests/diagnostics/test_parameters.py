import json
import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import ROOT, TINY_MODEL, tiny_model

from outside_in.diagnostics.parameters import (
    array_table,
    check_parameters_changed,
    hash_line,
    matching,
    parameter_hashes,
)
from outside_in.diagnostics.rejections import describe_rejection
from outside_in.train_step import NORM_SCALE, GradientDiagnostics
from outside_in.training.monitor import log_first_loss

PRINT_HASHES = """
import json, sys
from flax import nnx
from outside_in.config import ModelConfig
from outside_in.diagnostics.parameters import parameter_hashes
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
        check_parameters_changed(hashes, dict(hashes), ["a"])
    with pytest.raises(RuntimeError, match=r"changed no matrix, only b; .*too small for float32"):
        check_parameters_changed(hashes, hashes | {"b": "3"}, ["a"])
    check_parameters_changed(hashes, hashes | {"a": "3"}, ["a"])
    check_parameters_changed(hashes, hashes | {"b": "3"}, [])


def rejection(norms, scaled=(0.0, 0.0, 0.0)):
    calls = [GradientDiagnostics(np.ones(1), np.float32(norms), np.float32(scaled))]
    return describe_rejection(7, calls, ["a", "b", "c"], ["c", "b", "a"], [], np.zeros((1, 1), int))


def test_a_rejection_names_the_first_bad_gradient_of_the_backward_pass():
    known = rejection([np.nan, np.inf, 1.0], [np.nan, np.inf, 0.0])
    assert known["reason"] == "a gradient is not finite"
    assert known["first_gradient_not_finite"] == "b" and known["largest_gradient"] is None
    assert known["gradient_norms_of_each_call"] == {"a": [None], "b": [None], "c": [1.0]}


@pytest.mark.parametrize(
    ("norms", "scaled", "largest"),
    [
        ([1.0, np.inf, np.inf], [0.0, 1e30 * NORM_SCALE, 1e25 * NORM_SCALE], "b"),
        ([1.7e19, 1.8e19, 1.0], [0.0, 0.0, 0.0], "b"),  # their squares overflow only together
    ],
)
def test_an_overflow_of_the_norm_is_called_that_and_names_the_largest_gradient(norms, scaled, largest):
    known = rejection(norms, scaled)
    assert known["reason"] == "the norm of the gradient overflows float32"
    assert known["first_gradient_not_finite"] is None and known["largest_gradient"] == largest
    [norm] = known["gradient_norms_of_each_call"][largest]
    assert norm == pytest.approx(1e30 if np.inf in norms else 1.8e19, rel=1e-5)


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
def test_the_first_loss_is_compared_with_a_uniform_guess(logged, loss, warns):
    log_first_loss(loss, 50257)
    [line] = logged
    assert ("WARNING" in line) == warns
    assert f"{loss:.4f}" in line and "10.8249" in line and "50,257" in line and "\n" not in line


@pytest.mark.parametrize(
    ("loss", "cause"),
    [(12.0, "a loss that is a sum"), (1.0, "targets that equal the inputs"), (math.nan, "--debug-checks")],
)
def test_a_first_loss_that_is_off_comes_with_likely_causes(logged, loss, cause):
    log_first_loss(loss, 50257)
    assert cause in logged[0].partition("likely causes: ")[2]


def test_a_line_of_hashes_marks_what_did_not_change():
    before, after = {"a": "1", "b": "2"}, {"a": "1", "b": "3"}
    assert hash_line(1200, before, after) == "step 1,200: a 1 (unchanged), b 3"


def test_a_pattern_picks_hashes_by_name():
    hashes = {"blocks.0.a": "1", "blocks.1.a": "2", "head": "3"}
    assert matching(hashes, "blocks.*") == {"blocks.0.a": "1", "blocks.1.a": "2"}
    assert matching(hashes, "*") == hashes
    with pytest.raises(ValueError, match=r"no parameter matches 'x'; available: blocks\.0\.a, blocks\.1\.a, head"):
        matching(hashes, "x")


# The table of arrays


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_holds_what_a_hand_computes():
    arrays = {"b": np.array([[3.0, 0.0], [4.0, np.nan]], np.float32), "a": np.float32(2.0)}
    names, _, *rows = map(cells, array_table(arrays))
    assert names == ["parameter", "shape", "norm", "mean", "std", "zeros", "NaN/Inf"]
    assert rows[0] == ["a", "scalar", "2", "2", "0", "0.00%", "0"]
    assert rows[1] == ["b", "2 × 2", "5", "2.333", "1.7", "25.00%", "1"]


def test_two_checkpoints_side_by_side_show_the_relative_change_of_each():
    old = {"same": np.ones(2), "moved": np.array([3.0, 4.0]), "gone": np.ones(1), "resized": np.ones(2)}
    new = {"same": np.ones(2), "moved": np.array([3.0, 4.5]), "new": np.ones(1), "resized": np.ones(3)}
    changes = {row[0]: row[-1] for row in map(cells, array_table(old, new)[2:])}
    expected = {"same": "0", "moved": "0.1", "gone": "only in one", "new": "only in one", "resized": "other shape"}
    assert changes == expected


def test_blocks_come_in_the_order_of_their_numbers():
    names = [f"blocks.{number}.kernel" for number in (0, 2, 10)] + ["head"]
    assert [cells(row)[0] for row in array_table({name: np.ones(1) for name in reversed(names)})[2:]] == names
