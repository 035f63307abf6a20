"""Make token files from text: `uv run prepare_data.py FOLDER --text FILES…`.

Or from a Hub dataset: `--hub DATASET`. Writes `train.safetensors`, `validation.safetensors` and `data.json` into the
folder, which a run's `dataset` names.
"""

import argparse
import errno
import os
from contextlib import closing
from pathlib import Path

from outside_in.data.prepare import description as data_description
from outside_in.data.prepare import pipeline
from outside_in.data.prepare.destination import unfinished_folders
from outside_in.data.prepare.documents import File, FileSearch, HubDataset
from outside_in.data.prepare.places import Piped, is_pipe, read_pipe
from outside_in.data.prepare.rows import ReadOptions
from outside_in.runtime import cli
from outside_in.runtime.log import log
from outside_in.runtime.progress import Progress
from outside_in.runtime.signals import StopRequest, listening
from outside_in.storage.text import counted

DEFAULT_VALIDATION = 0.01  # of the documents


def main(args: argparse.Namespace) -> int:
    if args.describe:
        if args.folder or args.text or args.hub:
            raise ValueError("--describe: expected without another folder, --text and --hub")
        with Progress(unit="token", unit_scale=True, leave=False, delay=1) as bar:
            _, lines = data_description.describe(args.describe, progress=lambda done: bar.update(done - bar.n))
        print(*lines, sep="\n")
        return cli.DONE
    if not args.folder or not (args.text or args.hub):
        raise ValueError("expected a folder to write, and --text FILES or --hub DATASET; see --help")
    if args.validation_split and not args.hub:
        raise ValueError("--validation-split: a split of a Hub dataset, so expected with --hub")
    try:
        return prepare_from(args)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RuntimeError(f"{args.folder}: no disk space left; free some, and the same command resumes") from error


def prepare_from(args: argparse.Namespace) -> int:
    """Find the sources, and prepare or resume."""
    has_own_validation = args.validation_text or args.validation_split
    share = DEFAULT_VALIDATION if args.validation is None else args.validation
    options = pipeline.Options(
        reading=ReadOptions(args.field, args.separator, args.errors, args.skip_bad),
        tokenizer=args.tokenizer,
        end_of_text=args.end_of_text,
        validation=0 if has_own_validation else share,
        limit_tokens=args.limit_tokens,
        shuffle=args.shuffle,
        deduplicate=args.deduplicate,
        special_tokens=args.special_tokens,
        seed=args.seed,
    )
    search, stop = FileSearch(options.reading), StopRequest()
    validation_sources: list[pipeline.Source] = []
    if args.validation_split:
        validation_sources = [HubDataset(args.hub, args.config, args.validation_split)]
    elif args.validation_text:
        validation_sources = [*search.files(with_pipes_read(args.validation_text, args.folder), for_validation=True)]
    if args.text:
        sources: list[pipeline.Source] = [*search.files(with_pipes_read(args.text, args.folder))]
    else:
        sources = [HubDataset(args.hub, args.config, args.split)]
    search.look_into([source for source in (*validation_sources, *sources) if isinstance(source, File)])
    preparation = pipeline.Preparation(
        args.folder,
        sources,
        options,
        overwrite=args.overwrite,
        validation_sources=validation_sources,
        left_out=search.left_out,
    )
    for folder in unfinished_folders(args.folder):
        log.info(
            f"{folder}: left by another preparation, which its command resumes; remove the folder if you do not need it"
        )
    with (
        closing(preparation),
        listening(stop, "stopping; a second Ctrl-C exits at once", "exited at once; the same command resumes"),
    ):
        try:
            return prepare(preparation, args.workers, stop)
        except Exception:
            preparation.give_up()
            raise


def with_pipes_read(paths: list[str], folder: Path) -> list[str | Piped]:
    """Read what comes from pipes, onto the disk of the folder that is prepared."""
    return [read_pipe(path, folder.absolute().parent) if is_pipe(path) else path for path in paths]


