"""`train.py RUN --check` refuses what training would refuse, from headers alone."""

import json

import numpy as np
import pytest
from helpers import CONTEXT_LENGTH, TINY_MODEL, TINY_TRAIN, complaint, random_tokens
from hub import Hub
from safetensors.numpy import save_file

from outside_in.config import ModelConfig, TrainConfig
from outside_in.data import loader, sources

PER_STEP = TINY_TRAIN["microbatch_size"] * TINY_TRAIN["gradient_accumulation_steps"] * CONTEXT_LENGTH
SIZES = [10**6, 10**9, 10**12, 2**31, 2**63, 10**400]
COUNTS = [
    *(f"model.{name}" for name, field in ModelConfig.model_fields.items() if field.annotation is int),
    *(name for name, field in TrainConfig.model_fields.items() if field.annotation in (int, int | None)),
    *("mesh.data", "mesh.fsdp"),
]
HARMLESS = {"val_tokens", "loss_rows_per_chunk", "checkpoint_interval", "keep_checkpoints"}
HARMLESS |= {"max_consecutive_rejections"}

FINE = [("epochs", 10**6), ("seed", 10**6), ("seed", 10**9)]


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DATA_FOLDER", tmp_path / "data")


@pytest.fixture
def check(call_program, monkeypatch):
    """Check a run; nothing but headers is read."""

    def refuse(*args):
        raise AssertionError("a check reads no tokens")

    def check(run):
        with monkeypatch.context() as patch:
            patch.setattr(loader, "load_tokens", refuse)
            return call_program("train", run, "--check")

    return check


def both_refuse(check, call_program, run):
    """Check a run and train it; return the line with which both refuse it."""
    told = complaint(check(run))
    assert complaint(call_program("train", run)) == told
    assert {path.name for path in run.iterdir()} <= {"model.json", "train.json", ".lock"}
    return told


def write_tokens(folder, train=2000, validation=200):
    folder.mkdir(exist_ok=True)
    for name, count in (("train", train), ("validation", validation)):
        save_file({"tokens": random_tokens(count)}, folder / f"{name}.safetensors")


def test_data_that_are_here_are_found(check, make_run):
    finished = check(make_run())
    assert finished.returncode == 0 and "data: found\n" in finished.stdout


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "found nothing; put a safetensors file with `tokens` there"),
        (["notes.txt"], "found nothing; put a safetensors file"),
        (["train.bin", "val.bin"], "np.fromfile('train.bin', np.uint16)}, 'train.safetensors')"),
        (["train.npy"], "np.load('train.npy')"),
        (["training.safetensors"], "rename training.safetensors to train.safetensors"),
    ],
    ids=str,
)
def test_a_folder_without_token_files_is_missing_data(check, call_program, make_run, tmp_path, files, words):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes(np.arange(9, dtype=np.uint16).tobytes())
    run = make_run(train={"dataset": str(folder)})
    assert words in both_refuse(check, call_program, run)
    assert "data: missing\n" in check(run).stdout


@pytest.mark.parametrize("name", ["val.safetensors", "valid.safetensors", "val.bin", "validation.npy"])
def test_validation_tokens_of_another_name_are_not_left_out_silently(check, call_program, make_run, token_folder, name):
    (token_folder / "validation.safetensors").rename(token_folder / name)
    told = both_refuse(check, call_program, make_run())
    assert name in told and "validation.safetensors" in told and "or set val_tokens to 0" in told
    assert check(make_run("without", train={"val_tokens": 0})).returncode == 0


@pytest.mark.parametrize("dataset", ["nowhere", "data/one", "builtin/nothing", "hub:nonsense"])
def test_a_dataset_that_is_nowhere_is_missing(check, call_program, make_run, dataset):
    run = make_run(train={"dataset": dataset})
    both_refuse(check, call_program, run)
    assert "data: missing\n" in check(run).stdout


def test_a_hub_dataset_will_be_fetched(check, make_run, serve, tmp_path):
    hub = serve(Hub)
    finished = check(make_run(train={"dataset": "hub:owner/both"}))
    assert finished.returncode == 0 and "data: will be fetched (4.2 kB, " in finished.stdout
    assert hub.downloads == [] and not (tmp_path / "data").exists()


