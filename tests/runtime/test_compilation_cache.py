"""Compiled programs kept between starts: nothing changes but the time, and no damage to them stops a run."""

import os
import re

import jax
import numpy as np
import pytest
from helpers import run_program, tiny_model, tiny_train_config
from safetensors.numpy import load_file

from checkpointing import copy_to_host, load, save
from outside_in.data.loader import Batch
from outside_in.optimizer import make_optimizer
from outside_in.runtime.compilation_cache import drop_undated_entries, private_folder
from outside_in.train_step import compile_train_step, train_step

pytestmark = pytest.mark.slow

HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


@pytest.fixture
def start(tmp_path):
    """Train a run as its user would who has set nothing: `start(run)`, compiled programs kept in `cache/`."""
    mine = {name: value for name, value in os.environ.items() if "CACHE" not in name}

    def start(run, *options, **environment):
        environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_EXPLAIN_CACHE_MISSES": "1"} | environment
        done = run_program("train.py", run, *options, env=mine | environment)
        assert done.returncode == 0, done.stderr
        return done.stderr

    return start


def parameters(run):
    return load_file(run / "checkpoints" / "latest" / "model.safetensors")


def assert_same_parameters(left, right):
    left, right = parameters(left), parameters(right)
    assert left.keys() == right.keys()
    assert all(left[name].tobytes() == right[name].tobytes() for name in left)


def test_a_run_is_bit_for_bit_the_same_without_a_cache_cold_warm_and_damaged(start, make_run, tmp_path):
    runs = {name: make_run(name, train={"drop_rate": 0.1}) for name in ("off", "cold", "warm", "damaged", "mended")}
    entries = tmp_path / "cache" / "outside-in"
    start(runs["off"], "--no-compilation-cache")
    assert not entries.exists()
    missed = "CACHE MISS for 'jit_train_step'"
    assert missed in start(runs["cold"])
    assert entries.stat().st_mode & 0o777 == 0o700
    assert missed not in start(runs["warm"])
    [step] = entries.glob("jit_train_step-*-cache")
    [init] = entries.glob("jit_create_model-*-cache")
    step.write_bytes(step.read_bytes()[:1000])
    init.write_bytes(b"torn" + init.read_bytes()[4:])  # later on, six changed bits of ten would not be noticed
    told = start(runs["damaged"])
    assert missed in told and "Traceback" not in told
    assert re.findall(r"WARNING Error reading .* entry for '(\w+)'", told) == ["jit_create_model"]  # which came first
    again = start(runs["mended"])
    assert missed not in again and "WARNING Error" not in again
    for name in ("cold", "warm", "damaged", "mended"):
        assert_same_parameters(runs["off"], runs[name])


def test_a_step_from_the_cache_needs_as_much_memory_and_takes_over_what_it_is_given():
    config = tiny_train_config()
    tokens = np.zeros((4, 2, 16), np.uint16)
    events, needs = [], []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    for _ in range(2):
        jax.clear_caches()
        model = tiny_model(emb_dim=48)
        optimizer = make_optimizer(model, config, 12)
        batch, key = jax.device_put(Batch(tokens, tokens, np.zeros(2, np.uint32))), jax.random.key(0)
        events.clear()
        step = compile_train_step(model, optimizer, batch, key, config)
        needs.append((events.count(HIT), step.bytes_needed))
        table = model.token_embedding.embedding[...]
        step(model, optimizer, batch, key)
        assert table.is_deleted()
    assert [hits for hits, _ in needs] == [0, 1]
    assert needs[0][1] == needs[1][1]


def test_a_resumed_run_has_the_same_program_as_a_fresh_one(tmp_path):
    config, key = tiny_train_config(), jax.random.key(0)
    tokens = np.zeros((4, 2, 16), np.uint16)
    batch = jax.device_put(Batch(tokens, tokens, np.zeros(2, np.uint32)))

    def program():
        return train_step.lower(model, optimizer, batch, key, config).as_text()

    model = tiny_model()
    optimizer = make_optimizer(model, config, 12)
    fresh, state = program(), copy_to_host(model, optimizer)
    load(save(tmp_path, state, {"global_step": 1, "is_best": False}, "{}"), model, optimizer)
    assert program() == fresh


@pytest.mark.parametrize(("mode", "complaint"), [(0o770, "others"), (0o702, "others"), (0o700, None), (0o755, None)])
def test_a_folder_into_which_others_may_write_is_not_used(tmp_path, monkeypatch, mode, complaint):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "outside-in").mkdir()
    (tmp_path / "outside-in").chmod(mode)
    if complaint:
        with pytest.raises(OSError, match=complaint):
            private_folder()
    else:
        assert private_folder() == tmp_path / "outside-in"


def test_a_folder_of_somebody_else_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    private_folder()
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(OSError, match="belongs to another user, or others may write to it"):
        private_folder()


def test_a_run_that_cannot_keep_anything_says_so_in_one_line(start, make_run, tmp_path):
    (tmp_path / "cache").write_text("")
    told = start(make_run())
    assert len(re.findall("WARNING the compilation cache is off: .*cache", told)) == 1 and "Traceback" not in told


def test_an_entry_without_a_time_of_last_use_is_removed_and_the_others_stay(tmp_path):
    for name in ("whole-cache", "whole-atime", "torn-cache"):
        (tmp_path / name).write_bytes(b"1")
    drop_undated_entries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"whole-cache", "whole-atime"}
