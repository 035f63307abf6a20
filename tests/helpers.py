"""What the tests share beside fixtures: one tiny model, one tiny run, and what it left."""

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from checkpointing import find_checkpoints, read, verify
from model import GPTModel
from outside_in import train_step
from outside_in.config import ModelConfig, TrainConfig
from outside_in.layers.dropout import Dropout
from outside_in.runtime.log import log
from outside_in.storage import metrics
from outside_in.weights import fill_like, host_arrays

ROOT = Path(__file__).parent.parent
GPT2_FIXTURE, LLAMA_FIXTURE = (ROOT / "tests" / "fixtures" / name for name in ("gpt2", "llama"))
VOCAB_SIZE, CONTEXT_LENGTH = 101, 16
TINY_MODEL = {
    "vocab_size": VOCAB_SIZE,
    "context_length": CONTEXT_LENGTH,
    "emb_dim": 32,
    "n_heads": 4,
    "n_layers": 1,
    "qkv_bias": False,
}
TINY_TRAIN = {
    "dataset": "set by the fixture",
    "microbatch_size": 2,
    "gradient_accumulation_steps": 4,
    "min_train_tokens": 12 * 2 * 4 * CONTEXT_LENGTH,  # 12 global steps
    "learning_rate": 0.01,
    "checkpoint_interval": 5,
    "val_tokens": 64,
    "mesh": {"data": 1},
}


def tiny_model_config(**changes):
    return ModelConfig(**(TINY_MODEL | changes))


def tiny_train_config(**changes):
    return TrainConfig(**(TINY_TRAIN | changes))


def tiny_model(seed=0, *, drop_rate=0.0, dtype="float32", **changes):
    return GPTModel(tiny_model_config(**changes), nnx.Rngs(seed), drop_rate=drop_rate, dtype=dtype)


def arrays_of(model):
    return host_arrays(nnx.state(model, nnx.Param))


def model_with(config, arrays):
    model = GPTModel(config, nnx.Rngs(0))
    nnx.update(model, fill_like(nnx.state(model, nnx.Param), arrays, "theirs"))
    return model


@nnx.jit
def logits(model, tokens, dropout_keys=None):
    """Call a model compiled: op by op, every operation would be compiled on its own."""
    return model(tokens, None if dropout_keys is None else Dropout(dropout_keys))


def random_tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, count).astype(np.uint16)


Finished = namedtuple("Finished", "returncode stdout stderr")


def run_program(*arguments, cwd=ROOT, **options):
    """Run one of the programs as a user would; returns the finished process with its text output."""
    command = [sys.executable, ROOT / arguments[0], *map(str, arguments[1:])]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **options)


def without_times(run):
    return [
        {k: v for k, v in record.items() if not k.endswith("seconds")} for record in metrics.read(run / "metrics.jsonl")
    ]


def final_state(run):
    """Everything that must not depend on interruptions."""
    newest = find_checkpoints(run / "checkpoints")[-1]
    verify(newest)
    return {
        "parameters": load_file(newest.path / "model.safetensors"),
        "optimizer": read(newest).optimizer,
        "metrics": without_times(run),
        "samples": (run / "samples.txt").read_text() if (run / "samples.txt").exists() else "",
        "step": newest.global_step,
    }


def assert_same(left, right):
    for part in ("parameters", "optimizer"):
        assert left[part].keys() == right[part].keys()
        for name, array in left[part].items():
            assert np.array_equal(array, right[part][name]), name
    assert left["metrics"] == right["metrics"]
    assert left["samples"] == right["samples"]
    assert left["step"] == right["step"]


def complaint(finished, code=2):
    assert finished.returncode == code, finished.stderr
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in finished.stderr
    return errors[0]


def on_step(monkeypatch, name, number, action):
    """Before the `number`th call of a compiled step of that name, do something."""
    original, calls = train_step.Compiled.__call__, 0

    def wrapper(compiled, *args):
        nonlocal calls
        calls += compiled._name == name
        if calls == number and compiled._name == name:
            action()
        return original(compiled, *args)

    monkeypatch.setattr(train_step.Compiled, "__call__", wrapper)


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.1)  # the listener is a thread


@contextlib.contextmanager
def captured_log():
    """Keep what is logged in the block: messages, after their level where it is not INFO."""
    messages, level = [], log.level

    class Keep(logging.Handler):
        def emit(self, record):
            prefix = "" if record.levelno == logging.INFO else f"{record.levelname} "
            messages.append(prefix + record.getMessage())

    handler = Keep()
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield messages
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
