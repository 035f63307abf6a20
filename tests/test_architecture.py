"""The floors of the house: a module imports only from lower floors, programs never import programs."""

import ast

import pytest
from helpers import ROOT

FLOORS = [
    set(names.split())
    for names in (
        "attention command_line compilation_cache config cpu_kernels documents dropout durable interruption metrics "
        "processes run_directory seen_documents stopwatch tensor_files tokenizer",
        "batches builtin_data charts data data_description drift flops kernels loss manifest mesh optimizer samples "
        "token_writer weights",
        "dataset_sources gpt2_weights inspection model preparing",
        "preflight steps",
        "checkpointing debug_checks evaluation fitting generation overfitting",
        "comparison multiple_choice saved_model training",
        "saving starting watching",
        "loop",
        "compare_runs convert_gpt2 evaluate inspect_checkpoint prepare_data prove_resume test_a_to_a "
        "test_generation train",
    )
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_every_module_has_a_floor():
    assert {path.stem for path in ROOT.glob("*.py")} == FLOOR_OF.keys()


@pytest.mark.parametrize("name", FLOOR_OF)
def test_a_module_imports_only_from_lower_floors(name):
    too_high = {other for other in imports(ROOT / f"{name}.py") if FLOOR_OF.get(other, -1) >= FLOOR_OF[name]}
    assert not too_high


@pytest.mark.parametrize(
    "name", FLOORS[0] - {"attention", "compilation_cache", "cpu_kernels", "dropout", "processes"} | {"charts"}
)
def test_floors_without_arrays_never_touch_jax(name):
    assert not {module for module in imports(ROOT / f"{name}.py") if module.split(".")[0] in ("jax", "flax", "optax")}
