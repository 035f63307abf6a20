"""Token files, and the rule that turns a step number into arrays."""

import dataclasses
import hashlib
import math
import os

import jax
import numpy as np
import pytest
from helpers import CONTEXT_LENGTH, VOCAB_SIZE, random_tokens, tiny_model_config, tiny_train_config
from safetensors.numpy import save_file

from outside_in.data.loader import TokenStream, fingerprint, load_tokens, open_streams, unigram_loss
from outside_in.data.token_files import HEADER_BYTES, TokenWriter, count_tokens
from outside_in.runtime.machine import memory_bytes

K, B, T = 4, 2, 3
STEPS = 5
INTEGER_TYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]


def stream(objective="next-token", seed=42, extra=0, shuffle=True):
    """Tokens that are their own positions, so that a batch says where it was read."""
    tokens = np.arange(STEPS * K * B * T + 1 + extra, dtype=np.uint16)
    return TokenStream(jax.device_put(tokens), (K, B, T), objective, seed, shuffle)


def epoch_inputs(tokens, epoch):
    """All inputs of an epoch as sequences, in the order in which they come: (steps * K * B, T)."""
    return np.concatenate([tokens.batch(epoch * STEPS + step)[0].reshape(-1, T) for step in range(STEPS)])


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "train.safetensors"

    def write(tokens, name="tokens"):
        save_file({name: np.asarray(tokens)}, path)
        return path

    return write


def refusal(path, *arguments, **keywords):
    with pytest.raises(ValueError) as caught:
        load_tokens(path, *arguments, **keywords)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    return line


# Batches


@pytest.mark.parametrize("objective", ["next-token", "a-to-a"])
@pytest.mark.parametrize("step", [0, 3, STEPS + 2])
def test_a_batch_is_a_pure_function_of_its_step(objective, step):
    tokens = stream(objective)
    first = tokens.batch(step)
    for other in (0, 7, 3 * STEPS):
        tokens.batch(other)
    for again in (tokens.batch(step), stream(objective).batch(step)):
        assert all((old == new).all() for old, new in zip(first, again))


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_the_targets_are_the_tokens_that_come_next(epoch):
    for step in range(STEPS):
        inputs, targets = stream().batch(epoch * STEPS + step)
        assert inputs.shape == targets.shape == (K, B, T)
        assert inputs.dtype == targets.dtype == np.uint16
        assert (targets == inputs + 1).all()
        assert (inputs[..., 0] % T == 0).all()


@pytest.mark.parametrize("step", [0, STEPS])
def test_the_targets_of_a_to_a_are_its_inputs(step):
    inputs, targets = stream("a-to-a").batch(step)
    assert (targets == inputs).all()
    assert (inputs == stream().batch(step)[0]).all()


def test_every_epoch_tiles_the_file_once_in_an_order_of_its_own():
    file_order = np.arange(STEPS * K * B * T).reshape(-1, T)
    epochs = [epoch_inputs(stream(), epoch) for epoch in range(4)]
    assert stream().num_steps == STEPS
    for sequences in epochs:
        assert (np.sort(sequences, axis=0) == file_order).all()
    assert len({sequences.tobytes() for sequences in [file_order, *epochs]}) == 5


def test_without_shuffling_the_first_epoch_reads_the_file_in_its_order_and_later_ones_their_own():
    tokens = stream(shuffle=False)
    in_order = np.arange(STEPS * K * B * T)
    assert (epoch_inputs(tokens, 0).ravel() == in_order).all()
    assert tokens.batch(STEPS - 1)[1].max() == tokens.tokens.size - 1
    later = [epoch_inputs(tokens, epoch).ravel() for epoch in (1, 2)]
    assert all((np.sort(epoch) == in_order).all() for epoch in later)
    assert len({epoch.tobytes() for epoch in (in_order, *later)}) == 3


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_seed_and_nothing_else_decides_the_order(epoch):
    assert (epoch_inputs(stream(seed=1), epoch) == epoch_inputs(stream(seed=1), epoch)).all()
    assert (epoch_inputs(stream(seed=1), epoch) != epoch_inputs(stream(seed=2), epoch)).any()


