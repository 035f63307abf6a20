"""Evaluates models on the same held-out tokens and on HellaSwag."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from model import GPTModel, count_parameters
from outside_in.config import ModelConfig, TrainConfig
from outside_in.config_files import load_config, parse_config
from outside_in.data.loader import fingerprint, load_tokens
from outside_in.data.sources import dataset_folder, dataset_tokenizer
from outside_in.data.token_files import count_tokens
from outside_in.data.tokenizer import MAX_VOCAB_SIZE, Tokenizer, check_same
from outside_in.inference.evaluation import num_windows, standard_error, windowed_losses
from outside_in.inference.hellaswag import Question, answer, count_longer, read_questions
from outside_in.inference.load import find_tokenizer, find_weights, load_saved_model, need_tokenizer
from outside_in.overrides import as_trained
from outside_in.runtime.devices import initialize_devices
from outside_in.runtime.log import log
from outside_in.runtime.progress import Progress
from outside_in.storage.checkpoint_folder import find_checkpoints
from outside_in.storage.run_directory import RunDirectory
from outside_in.weights import read_model_json

BLOCK = 1024  # tokens that count as one measurement, since neighbors are alike
TOKENS_PER_BATCH = 8192
MAX_EXPONENT = 700  # e to a larger power is beyond float64


def evaluate(args: argparse.Namespace) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Evaluate the models of `evaluate.py`'s arguments.

    Returns which tokens they were evaluated on (None: HellaSwag alone), and a record of each model.
    """
    files = [find_weights(path) for path in args.models]
    questions = read_questions(args.hellaswag) if args.hellaswag else None
    subject, tokens = None, None
    if args.dataset or not questions:
        subject, tokens = read_tokens(args, files)
    log.info(initialize_devices())
    rows: list[dict[str, Any]] = []
    first = None
    for path, file in zip(args.models, files, strict=True):
        log.info(f"evaluating {file}")
        model = load_saved_model(file)
        rows.append({"model": str(path), "weights": str(file), "parameters": count_parameters(model.config)})
        if tokens is not None:
            losses = losses_of(model, tokens, args)
            check_finite(path, losses)
            rows[-1] |= summary(losses, first, count_bytes(find_tokenizer(file), tokens))
            first = losses if first is None else first
        if questions:
            rows[-1] |= hellaswag(path, model, questions, need_tokenizer(file))
    return subject, rows


def read_tokens(args: argparse.Namespace, files: list[Path]) -> tuple[dict[str, Any], np.ndarray]:
    """Return which tokens all models are evaluated on, and the tokens."""
    vocab_size = min(parse_config(read_model_json(file), ModelConfig, str(file)).vocab_size for file in files)
    dataset = args.dataset or dataset_of(args.models[0])
    path = dataset_folder(dataset) / f"{args.split}.safetensors"
    if not args.dataset:
        notice_other_content(args.models[0], path.parent)
    of_data = dataset_tokenizer(dataset)
    for model, file in zip(args.models, files, strict=True):
        check_same(find_tokenizer(file), of_data, str(model), dataset)
    wanted = count_tokens(path) - args.start_token if args.tokens is None else args.tokens + 1
    if wanted < 2:
        raise ValueError(f"{path}: expected tokens after --start-token {args.start_token:,}, found none")
    tokens = np.asarray(load_tokens(path, vocab_size, args.start_token, wanted))
    subject = {"dataset": dataset, "split": args.split, "start_token": args.start_token, "tokens": len(tokens) - 1}
    return subject | {"stride": args.stride}, tokens


def dataset_of(path: Path) -> str:
    """Return the dataset of the run that a path belongs to."""
    for folder in (path, *path.absolute().parents[:3]):
        if (file := RunDirectory(folder).train_config).is_file():
            config = config_of(RunDirectory(folder))
            if config.objective != "next-token":
                raise ValueError(
                    f"{file}: trained {config.objective}, not to predict the next token; choose tokens with --dataset"
                )
            return config.dataset
    raise ValueError(f"{path}: is not in a run, so its dataset is unknown; choose one with --dataset")


def config_of(run: RunDirectory) -> TrainConfig:
    """Return a run's config as its newest checkpoint was trained."""
    checkpoints = find_checkpoints(run.checkpoints)
    return as_trained(run, load_config(run.train_config, TrainConfig), checkpoints[-1].meta if checkpoints else {})