@pytest.mark.parametrize(("available", "wanted"), [(20_001, 1_000_000), (20_001, 20_001), (PER_STEP, 1), (2, 1)])
def test_more_tokens_than_there_are_say_how_many_steps_there_are(
    check, call_program, make_run, token_folder, available, wanted
):
    write_tokens(token_folder, available)
    steps = (available - 1) // PER_STEP
    told = both_refuse(check, call_program, make_run(train={"min_train_tokens": wanted}))
    needed = -(-wanted // PER_STEP) * PER_STEP + 1
    assert f"expected at least {needed:,} tokens, got {available:,}: enough for {steps:,} step" in told
    assert not steps or f"use min_train_tokens {steps * PER_STEP} or -1" in told


@pytest.mark.parametrize("lacking", [0, 1])
def test_one_token_decides(check, call_program, make_run, token_folder, lacking):
    write_tokens(token_folder, 3 * PER_STEP + 1 - lacking)
    run = make_run(train={"min_train_tokens": 3 * PER_STEP})
    if lacking:
        assert "enough for 2 steps" in both_refuse(check, call_program, run)
    else:
        assert check(run).returncode == 0


def test_no_step_at_all_is_refused(check, call_program, make_run, token_folder):
    write_tokens(token_folder, PER_STEP)
    told = both_refuse(check, call_program, make_run(train={"min_train_tokens": -1}))
    assert f"too few tokens for one global step, which takes {PER_STEP} and a target, got {PER_STEP}" in told


@pytest.mark.parametrize("changes", [{"val_tokens": 3}, {"start_val_token": 10**5}, {"start_train_token": 1999}])
def test_what_else_the_lengths_of_the_data_forbid_is_refused(check, call_program, make_run, changes):
    assert "expected at least" in both_refuse(check, call_program, make_run(train=changes))


def test_a_vocabulary_smaller_than_the_datas_is_refused(check, call_program, make_run):
    told = both_refuse(check, call_program, make_run(train={"dataset": "builtin/every-token/bytes"}))
    assert "vocab_size=101" in told and "use vocab_size 257 or more" in told


@pytest.mark.parametrize("weights", ["nowhere.safetensors", "tokens/train.safetensors"])
def test_initial_weights_that_are_none_are_refused(check, call_program, make_run, tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    told = both_refuse(check, call_program, make_run(train={"initial_weights": weights}))
    assert weights in told


@pytest.mark.parametrize("change", [{"seed": 1}, {"learning_rate": 0.5}], ids=str)
def test_a_run_that_cannot_be_resumed_is_refused(check, call_program, make_run, change):
    run = make_run(train={"min_train_tokens": PER_STEP})
    assert call_program("train", run).returncode == 0
    assert check(run).returncode == 0
    keys = json.loads((run / "train.json").read_text())
    (run / "train.json").write_text(json.dumps(keys | change))
    told = complaint(check(run))
    assert complaint(call_program("train", run)) == told


@pytest.mark.parametrize("key", COUNTS)
def test_no_size_is_too_absurd_for_a_check(check, make_run, key):
    for number, size in enumerate(SIZES):
        outer, dot, inner = key.partition(".")
        model, train = {}, {}
        if outer == "model":
            model = {inner: size} | ({"emb_dim": size} if inner == "n_heads" else {})
        else:
            train = {outer: {"data": 1} | {inner: size}} if dot else {key: size}
        finished = check(make_run(f"run-{number}", model=model, train=train))
        is_harmless = (key in HARMLESS and size < 2**63) or (key, size) in FINE
        assert finished.returncode == (0 if is_harmless else 2), finished.stderr
        assert is_harmless or complaint(finished)


@pytest.mark.parametrize(
    ("model", "train"),
    [
        *(({"emb_dim": size}, {}) for size in (10**5, 10**6, 10**9, 2**31, 10**12, 2**62)),
        *(({}, {"epochs": size}) for size in (10**9, 2**31, 10**12, 10**15)),
    ],
    ids=str,
)
def test_training_refuses_absurd_sizes_in_the_same_words(check, call_program, make_run, model, train):
    both_refuse(check, call_program, make_run(model=model, train=train))


def test_tokens_that_are_not_here_yet_must_fit(check, make_run):
    run = make_run(
        model=TINY_MODEL | {"vocab_size": 257},
        train={"dataset": "builtin/every-token/bytes", "microbatch_size": 10**12},
    )
    assert "tokens do not fit into this machine's memory" in complaint(check(run))
