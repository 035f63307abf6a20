"""How fast `prepare_data.py` tokenizes, against bare tiktoken on the same documents and cores, in interleaved pairs.

Bare tiktoken takes the documents out of memory and writes nothing. Prints one JSON object.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

from outside_in.data.prepare.documents import ReadOptions, find_files
from outside_in.data.prepare.pipeline import Options, Preparation
from outside_in.data.tokenizer import gpt2_encoding
from outside_in.runtime import cli


def main(args: argparse.Namespace) -> int:
    files = find_files(args.text)
    documents = (text for file in files for text, _ in file.documents(ReadOptions(args.field), 0))
    texts = [text for text in documents if isinstance(text, str)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    ratios, ours, bare = [], [], []
    for _ in range(args.pairs):
        began = time.perf_counter()
        gpt2_encoding().encode_ordinary_batch(texts, num_threads=args.workers)
        between = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            with closing(
                Preparation(out, list(files), Options(ReadOptions(args.field)), overwrite=False)
            ) as preparation:
                preparation.read(args.workers, lambda: False, lambda *_: None)
        bare.append(megabytes / (between - began))
        ours.append(megabytes / (time.perf_counter() - between))
        ratios.append(ours[-1] / bare[-1])
    report = {
        "megabytes": megabytes,
        "documents": len(texts),
        "workers": args.workers,
        "megabytes_per_second": statistics.median(ours),
        "bare_megabytes_per_second": statistics.median(bare),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }
    print(json.dumps(report))
    return cli.DONE


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Measure how fast text becomes tokens; prints one JSON object.")
    parser.add_argument("text", nargs="+", type=Path, help="files or folders of documents")
    parser.add_argument("--field", default="text")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--pairs", type=int, default=7)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