def notice_other_content(path: Path, folder: Path) -> None:
    """Log a warning when the validation tokens are not those that the run of a path was validated on."""
    run = next(RunDirectory(f) for f in (path, *path.absolute().parents[:3]) if RunDirectory(f).train_config.is_file())
    config, checkpoints = config_of(run), find_checkpoints(run.checkpoints)
    validated = checkpoints[-1].meta.get("data", {}).get("validation") if checkpoints else None
    if not validated:
        return
    count, file = int(validated.partition(" ")[0]), folder / "validation.safetensors"
    available = max(0, count_tokens(file) - config.start_val_token)
    found = fingerprint(load_tokens(file, MAX_VOCAB_SIZE, config.start_val_token, min(count, available)))
    if found != validated:
        log.warning(f"{file}: holds other tokens than {run.path} was validated on, so the losses cannot be compared")


def losses_of(model: GPTModel, tokens: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """Return the loss of every token but the first, (tokens,), float32."""
    length = model.config.context_length
    if args.stride and args.stride > length:
        raise ValueError(f"--stride: expected at most the context, {length:,} tokens, got {args.stride:,}")
    max_windows = num_windows(len(tokens) - 1, length, args.stride or length)
    windows = min(args.batch or max(1, TOKENS_PER_BATCH // length), max_windows)
    parts = []
    with Progress(total=len(tokens) - 1, unit="token", unit_scale=True) as bar:
        for part in windowed_losses(model, tokens, stride=args.stride, windows_per_batch=windows):
            parts.append(part)
            bar.update(len(part))
    return np.concatenate(parts)


def count_bytes(tokenizer: Tokenizer | None, tokens: np.ndarray) -> int:
    """Count the bytes of the text to predict. Returns 0 when they are not known to be those of a tokenizer."""
    known = tokenizer is not None and tokens.max() < tokenizer.vocab_size
    return tokenizer.count_bytes(tokens[1:], is_start=False) if tokenizer and known else 0


def summary(losses: np.ndarray, first: np.ndarray | None, num_bytes: int) -> dict[str, float | None]:
    """Return mean loss, perplexity and bits per byte, and the standard errors.

    Also the difference from the first model's loss.
    """
    loss, row = losses.mean(dtype=np.float64).item(), {}
    if first is not None:
        difference = losses - first
        row["difference"] = difference.mean(dtype=np.float64).item()
        row["difference_error"] = standard_error(difference, BLOCK)
    return row | {
        "loss": loss,
        "loss_error": standard_error(losses, BLOCK),
        "perplexity": math.exp(loss) if loss < MAX_EXPONENT else None,
        "bits_per_byte": losses.sum(dtype=np.float64).item() / math.log(2) / num_bytes if num_bytes else None,
    }


def check_finite(path: Path, losses: np.ndarray) -> None:
    """Raise RuntimeError when a loss is not finite."""
    if bad := int((~np.isfinite(losses)).sum()):
        raise RuntimeError(f"{path}: {bad:,} of {losses.size:,} losses are not finite, so it cannot be evaluated")


def hellaswag(
    path: Path, model: GPTModel, questions: list[Question], tokenizer: Tokenizer
) -> dict[str, float | int | None]:
    """Return the share of questions that a model answers correctly."""
    if longer := count_longer(questions, model.config.context_length, tokenizer):
        print(
            f"notice: {path}: {longer:,} of {len(questions):,} questions exceed its context and are truncated",
            file=sys.stderr,
        )
    right = np.zeros(2, int)
    with Progress(total=len(questions), unit="question") as bar:
        for i, per_token, whole in answer(model, questions, tokenizer):
            check_finite(path, whole)
            right += np.array([per_token.argmin(), whole.argmin()]) == questions[i].label
            bar.update()
    share, unnormalized = (right / len(questions)).tolist()
    error = (share * (1 - share) / (len(questions) - 1)) ** 0.5 if len(questions) > 1 else None
    named = {"hellaswag": share, "hellaswag_error": error, "hellaswag_not_normalized": unnormalized}
    return named | {"hellaswag_questions": len(questions), "hellaswag_cut": longer}