def prepare(preparation: pipeline.Preparation, workers: int, stop: StopRequest) -> int:
    if preparation.progress.documents:
        log.info(f"resuming after {counted(preparation.progress.documents, 'document')}")
    sizes = [source.size_bytes or 0 for source in preparation.sources]
    with Progress(total=sum(sizes) or None, unit="B", unit_scale=True) as bar:

        def show(bytes_read: int, preparation: pipeline.Preparation) -> None:
            done, tokens = preparation.progress.documents, preparation.num_tokens
            bar.set_postfix_str(f"{done:,} documents, {tokens:,} tokens", refresh=False)
            bar.update(sum(sizes[: preparation.progress.source]) + bytes_read - bar.n)

        preparation.read(workers, lambda: bool(stop), show)
    if stop:
        done = counted(preparation.progress.documents, "document")
        log.info(f"stopped after {done}, kept in {preparation.folder}; the same command resumes")
        return stop.exit_code

    def searched(_: int) -> None:
        if stop:
            raise InterruptedError

    try:
        description = preparation.finish(searched)
    except InterruptedError:
        log.info(f"stopped, with all documents kept in {preparation.folder}; the same command resumes")
        return stop.exit_code
    print(*data_description.lines(description), sep="\n")
    log.info(f'{preparation.out} is ready: set "dataset": "{preparation.out}" in a run\'s train.json')
    return cli.DONE


def share(text: str) -> float:
    """Parse a share such as 1%, 0.01 or 0."""
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value < 1:
        raise ValueError
    return value


def separator(text: str) -> str:
    r"""Parse a separator with escapes such as \n or \u2028."""
    if not text:
        raise argparse.ArgumentTypeError("expected some text, got none; without a separator, a file is a document")
    escaped = text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    return escaped.encode("utf-16", "surrogatepass").decode("utf-16")


def count(text: str) -> int:
    if (value := int(text.replace("_", "").replace(",", ""))) < 1:
        raise ValueError
    return value


def seed(text: str) -> int:
    if not 0 <= (value := int(text)) < 2**32:
        raise ValueError
    return value


def add_sources(parser: cli.ArgumentParser) -> None:
    """Add the options that say which text it is, and how documents are found in it."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--text",
        nargs="+",
        metavar="PATH",
        help="files, folders of files, URLs that fsspec opens (s3://… https://…), or - for standard input: plain text, "
        ".jsonl .json .csv .tsv .parquet .arrow, also .gz .bz2 .xz .zst",
    )
    source.add_argument(
        "--hub",
        metavar="DATASET",
        type=lambda name: name.removeprefix("hub:"),
        help="stream a dataset of the Hugging Face Hub",
    )
    source.add_argument("--describe", type=Path, metavar="FOLDER", help="count what is in token files, and stop")
    parser.add_argument("--config", help="Hub config name, such as sample-10BT")
    parser.add_argument("--split", default="train", help="Hub split (train)")
    parser.add_argument(
        "--field",
        default="text",
        help="field or column that holds the text, unless it is plain text (text); meta.text: one inside another",
    )
    parser.add_argument(
        "--separator",
        type=separator,
        help=r"what separates documents in plain text, such as '\n\n' (without it, a file is a document)",
    )
    parser.add_argument(
        "--errors", choices=("strict", "replace"), default="strict", help="what to do with invalid UTF-8 (strict)"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out documents that cannot be read, and count them"
    )


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description="Turn text into token files, with GPT-2's tokenizer or another.")
    parser.add_argument("folder", nargs="?", type=Path, help="the folder to create")
    add_sources(parser)
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="TOKENIZER",
        help="gpt2 (default), bytes, the path of a tokenizer.json, or train:N: train one of N ids on this text",
    )
    parser.add_argument(
        "--end-of-text", metavar="TOKEN", help="the token of a tokenizer.json that ends a text (<|endoftext|>, </s>, …)"
    )
    validation = parser.add_mutually_exclusive_group()
    validation.add_argument(
        "--validation", type=share, metavar="SHARE", help="share of the documents for validation (1%%); 0: none"
    )
    validation.add_argument(
        "--validation-text", nargs="+", metavar="PATH", help="validation text of its own, as for --text"
    )
    validation.add_argument("--validation-split", metavar="SPLIT", help="Hub split for validation, such as validation")
    parser.add_argument("--limit-tokens", type=count, metavar="N", help="stop after the document that reaches N tokens")
    parser.add_argument("--shuffle", action="store_true", help="put the documents in a seeded order")
    parser.add_argument("--deduplicate", action="store_true", help="drop exact duplicates")
    parser.add_argument(
        "--special-tokens",
        action=argparse.BooleanOptionalAction,
        help="read <|endoftext|> in the text as the token that ends a text; or as ordinary text (the default, "
        "with a notice)",
    )
    parser.add_argument("--seed", type=seed, default=42, help="seed for the validation split and --shuffle (42)")
    parser.add_argument("--workers", type=count, default=os.cpu_count(), help="tokenizing threads (all cores)")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a folder of token files, and start over where the command cannot resume",
    )
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
