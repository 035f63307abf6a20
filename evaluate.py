"""How good is a model, or several, on the same held-out tokens? `uv run evaluate.py RUN_OR_CHECKPOINT…`."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from outside_in.runtime import cli

if TYPE_CHECKING:
    import numpy as np

    from model import GPTModel
    from outside_in.inference.hellaswag import Question

BLOCK = 1024  # tokens that count as one measurement, since neighbours are alike
TOKENS_PER_BATCH = 8192
LARGEST_EXPONENT = 700  # e to a larger power is beyond float64
COLUMNS = {  # of the table: heading and form of what the JSON has under these names; what no row has is left out
    "model": ("model", ""),
    "parameters": ("parameters", ","),
    "loss": ("loss", ".4f"),
    "loss_error": ("±", ".4f"),
    "difference": ("less the first's", "+.4f"),
    "difference_error": ("±", ".4f"),
    "perplexity": ("perplexity", ",.6g"),
    "bits_per_byte": ("bits per byte", ".4f"),
    "hellaswag": ("HellaSwag", ".2%"),
    "hellaswag_error": ("±", ".2%"),
    "hellaswag_not_normalized": ("not normalized", ".2%"),
}


def main(args: argparse.Namespace) -> int:
    check(args)
    from model import count_parameters
    from outside_in.inference.hellaswag import read_questions
    from outside_in.inference.load import find_weights, load_saved_model
    from outside_in.runtime.mesh import describe_devices  # these take seconds: not for a typing error

    files = [find_weights(path) for path in args.models]
    questions = read_questions(args.hellaswag) if args.hellaswag else None
    subject, tokens = None, None
    if args.dataset or not questions:
        subject, tokens = read_tokens(args, files)
    cli.say(describe_devices())
    rows: list[dict[str, Any]] = []
    first = None
    for path, file in zip(args.models, files, strict=True):
        model = load_saved_model(file)
        rows.append({"model": str(path), "weights": str(file), "parameters": count_parameters(model.config)})
        if tokens is not None:
            losses = losses_of(model, tokens, args)
            check_finite(path, losses)
            rows[-1] |= summary(losses, first, count_bytes(model, tokens))
            first = losses if first is None else first
        if questions:
            rows[-1] |= hellaswag(path, model, questions)
    if subject:
        print("{dataset}, {split}: {tokens:,} tokens from {start_token:,} on".format(**subject), end="\n\n")
    print(*table(rows), sep="\n")
    if args.json:
        temporary = args.json.with_name(f".{args.json.name}.tmp")
        temporary.write_text(json.dumps({"judged_on": subject, "models": rows}, indent=2) + "\n")
        temporary.replace(args.json)
    return cli.DONE


def read_tokens(args: argparse.Namespace, files: list[Path]) -> tuple[dict[str, Any], "np.ndarray"]:
    """Load the tokens that all models are judged on; also return which they are."""
    import numpy as np

    from outside_in.config import ModelConfig, parse_config
    from outside_in.data.loader import load_tokens
    from outside_in.data.sources import dataset_folder
    from outside_in.data.token_files import count_tokens
    from outside_in.weights import read_model_json

    vocab_size = min(parse_config(read_model_json(file), ModelConfig, str(file)).vocab_size for file in files)
    dataset = args.dataset or dataset_of(args.models[0])
    path = dataset_folder(dataset) / f"{args.split}.safetensors"
    wanted = count_tokens(path) - args.start_token if args.tokens is None else args.tokens + 1
    if wanted < 2:
        raise ValueError(f"{path}: expected tokens after --start-token {args.start_token:,}; it has fewer")
    tokens = np.asarray(load_tokens(path, vocab_size, args.start_token, wanted))
    subject = {"dataset": dataset, "split": args.split, "start_token": args.start_token, "tokens": len(tokens) - 1}
    return subject | {"stride": args.stride}, tokens


def dataset_of(path: Path) -> str:
    """Name the dataset of the run that a path belongs to."""
    from outside_in.config import TrainConfig, load_config
    from outside_in.storage.run_directory import RunDirectory

    for folder in (path, *path.absolute().parents[:3]):
        if (file := RunDirectory(folder).train_config).is_file():
            config = load_config(file, TrainConfig)
            if config.objective != "next-token":
                raise ValueError(f"{file}: trained {config.objective}, not to predict; name other tokens by --dataset")
            return config.dataset
    raise ValueError(f"{path}: is in no run, whose dataset would be taken; name one by --dataset")


def losses_of(model: "GPTModel", tokens: "np.ndarray", args: argparse.Namespace) -> "np.ndarray":
    """Return the loss of every token but the first, (tokens,), float32."""
    import numpy as np

    from outside_in.inference.evaluation import num_windows, windowed_losses

    length = model.config.context_length
    if args.stride and args.stride > length:
        raise ValueError(f"--stride: expected at most the context, {length:,} tokens, got {args.stride:,}")
    most = num_windows(len(tokens) - 1, length, args.stride or length)
    windows = min(args.batch or max(1, TOKENS_PER_BATCH // length), most)
    parts = []
    with tqdm(total=len(tokens) - 1, unit="token", unit_scale=True, dynamic_ncols=True) as bar:
        for part in windowed_losses(model, tokens, stride=args.stride, windows_per_batch=windows):
            parts.append(part)
            bar.update(len(part))
    return np.concatenate(parts)


def count_bytes(model: "GPTModel", tokens: "np.ndarray") -> int:
    """Count the bytes of the text to predict; 0 when the model's tokens are not GPT-2's."""
    from outside_in.data import tokenizer

    return tokenizer.count_bytes(tokens[1:]) if tokenizer.is_gpt2(model.config.vocab_size) else 0


def summary(losses: "np.ndarray", first: "np.ndarray | None", num_bytes: int) -> dict[str, float | None]:
    """Return mean loss, perplexity and bits per byte, with what they may be off by, and against the first model's."""
    import numpy as np

    from outside_in.inference.evaluation import standard_error

    loss, row = losses.mean(dtype=np.float64).item(), {}
    if first is not None:
        difference = losses - first
        row["difference"] = difference.mean(dtype=np.float64).item()
        row["difference_error"] = standard_error(difference, BLOCK)
    return row | {
        "loss": loss,
        "loss_error": standard_error(losses, BLOCK),
        "perplexity": math.exp(loss) if loss < LARGEST_EXPONENT else None,
        "bits_per_byte": losses.sum(dtype=np.float64).item() / math.log(2) / num_bytes if num_bytes else None,
    }