@pytest.mark.parametrize("extra", [0, 1, K * B * T - 1])
def test_tokens_that_do_not_fill_a_step_are_left_out(extra):
    assert stream(extra=extra).num_steps == STEPS
    assert (epoch_inputs(stream(extra=extra), 1) == epoch_inputs(stream(), 1)).all()


def test_later_epochs_draw_from_all_whole_sequences_and_take_none_twice():
    spare = 2
    tokens = dataclasses.replace(stream(extra=spare * T), spare=spare)
    assert tokens.num_steps == STEPS
    assert (epoch_inputs(tokens, 0) == epoch_inputs(stream(), 0)).all()
    later = [epoch_inputs(tokens, epoch)[:, 0] // T for epoch in range(1, 30)]
    assert {len(set(sequences)) for sequences in later} == {STEPS * K * B}
    missed = [set(range(STEPS * K * B + spare)).difference(sequences) for sequences in later]
    assert set().union(*missed) > {STEPS * K * B, STEPS * K * B + 1}
    assert len(set(map(frozenset, missed))) > 10


@pytest.mark.parametrize("step", [0, STEPS + 1])
@pytest.mark.parametrize("calls_per_step", [1, 2, 4])
def test_the_calls_of_a_step_are_its_microbatches_in_order(calls_per_step, step):
    inputs, targets = stream().batch(step)
    calls = stream().calls(step, calls_per_step)
    assert len(calls) == calls_per_step
    assert (np.concatenate([call.inputs for call in calls]) == inputs).all()
    assert (np.concatenate([call.targets for call in calls]) == targets).all()
    assert {call.inputs.shape for call in calls} == {(K // calls_per_step, B, T)}


@pytest.mark.parametrize("calls_per_step", [1, 2, 4])
def test_the_position_of_a_call_is_its_step_and_first_microbatch(calls_per_step):
    calls = stream().calls(7, calls_per_step)
    assert [call.position.tolist() for call in calls] == [[7, first] for first in range(0, K, K // calls_per_step)]
    assert {call.position.dtype for call in calls} == {np.dtype(np.uint32)}


# Token files


@pytest.mark.parametrize("dtype", INTEGER_TYPES)
def test_any_integers_become_uint16_committed_to_the_cpu(dtype, token_file):
    ids = random_tokens(100).astype(dtype)
    tokens = load_tokens(token_file(ids), VOCAB_SIZE)
    assert (tokens.dtype, tokens.shape) == (np.uint16, (100,))
    assert (np.asarray(tokens) == ids).all()
    assert tokens.committed
    assert tokens.devices() == {jax.local_devices(backend="cpu")[0]}


@pytest.mark.parametrize(("start", "count"), [(0, None), (0, 1), (0, 100), (10, None), (10, 20), (99, 1), (99, None)])
def test_a_range_is_read_from_its_start(start, count, token_file):
    tokens = load_tokens(token_file(np.arange(100, dtype=np.uint16)), VOCAB_SIZE, start, count)
    assert np.asarray(tokens).tolist() == list(range(100))[start : None if count is None else start + count]


def test_the_largest_vocabulary_loses_no_id(token_file):
    ids = np.array([0, 32_768, 65_535], np.int32)
    assert np.asarray(load_tokens(token_file(ids), 65_536)).tolist() == ids.tolist()


def test_tokens_are_counted_as_many_as_they_are(token_file):
    assert count_tokens(token_file(random_tokens(123))) == 123


@pytest.mark.parametrize(
    ("start", "count", "needed"), [(0, 101, "101"), (90, 11, "101"), (100, 1, "101"), (5_000, 1, "5,001")]
)
def test_a_file_that_is_too_short_says_how_many_tokens_are_needed(start, count, needed, token_file):
    line = refusal(token_file(random_tokens(100)), VOCAB_SIZE, start, count)
    assert f"expected at least {needed} tokens, got 100" in line


@pytest.mark.parametrize(("num_tokens", "start"), [(0, 0), (100, 100), (100, 101)])
def test_a_range_without_any_token_is_refused(num_tokens, start, token_file):
    refusal(token_file(random_tokens(num_tokens)), VOCAB_SIZE, start)


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize(
    ("dtype", "bad", "vocab_size"),
    [
        ("uint16", VOCAB_SIZE, VOCAB_SIZE),
        ("uint16", 65_535, 65_535),
        ("int64", -1, VOCAB_SIZE),
        ("int64", -(2**40), VOCAB_SIZE),
        ("int32", 65_536, 65_536),
        ("uint64", 2**63 + 5, VOCAB_SIZE),
        ("int8", -1, VOCAB_SIZE),
    ],
)
def test_an_id_that_is_out_of_range_is_named_with_its_place_in_the_file(dtype, bad, vocab_size, start, token_file):
    ids = np.zeros(2_000, dtype)
    ids[[1_234, 1_900]] = bad
    line = refusal(token_file(ids), vocab_size, start)
    assert f": token 1,234 is id {bad}, expected ids from 0 to {vocab_size - 1};" in line


def test_an_id_outside_the_range_that_is_read_does_no_harm(token_file):
    path = token_file(np.array([999, 1, 2, 999], np.uint16))
    assert np.asarray(load_tokens(path, VOCAB_SIZE, 1, 2)).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (np.zeros((2, 3), np.uint16), r"shape (2, 3) of U16"),
        (np.zeros((1, 6), np.uint16), r"shape (1, 6) of U16"),
        (np.array(3, np.uint16), r"shape () of U16"),
        (np.zeros(6, np.float32), r"shape (6,) of F32"),
        (np.zeros(6, bool), r"shape (6,) of BOOL"),
    ],
)
def test_what_is_no_row_of_integers_is_refused(tokens, found, token_file):
    assert f"expected 'tokens' to be one-dimensional integers, got {found};" in refusal(token_file(tokens), VOCAB_SIZE)


def test_a_file_without_tokens_names_what_it_has(token_file):
    assert "expected a tensor named 'tokens', got ids;" in refusal(token_file(random_tokens(9), "ids"), VOCAB_SIZE)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["missing", "folder"])
def test_a_missing_file_is_refused(make, tmp_path):
    make(tmp_path / "train.safetensors")
    assert "expected a token file, found nothing" in refusal(tmp_path / "train.safetensors", VOCAB_SIZE)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:4],
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: bytes(range(256)) * 20,
        lambda content: b"these are no safetensors but words, words, words",
        lambda content: (20).to_bytes(8, "little") + b"not JSON at all.....",
    ],
    ids=["empty", "4 bytes", "20 bytes", "one byte less", "one byte more", "garbage", "text", "no header"],
)
def test_a_damaged_file_is_refused(damage, token_file):
    path = token_file(random_tokens(100))
    path.write_bytes(damage(path.read_bytes()))
    assert "not a readable safetensors file" in refusal(path, VOCAB_SIZE)


