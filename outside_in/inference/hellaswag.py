"""HellaSwag: questions answered by the ending that a model finds likeliest.

Zellers et al., 2019, https://arxiv.org/abs/1905.07830, in the completion style of GPT-2-class models: each ending
follows the context after a space, and the one with the lowest loss per token is the answer.
"""

import contextlib
import json
import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model import GPTModel
from outside_in.data.tokenizer import Tokenizer
from outside_in.inference.evaluation import completion_losses

HUB_DATASET, SPLIT = "Rowan/hellaswag", "validation"
MAX_LINE_BYTES = 100_000


@dataclass(frozen=True)
class Question:
    context: str
    endings: list[str]
    label: int  # which ending is right


def read_questions(source: str) -> list[Question]:
    """Read questions in HellaSwag's format, from a .jsonl file or the Hub.

    Each has `ctx`, `endings` and `label`. Raises ValueError when there are none, or naming the line that is malformed.
    """
    if Path(source).is_file():
        rows = _rows(Path(source))
    elif source == HUB_DATASET:
        rows = _hub_rows()
    else:
        raise ValueError(f"{source}: expected a .jsonl file in HellaSwag's form, found nothing")
    with contextlib.closing(rows):
        questions = [_question(row, where) for where, row in rows]
    if not questions:
        raise ValueError(f"{source}: expected questions, got none")
    return questions


def answer(
    model: GPTModel, questions: list[Question], tokenizer: Tokenizer
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield each question's index, and the loss of each of its endings.

    The losses are per token and whole, each (endings,). Questions come with the shortest first, so that the texts of a
    batch have similar lengths.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).tolist()

    ids = [[(encode(question.context), encode(" " + ending)) for ending in question.endings] for question in questions]
    order = sorted(range(len(questions)), key=lambda i: max(len(c) + len(e) for c, e in ids[i]))
    losses = completion_losses(model, (text for i in order for text in ids[i]))
    for i in order:
        of_endings = [next(losses) for _ in ids[i]]
        yield i, np.array([x.mean() for x in of_endings]), np.array([x.sum() for x in of_endings])


def count_longer(questions: list[Question], context_length: int, tokenizer: Tokenizer) -> int:
    """Count the questions that are longer than the context with some ending."""
    return sum(
        max(len(tokenizer.encode(f"{question.context} {ending}")) for ending in question.endings) > context_length + 1
        for question in questions
    )


def _rows(path: Path) -> Generator[tuple[str, Any]]:
    with path.open("rb") as file:
        for i, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
            where = f"{path}: line {i:,}"
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"more than {MAX_LINE_BYTES:,} bytes")
                if line.strip():
                    yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: expected a JSON object, got something else ({error})") from None


def _hub_rows() -> Generator[tuple[str, Any]]:
    try:
        import datasets  # an optional package
    except ImportError:
        raise ValueError(
            f"{HUB_DATASET}: needs the package datasets; use uv run --group prepare, or a .jsonl file"
        ) from None
    datasets.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):  # they log every attempt
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        rows = datasets.load_dataset(HUB_DATASET, split=SPLIT)
    except Exception as error:  # of a dozen kinds
        message = " ".join(str(error).split())[:300]
        raise ValueError(f"{HUB_DATASET}: could not be fetched from the Hub ({message}); use a .jsonl file") from None
    for i, row in enumerate(rows, start=1):
        yield f"{HUB_DATASET}: row {i:,}", row


def _question(row: Any, where: str) -> Question:
    row = row if isinstance(row, dict) else {}
    context, endings, label = row.get("ctx"), row.get("endings"), str(row.get("label"))
    if not (isinstance(context, str) and context):
        raise ValueError(f"{where}: expected a text in 'ctx', as in HellaSwag")
    if not (isinstance(endings, list) and len(endings) > 1 and all(isinstance(e, str) and e for e in endings)):
        raise ValueError(f"{where}: expected several texts in 'endings', as in HellaSwag")
    if not label.isdecimal() or int(label) >= len(endings):
        raise ValueError(f"{where}: expected the number of an ending in 'label', got {label[:40]!r}")
    return Question(context, endings, int(label))
