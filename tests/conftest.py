"""Fixtures, and strict JAX with a compilation cache of the session's own."""

import gc
import importlib
import itertools
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

# Keep bytecode, whatever the system says: each program that a test starts would compile 1,200 modules, for two seconds.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import jax
import pytest
from helpers import TINY_MODEL, TINY_TRAIN, Finished, captured_log, random_tokens
from hub import point_client_at, serve, upload_hub  # noqa: F401
from safetensors.numpy import save_file

import model
from outside_in.runtime import cli

jax.config.update("jax_num_cpu_devices", 8)  # one is used unless a test wants more
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compile in a fifth of the time, here and in the programs that tests start: what is compiled computes little.
XLA_FLAGS = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):  # later ones do not know it, and abort
    XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(XLA_FLAGS))

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background: programs would be deaf to Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

# One compilation cache for the session, its workers and the programs that it starts: all compile the same few things.
CACHE = None if "PYTEST_XDIST_WORKER" in os.environ else tempfile.TemporaryDirectory(prefix="compiled-")
CACHE_OPTIONS = {
    "jax_compilation_cache_dir": CACHE.name if CACHE else os.environ["JAX_COMPILATION_CACHE_DIR"],
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
for option, value in CACHE_OPTIONS.items():
    jax.config.update(option, value)
os.environ |= {option.upper(): str(value) for option, value in CACHE_OPTIONS.items()}

MEMORY_MAPS = Path("/proc/self/maps")  # on Linux alone
MANY_MEMORY_MAPS = 30_000
TESTS_DONE = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs_in_memory():
    """Forget compiled programs when they are many: each takes hundreds of the 65,530 memory maps of a process.

    JAX keeps them all, and past that number, which is Linux's limit, it crashes.
    """
    yield
    looks = next(TESTS_DONE) % 10 == 0 and MEMORY_MAPS.exists()
    if looks and MEMORY_MAPS.read_bytes().count(b"\n") > MANY_MEMORY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def token_folder(tmp_path):
    """A dataset of random tokens below the tiny vocabulary."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    save_file({"tokens": random_tokens(2000)}, folder / "train.safetensors")
    save_file({"tokens": random_tokens(200, seed=1)}, folder / "validation.safetensors")
    return folder


@pytest.fixture
def make_run(tmp_path, token_folder):
    """Write a tiny run: `make_run("name", model={...}, train={...})` with changes to its two configs."""

    def make(name="run", model=None, train=None):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.json").write_text(json.dumps(TINY_MODEL | (model or {})))
        (folder / "train.json").write_text(json.dumps(TINY_TRAIN | {"dataset": str(token_folder)} | (train or {})))
        return folder

    return make


@pytest.fixture
def call_program(capsys):
    """Run a program inside this process, where everything is imported and compiled: `call_program("train", run)`."""

    def call(name, *arguments):
        program = importlib.import_module(name)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            cli.run(program.main, program.make_parser(), [str(argument) for argument in arguments])
        return Finished(exit_info.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def use_model(monkeypatch):
    """Give runs another class of models: `use_model(SoftCap)`. JAX keeps fresh models by config, so it forgets all."""

    def use(model_class):
        jax.clear_caches()
        monkeypatch.setattr(model, "GPTModel", model_class)

    yield use
    jax.clear_caches()


@pytest.fixture
def logged():
    """The messages that are logged, with their level if it is not INFO, in a list that grows."""
    with captured_log() as messages:
        yield messages