# The streams of a run

TOKENS_PER_STEP = 4 * 2 * CONTEXT_LENGTH
VALIDATION_BATCH = 2 * CONTEXT_LENGTH


def open_tiny(folder, steps=12, **changes):
    return open_streams(folder, tiny_model_config(), tiny_train_config(**changes), steps)


def test_training_takes_whole_steps_and_one_last_target(token_folder):
    train, _ = open_tiny(token_folder, steps=12)
    assert train.tokens.size == 12 * TOKENS_PER_STEP + 1
    assert train.num_steps == 12
    assert train.batch(0)[0].shape == (4, 2, CONTEXT_LENGTH)
    assert (np.asarray(train.tokens) == random_tokens(2000)[: train.tokens.size]).all()


def test_each_split_starts_where_the_config_says(token_folder):
    train, validation = open_tiny(token_folder, start_train_token=7, start_val_token=9)
    assert (np.asarray(train.tokens) == random_tokens(2000)[7:][: train.tokens.size]).all()
    assert (np.asarray(validation.tokens) == random_tokens(200, seed=1)[9:][: validation.tokens.size]).all()


@pytest.mark.parametrize("objective", ["next-token", "a-to-a"])
def test_both_splits_have_the_objective_and_seed_of_the_run(token_folder, objective):
    streams = open_tiny(token_folder, objective=objective, seed=7)
    assert [(split.objective, split.seed) for split in streams] == [(objective, 7)] * 2