def check_finite(path: Path, losses: "np.ndarray") -> None:
    """Raise RuntimeError when a model cannot be judged."""
    import numpy as np

    if bad := int((~np.isfinite(losses)).sum()):
        raise RuntimeError(f"{path}: {bad:,} of {losses.size:,} losses are not finite, so it cannot be judged")


def hellaswag(path: Path, model: "GPTModel", questions: list["Question"]) -> dict[str, float | int | None]:
    """Return how many questions a model answers as it should."""
    import numpy as np

    from outside_in.data import tokenizer
    from outside_in.inference.hellaswag import answer, count_longer

    if not tokenizer.is_gpt2(model.config.vocab_size):
        raise ValueError(f"--hellaswag: {path}: a vocabulary of {model.config.vocab_size:,} ids is not GPT-2's")
    if longer := count_longer(questions, model.config.context_length):
        print(f"notice: {path}: {longer:,} of {len(questions):,} questions are longer than its context, and cut")
    right = np.zeros(2, int)
    with tqdm(total=len(questions), unit="question", dynamic_ncols=True) as bar:
        for number, per_token, whole in answer(model, questions):
            check_finite(path, whole)
            right += np.array([per_token.argmin(), whole.argmin()]) == questions[number].label
            bar.update()
    share, unnormalized = (right / len(questions)).tolist()
    error = (share * (1 - share) / (len(questions) - 1)) ** 0.5 if len(questions) > 1 else None
    named = {"hellaswag": share, "hellaswag_error": error, "hellaswag_not_normalized": unnormalized}
    return named | {"hellaswag_questions": len(questions), "hellaswag_cut": longer}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return a Markdown table of what is known."""
    columns = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    lines = [[COLUMNS[name][0] for name in columns], ["---", *["---:"] * (len(columns) - 1)]]
    for row in rows:
        values = [(row.get(name), COLUMNS[name][1]) for name in columns]
        lines.append(["–" if value is None else format(value, form) for value, form in values])
    return [f"| {' | '.join(line)} |" for line in lines]


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that make no sense."""
    for option, least in (("start_token", 0), ("tokens", 1), ("stride", 1), ("batch", 1)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise ValueError(f"--{option.replace('_', '-')}: expected a number of at least {least}, got {value}")
    if args.hellaswag and not args.dataset and (args.tokens or args.stride or args.start_token):
        raise ValueError("--hellaswag: with --tokens, --stride or --start-token expected a --dataset too, got none")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise ValueError(f"--json: expected a file in a folder that is there, got {args.json}")


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Loss, perplexity and bits per byte of models on the same held-out tokens.")
    parser.add_argument(
        "models", nargs="+", type=Path, metavar="MODEL", help="a run (its best checkpoint), a checkpoint, or a file"
    )
    parser.add_argument("--dataset", help="a folder, built-in name or Hub dataset (that of the first model's run)")
    parser.add_argument("--split", choices=("validation", "train"), default="validation")
    parser.add_argument("--start-token", type=int, default=0, help="where in the file to begin (0)")
    parser.add_argument("--tokens", type=int, help="how many to predict (all)")
    parser.add_argument(
        "--stride", type=int, help="begin a window every so many tokens, and count only what the last has not seen"
    )
    parser.add_argument("--batch", type=int, help=f"windows at a time (as many as have {TOKENS_PER_BATCH:,} tokens)")
    parser.add_argument(
        "--hellaswag",
        nargs="?",
        const="Rowan/hellaswag",
        metavar="FILE",
        help="also, or without --dataset only, answer HellaSwag's questions: a .jsonl, or those of the Hub",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
