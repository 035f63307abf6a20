"""Token files in host memory, and the batch of every global step."""

import bisect
import functools
import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from outside_in.config import ModelConfig, TrainConfig
from outside_in.data.run_length import find_lengths
from outside_in.data.token_files import SLICE_TOKENS, TRAIN, VALIDATION, map_tokens, read_tokens
from outside_in.runtime.mesh import AXES

ENTROPY_SAMPLE = 50_000_000  # tokens; counting all of a large file would take minutes


class Batch(NamedTuple):
    """The input of one compiled call: A microbatches of one global step."""

    inputs: Any  # (A, B, T), uint16
    targets: Any  # (A, B, T), uint16
    position: Any  # (2,), uint32: global step, and which microbatch of it comes first


BATCH_SPECS = Batch(PartitionSpec(None, AXES), PartitionSpec(None, AXES), PartitionSpec())


def load_tokens(path: Path, vocab_size: int, start: int = 0, count: int | None = None) -> jax.Array:
    """Load tokens into host memory; see `token_files.read_tokens`. Returns (count,), uint16."""
    ids = read_tokens(path, vocab_size, start, count).astype(np.uint16, copy=False)
    return jax.device_put(ids, jax.local_devices(backend="cpu")[0])


@dataclass(frozen=True)
class TokenStream:
    """The tokens of one split that a run uses. `calls(step)` is a pure function of this and the step."""

    tokens: Any  # (num_tokens,), uint16, in host memory; with `local_sequences` a file, read as needed
    batch_shape: tuple[int, int, int]  # K microbatches, B sequences, T positions: one global step
    objective: Literal["next-token", "a-to-a"]
    seed: int
    shuffle: bool
    local_sequences: tuple[int, int] | None = None  # of the B sequences those that this process reads; None: all
    grown: tuple[int, ...] = ()  # steps of the first epoch at which it was made longer: each part has its own order
    spare: int = 0  # whole sequences after those of the whole steps: later epochs draw from them, too
    _cache: dict[int, np.ndarray] = field(default_factory=dict)  # what it has read, by epoch, when these are not all

    @property
    def num_steps(self) -> int:
        """Return the whole global steps in one epoch. The token after them is the last target."""
        return (self.tokens.size - 1 - self.spare * self.batch_shape[-1]) // math.prod(self.batch_shape)

    def positions(self, step: int) -> np.ndarray:
        """Return where the sequences of global step `step` begin. The positions are indices of tokens, (K, B)."""
        microbatches, sequences, length = self.batch_shape
        epoch, step_in_epoch = divmod(step, self.num_steps)
        per_step = microbatches * sequences
        borders = [0, *(() if epoch else self.grown), self.num_steps]
        part = bisect.bisect_right(borders, step_in_epoch) - 1
        first, last = borders[part : part + 2]
        chosen = np.arange((step_in_epoch - first) * per_step, (step_in_epoch - first + 1) * per_step)
        if self.shuffle or epoch:
            count = (last - first) * per_step + (self.spare if epoch else 0)
            chosen = _sequence_order(self.seed, epoch, part, count)[chosen]
        return ((chosen + first * per_step) * length).reshape(microbatches, sequences)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs and targets of global step `step`, counted from 0.

        Both are (K, B, T), or (K, local sequences, T). Every epoch has its own seeded order; the first one takes the
        sequences of its whole steps in file order unless `shuffle`, later ones draw from all sequences.
        """
        host_tokens, length = np.asarray(self.tokens), self.batch_shape[-1]  # a view
        if self.local_sequences is None:
            windows = _windows(host_tokens, self.positions(step), length)
        else:
            epoch, step_in_epoch = divmod(step, self.num_steps)
            windows = self._local_windows(epoch)[step_in_epoch]
        inputs = windows[..., :-1]
        return inputs, inputs if self.objective == "a-to-a" else windows[..., 1:]

    def _local_windows(self, epoch: int) -> np.ndarray:
        """Read this process's part of an epoch into memory. Returns (steps, K, local sequences, T + 1)."""
        if epoch not in self._cache:
            assert self.local_sequences
            steps = range(epoch * self.num_steps, (epoch + 1) * self.num_steps)
            positions = np.stack([self.positions(step)[:, slice(*self.local_sequences)] for step in steps])
            self._cache.clear()
            self._cache[epoch] = _windows(self.tokens, positions, self.batch_shape[-1])
        return self._cache[epoch]

    def calls(self, step: int, calls_per_step: int = 1) -> list[Batch]:
        """Return the batches of a global step, one for each compiled call."""
        inputs, targets = (np.split(array, calls_per_step) for array in self.batch(step))
        per_call = self.batch_shape[0] // calls_per_step
        return [Batch(inputs[i], targets[i], np.array([step, i * per_call], np.uint32)) for i in range(calls_per_step)]


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Put a batch on the devices.

    Each device gets its sequences of every microbatch; each process brings those of its devices.
    """
    return Batch(
        *(
            jax.make_array_from_process_local_data(NamedSharding(mesh, spec), array)
            for array, spec in zip(batch, BATCH_SPECS)
        )
    )


def _windows(tokens: np.ndarray, positions: np.ndarray, length: int) -> np.ndarray:
    """Cut out `length` + 1 tokens from each position; returns (…, length + 1)."""
    windows = np.stack([tokens[first : first + length + 1] for first in positions.flat]).astype(np.uint16, copy=False)
    return windows.reshape(*positions.shape, length + 1)


@functools.lru_cache(maxsize=1)
def _sequence_order(seed: int, epoch: int, part: int, num_sequences: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, part] if part else [seed, epoch]).permutation(num_sequences)


def open_streams(
    folder: Path,
    model: ModelConfig,
    train: TrainConfig,
    steps_per_epoch: int,
    devices: int = 1,
    local_sequences: tuple[int, int] | None = None,
    *,
    grown: tuple[int, ...] = (),
    spare: int = 0,
) -> tuple[TokenStream, TokenStream | None]:
    """Load the tokens that a run trains on and validates on.

    The second stream is None without a validation file, or with `val_tokens` 0. Validation takes at most `val_tokens`,
    in whole batches of `microbatch_size` sequences. With `local_sequences` only these sequences of each microbatch are
    read into memory.
    Raises ValueError when a file is wrong (see `load_tokens`) or too short.
    """
    count, validation_count = find_lengths(folder, model, train, steps_per_epoch, devices)
    count += spare * model.context_length
    load = load_tokens if local_sequences is None else map_tokens
    tokens = load(folder / TRAIN, model.vocab_size, train.start_train_token, count)
    shape = (train.gradient_accumulation_steps, train.microbatch_size * devices, model.context_length)
    train_stream = TokenStream(tokens, shape, train.objective, train.seed, train.shuffle, local_sequences, grown, spare)
    if not validation_count:
        return train_stream, None
    tokens = load_tokens(folder / VALIDATION, model.vocab_size, train.start_val_token, validation_count)
    return train_stream, TokenStream(
        tokens, (1, train.microbatch_size, shape[-1]), train.objective, train.seed, shuffle=False
    )


def fingerprint(tokens: Any) -> str:
    """Return a token range's length, and the SHA-256 of its bytes."""
    digest = hashlib.sha256()
    for first in range(0, tokens.size, SLICE_TOKENS):
        digest.update(np.asarray(tokens)[first : first + SLICE_TOKENS].astype("<u2", copy=False).data)
    return f"{tokens.size} tokens, sha256 {digest.hexdigest()}"


def unigram_loss(train: Any, judged: Any, vocab_size: int) -> float:
    """Return the loss on tokens of a model that knows only how frequent each token is in training, in nats.

    That is the cross-entropy of `judged` under the frequencies of `train`, each counted once more than it occurs, so
    that none is 0. Counts the first 50 million tokens of each.
    """
    known, found = (np.bincount(np.asarray(x[:ENTROPY_SAMPLE]), minlength=vocab_size) for x in (train, judged))
    return float(found @ -np.log((known + 1) / (known.sum() + vocab_size)) / found.sum())
