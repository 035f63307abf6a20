"""Imports point downwards: each floor of the house stands on those before it."""

import ast

import pytest
from helpers import ROOT

FLOORS = [
    "storage",
    "config,config_files,model_config",
    "runtime,overrides",
    "layers,loss,weights",
    "model",
    "data",
    "optimizer,norms_by_layer,train_step,update_rules",
    "checkpointing",
    "inference",
    "reports",
    "diagnostics",
    "huggingface",
    "training",
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names.split(",")}
PROGRAMS = len(FLOORS)
MAX_ROOT_FILES = 12
WITHOUT_JAX = [
    "storage",
    "config",
    "config_files",
    "model_config",
    "overrides",
    "reports/charts",
    "reports/comparison_page",
    "reports/page",
    "reports/page_charts",
    "reports/run_page",
    "reports/cards",
    "reports/key_table",
    "reports/loggers",
    "reports/roofline",
    "runtime/cli",
    "runtime/signals",
    "data/prepare",
]


def floor(module):
    """Return the floor of one of our modules by its dotted name; None for a library."""
    parts = module.removeprefix("outside_in.").split(".")
    return FLOOR_OF.get(parts[0]) if module.startswith("outside_in.") or module in FLOOR_OF else None


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "outside_in":
            yield from (f"outside_in.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (*ROOT.glob("*.py"), *ROOT.glob("outside_in/**/*.py"))
    if path.stem != "__init__"
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_its_own_floor_and_those_below(name):
    own = PROGRAMS if floor(name) is None else floor(name)
    too_high = {other for other in imports(MODULES[name]) if (floor(other) or 0) > own}
    assert not too_high


def test_every_module_of_the_package_has_a_floor():
    assert {name for name in MODULES if name.startswith("outside_in.") and floor(name) is None} == set()


def test_few_files_stand_at_the_root():
    assert len(list(ROOT.glob("*.py"))) <= MAX_ROOT_FILES


@pytest.mark.parametrize("where", WITHOUT_JAX)
def test_what_has_no_arrays_never_touches_jax(where):
    path = ROOT / "outside_in" / where
    for module in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        assert not {name for name in imports(module) if name.split(".")[0] in ("jax", "flax", "optax")}, module