@pytest.mark.parametrize(
    ("val_tokens", "start", "batches"),
    [(32, 0, 1), (63, 0, 1), (64, 0, 2), (10**6, 0, 6), (-1, 0, 6), (-1, 7, 6), (-1, 8, 5), (-1, 167, 1)],
)
def test_validation_takes_at_most_val_tokens_in_whole_batches(token_folder, val_tokens, start, batches):
    _, validation = open_tiny(token_folder, val_tokens=val_tokens, start_val_token=start)
    assert validation.num_steps == batches
    assert validation.tokens.size == batches * VALIDATION_BATCH + 1
    assert validation.batch(0)[0].shape == (1, 2, CONTEXT_LENGTH)


def test_there_is_no_validation_without_the_wish_for_it(token_folder):
    assert open_tiny(token_folder, val_tokens=0)[1] is None


def test_there_is_no_validation_without_its_file(token_folder):
    (token_folder / "validation.safetensors").unlink()
    assert open_tiny(token_folder)[1] is None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"val_tokens": 31}, "expected at least 32 tokens for a validation batch, got val_tokens=31 of 199"),
        ({"start_val_token": 168}, "got val_tokens=64 of 31 after start_val_token"),
        ({"start_val_token": 168, "val_tokens": -1}, "got val_tokens=-1 of 31 after start_val_token"),
        ({"start_val_token": 10**9}, "got val_tokens=64 of 0 after start_val_token"),
        ({"start_train_token": 1999}, "expected at least 3,536 tokens, got 2,000"),
    ],
)
def test_too_few_tokens_are_refused_in_one_line(token_folder, changes, line):
    with pytest.raises(ValueError) as caught:
        open_tiny(token_folder, **changes)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_ids_beyond_the_vocabulary_are_refused_in_either_split(token_folder, split):
    save_file({"tokens": np.full(2000, VOCAB_SIZE, np.uint16)}, token_folder / f"{split}.safetensors")
    with pytest.raises(ValueError, match=rf"{split}\.safetensors: token 0 is id {VOCAB_SIZE}"):
        open_tiny(token_folder)


# What tokens are


def test_a_fingerprint_is_the_length_and_sha256_of_the_bytes():
    tokens = np.array([1, 256, 50_256], np.uint16)
    digest = hashlib.sha256(bytes.fromhex("0100 0001 50c4")).hexdigest()
    assert fingerprint(jax.device_put(tokens)) == f"3 tokens, sha256 {digest}"


@pytest.mark.parametrize("place", [0, 57, 99])
def test_a_fingerprint_changes_with_every_token(place):
    tokens = random_tokens(100)
    changed = tokens.copy()
    changed[place] ^= 1
    assert fingerprint(jax.device_put(tokens)) == fingerprint(jax.device_put(tokens.copy()))
    assert fingerprint(jax.device_put(tokens)) != fingerprint(jax.device_put(changed))


@pytest.mark.parametrize(
    ("train", "judged", "loss"),  # how often each token occurs
    [
        ([7], [7], 0.0),
        ([5, 5], [5, 5], math.log(2)),
        ([3] * 101, [3] * 101, math.log(101)),
        ([1, 3], [1, 3], math.log(3) - 0.75 * math.log(2)),
        ([7, 3, 1, 1], [8, 4, 2, 2], 1.75 * math.log(2)),
        ([3, 1, 0, 0], [0, 0, 1, 0], 3 * math.log(2)),
    ],
)
def test_the_unigram_loss_is_that_of_the_formula(train, judged, loss):
    rng = np.random.default_rng(0)
    tokens = [rng.permutation(np.repeat(np.arange(len(x), dtype=np.uint16), x)) for x in (train, judged)]
    assert unigram_loss(*map(jax.device_put, tokens), len(train)) == pytest.approx(loss, abs=1e-12)


def test_a_token_file_larger_than_memory_gives_the_range_that_is_asked_for(tmp_path):
    path = tmp_path / "train.safetensors"
    writer = TokenWriter(path)
    writer.num_tokens = 2 * memory_bytes() // 2  # twice the memory, all of it a hole in the file
    writer.finish()
    with path.open("r+b") as file:
        file.truncate(HEADER_BYTES + 2 * writer.num_tokens)
        file.seek(-6, os.SEEK_END)
        file.write(np.array([7, 8, 9], np.uint16).tobytes())
    assert count_tokens(path) == writer.num_tokens
    assert load_tokens(path, 10, writer.num_tokens - 4).tolist() == [0, 7, 8, 9]
