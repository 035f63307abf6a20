"""Token files in host RAM, and the rule that turns a step number into arrays."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from config import MEMORY_BYTES, ModelConfig, TrainConfig, tokens_per_global_step
from tensor_files import open_tensors

INTEGER_TYPES = ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
ENTROPY_SAMPLE = 50_000_000  # tokens; counting all of a large file would take minutes


class Batch(NamedTuple):
    """What one compiled call consumes: A microbatches of one global step."""

    inputs: Any  # (A, B, T), uint16
    targets: Any  # (A, B, T), uint16
    position: Any  # (2,), uint32: global step, and which microbatch of it comes first


def count_tokens(path: Path) -> int:
    """Read the length of the `tokens` tensor from the header of a safetensors file; see `load_tokens`."""
    with _open_tokens(path) as file:
        return file.get_slice("tokens").get_shape()[0]


def load_tokens(path: Path, vocab_size: int, start: int = 0, count: int | None = None) -> jax.Array:
    """Load `count` tokens from `start` on (None: all that follow) and commit them to host memory.

    Returns token ids, shape (count,), uint16, each below `vocab_size`.
    Raises ValueError when the tensor `tokens` is missing, not one-dimensional, not of an integer type, too short, or
    has an id that is out of range (JAX would clamp it without a word).
    """
    available = count_tokens(path)
    stop = available if count is None else start + count
    if stop > available or start >= available:
        raise ValueError(
            f"{path}: expected at least {max(start + 1, stop):,} tokens, got {available:,}; use fewer tokens"
        )
    with _open_tokens(path) as file:
        tensor = file.get_slice("tokens")
        if (stop - start) * int(tensor.get_dtype()[1:]) // 8 > MEMORY_BYTES:  # U16: 16 bits
            raise ValueError(f"{path}: {stop - start:,} tokens do not fit into this machine's memory; use fewer tokens")
        ids = tensor[start:stop]
    _check_ids(path, ids, vocab_size, start)
    return jax.device_put(ids.astype(np.uint16, copy=False), jax.local_devices(backend="cpu")[0])


def _open_tokens(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: expected a token file, found nothing; put a safetensors file with `tokens` there")
    file = open_tensors(path)
    names = list(file.keys())
    if "tokens" not in names:
        found = repr(", ".join(names[:5]))[1:-1][:200] or "none"  # a name may hold anything
        raise ValueError(f"{path}: expected a tensor named 'tokens', got {found}; rename it")
    tensor = file.get_slice("tokens")
    if len(tensor.get_shape()) != 1 or tensor.get_dtype() not in INTEGER_TYPES:
        raise ValueError(
            f"{path}: expected 'tokens' to be one-dimensional integers, "
            f"got shape {str(tuple(tensor.get_shape()))[:100]} of {tensor.get_dtype()}; flatten and cast it"
        )
    return file


def _check_ids(path: Path, ids: np.ndarray, vocab_size: int, start: int) -> None:
    if ids.size == 0 or (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
        return
    bad = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
    raise ValueError(
        f"{path}: token {start + bad:,} is id {ids[bad]}, expected ids from 0 to {vocab_size - 1}; "
        "tokenize for this vocabulary or raise vocab_size"
    )


@dataclass(frozen=True)
class TokenStream:
    """The tokens of one split that a run uses; `calls(step)` is a pure function of this and the step."""

    tokens: jax.Array  # (num_tokens,), uint16, committed to host memory
    batch_shape: tuple[int, int, int]  # K microbatches, B sequences, T positions: one global step
    objective: Literal["next-token", "a-to-a"]
    seed: int
    shuffle: bool

    @property
    def num_steps(self) -> int:
        """Whole global steps in one epoch; one token more than they hold is the last target."""
        return (self.tokens.size - 1) // int(np.prod(self.batch_shape))

    def positions(self, step: int) -> np.ndarray:
        """Return where the sequences of global step `step` begin: indices of tokens, (K, B)."""
        microbatches, sequences, length = self.batch_shape
        epoch, step_in_epoch = divmod(step, self.num_steps)
        per_step = microbatches * sequences
        chosen = np.arange(step_in_epoch * per_step, (step_in_epoch + 1) * per_step)
        if self.shuffle or epoch:
            chosen = _sequence_order(self.seed, epoch, self.num_steps * per_step)[chosen]
        return (chosen * length).reshape(microbatches, sequences)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Cut the inputs and targets of global step `step` (from 0), each (K, B, T), uint16.

        Every epoch takes all sequences, in a seeded order of its own; the first one in file order unless `shuffle`.
        """
        host_tokens, length = np.asarray(self.tokens), self.batch_shape[-1]  # a view
        windows = np.stack([host_tokens[first : first + length + 1] for first in self.positions(step).flat])
        windows = windows.reshape(*self.batch_shape[:2], length + 1)
        inputs = windows[..., :-1]
        return inputs, inputs if self.objective == "a-to-a" else windows[..., 1:]

    def calls(self, step: int, calls_per_step: int = 1) -> list[Batch]:
        """Split the batch of a global step into the equal parts that its compiled calls consume."""
        inputs, targets = (np.split(array, calls_per_step) for array in self.batch(step))
        per_call = self.batch_shape[0] // calls_per_step
        return [Batch(inputs[i], targets[i], np.array([step, i * per_call], np.uint32)) for i in range(calls_per_step)]


@functools.lru_cache(maxsize=1)
def _sequence_order(seed: int, epoch: int, num_sequences: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_sequences)


def open_streams(
    folder: Path, model: ModelConfig, train: TrainConfig, steps_per_epoch: int, devices: int = 1
) -> tuple[TokenStream, TokenStream | None]:
    """Load what a run trains on, and what it validates on (None where there is no validation file or no wish).

    Validation takes at most `val_tokens`, in whole batches of `microbatch_size` sequences.
    Raises ValueError when a file is wrong (see `load_tokens`) or too short.
    """
    count = steps_per_epoch * tokens_per_global_step(model, train, devices) + 1
    tokens = load_tokens(folder / "train.safetensors", model.vocab_size, train.start_train_token, count)
    shape = (train.gradient_accumulation_steps, train.microbatch_size * devices, model.context_length)
    train_stream = TokenStream(tokens, shape, train.objective, train.seed, train.shuffle)
    path = folder / "validation.safetensors"
    if train.val_tokens == 0 or not path.exists():
        return train_stream, None
    available = count_tokens(path) - train.start_val_token - 1  # the last one is a target only
    per_batch = train.microbatch_size * model.context_length
    batches = (available if train.val_tokens == -1 else min(train.val_tokens, available)) // per_batch
    if batches < 1:
        raise ValueError(
            f"{path}: expected {per_batch:,} tokens and one more for a validation batch, got val_tokens="
            f"{train.val_tokens:,} of {max(0, available):,} from start_val_token on; change them (0: no validation)"
        )
    tokens = load_tokens(path, model.vocab_size, train.start_val_token, batches * per_batch + 1)
    return train_stream, TokenStream(
        tokens, (1, train.microbatch_size, shape[-1]), train.objective, train.seed, shuffle=False
    )


def fingerprint(tokens: jax.Array) -> str:
    """Name the content of a token range: its length and the SHA-256 of its bytes."""
    return f"{tokens.size} tokens, sha256 {hashlib.sha256(np.asarray(tokens).data).hexdigest()}"


def unigram_entropy(tokens: jax.Array) -> float:
    """Return the entropy of the token frequencies in nats: the loss of a model that knows nothing else.

    Counts the first 50 million tokens.
    """
    counts = np.bincount(np.asarray(tokens[:ENTROPY_SAMPLE]))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
