"""From documents to token files: on all cores, in order, resumable.

Everything is written into a hidden folder beside the one asked for, which is renamed when it is complete. Progress is
saved there every few seconds. A new start cuts the token files to it and resumes.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from outside_in.data.prepare import description
from outside_in.data.prepare.chosen_tokenizer import chosen_tokenizer, trained_tokenizer
from outside_in.data.prepare.description import DESCRIPTION, SPLITS
from outside_in.data.prepare.destination import LOCK, PREPARING, PROGRESS_FILE, check_place, check_space, lock
from outside_in.data.prepare.documents import Source
from outside_in.data.prepare.encode import EMPTY, Batch, Encoded, ahead, batches
from outside_in.data.prepare.finish import hold_out_the_end, lacking, record
from outside_in.data.prepare.progress import Options, Progress, command_of, difference, pinned
from outside_in.data.prepare.seen import SeenDocuments
from outside_in.data.prepare.split import split_of
from outside_in.data.token_files import TokenWriter, shuffle_documents
from outside_in.data.tokenizer import TOKENIZER_FILE, Tokenizer
from outside_in.data.tokenizer_files import load
from outside_in.runtime.log import log
from outside_in.storage import atomic
from outside_in.storage.atomic import fsync
from outside_in.storage.strict_json import read_json
from outside_in.storage.text import counted

SECONDS_BETWEEN_SAVES = 10


class Preparation:
    """The folder in which token files grow, open in one process. Raises ValueError when another process has it."""

    def __init__(
        self,
        out: Path,
        sources: list[Source],
        options: Options,
        *,
        overwrite: bool,
        validation_sources: Sequence[Source] = (),
        left_out: Mapping[str, int] | None = None,
    ) -> None:
        check_place(out, overwrite)
        self.out, self.options = out, options
        self._tokenizer = chosen_tokenizer(options)
        self.folder = out.with_name(f"{PREPARING}{out.name}")
        self.sources = pinned([*validation_sources, *sources], self.folder / PROGRESS_FILE)
        self.num_for_validation = len(validation_sources)  # they come first, so that a limit leaves them whole
        self.left_out = dict(left_out or {})
        self.command = command_of(options, self.sources, self._tokenizer) | {"validation": self.num_for_validation}
        if not self.folder.exists():
            check_space(out, self.sources, options.limit_tokens, copies=2 if options.shuffle else 1)
        self._seen: SeenDocuments | None = None
        self.writers: dict[str, TokenWriter] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.folder / LOCK, out)
        try:
            self._resume_or_start(overwrite)
        except BaseException:
            self.close()
            raise

    def _resume_or_start(self, overwrite: bool) -> None:
        """Resume the saved progress, or start.

        Where it cannot be resumed, start over with `overwrite`, else raise ValueError.
        """
        if not (self.folder / PROGRESS_FILE).exists():
            self._clear()  # what an earlier process has not saved
        try:
            self._resume()
        except ValueError:
            if not overwrite:
                raise
            self._clear()
            self._resume()

    def _clear(self) -> None:
        """Remove all files, the progress first: without it the others mean nothing."""
        self._close_files()
        (self.folder / PROGRESS_FILE).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.name != LOCK:
                path.unlink()

    def _resume(self) -> None:
        """Load the saved progress and cut the token files to it. Raises ValueError if that is impossible."""
        self.progress = Progress(self.command)
        if (self.folder / PROGRESS_FILE).exists():
            try:
                self.progress = Progress(**read_json(self.folder / PROGRESS_FILE, description.MAX_BYTES))
            except TypeError:
                raise ValueError(f"{self.out}: was started by another version; start over with --overwrite") from None
        if self.progress.command != self.command:
            raise ValueError(
                f"{self.out}: was started with other {difference(self.progress.command, self.command)}; "
                "type the same command again, or start over with --overwrite"
            )
        if (self.folder / TOKENIZER_FILE).exists():
            self._tokenizer = load(self.folder, self.options.end_of_text)
        if self.progress.bad and not self.options.reading.skip_bad:
            raise ValueError(
                f"{self.out}: was started with --skip-bad, which has left out {self.progress.bad:,} documents; "
                "type the same command again, or start over with --overwrite"
            )
        self.splits = SPLITS if self.options.validation or self.num_for_validation else SPLITS[:1]
        self._saved_at = time.monotonic()
        if (self.folder / DESCRIPTION).exists():  # it only lacks its name
            return
        for split in self.splits:
            growing, finished = self.folder / f"{split}.tokens", self.folder / f"{split}.safetensors"
            if finished.exists() and not growing.exists():
                finished.rename(growing)
            self.writers[split] = TokenWriter(growing, self.progress.tokens[split])
        if self.options.deduplicate:
            self._seen = SeenDocuments(self.folder / "seen.sqlite")

    def close(self) -> None:
        """Close all files, and release the lock."""
        self._close_files()
        self._lock.close()

    def _close_files(self) -> None:
        for file in (*self.writers.values(), self._seen):
            if file:
                file.close()

    @property
    def num_tokens(self) -> int:
        return sum(writer.num_tokens for writer in self.writers.values())

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._tokenizer, "it is there once documents are read"
        return self._tokenizer

    def read(self, workers: int, should_stop: Callable[[], bool], show: Callable[[int, "Preparation"], None]) -> None:
        """Tokenize the remaining documents, up to the limit or a stop.

        After each batch, `show` is called with the bytes read from the present source.
        """
        if self.progress.all_read:
            return
        try:
            held_out, sources = self.sources[: self.num_for_validation], self.sources[self.num_for_validation :]
            self._tokenizer = self._tokenizer or trained_tokenizer(sources, self.options, should_stop, held_out)
        except InterruptedError:
            return
        except ValueError:
            shutil.rmtree(self.folder)  # the same command could not go on either
            raise
        if self._tokenizer.file:
            atomic.write_bytes(self.folder / TOKENIZER_FILE, self._tokenizer.file, durable=True)
        with ThreadPoolExecutor(workers) as pool:
            try:
                coming = batches(
                    self.sources,
                    self.options.reading,
                    pool,
                    self.tokenizer,
                    first=self.progress.source,
                    skip=self.progress.documents_of_source,
                    special_tokens=bool(self.options.special_tokens),
                )
                for batch in ahead(coming, workers):
                    if should_stop():
                        break
                    if not self._write(batch):
                        self.progress.all_read = True
                        break
                    show(batch.bytes_read, self)
                    if time.monotonic() - self._saved_at > SECONDS_BETWEEN_SAVES:
                        self.save_progress()
                else:
                    self.progress.all_read = True
            finally:
                pool.shutdown(cancel_futures=True)
                self.save_progress()

    def _is_full(self, source: int) -> bool:
        """Return whether the limit is reached, which validation text of its own does not count for."""
        if self.options.limit_tokens is None or source < self.num_for_validation:
            return False
        tokens = self.writers["train"].num_tokens if self.num_for_validation else self.num_tokens
        return tokens >= self.options.limit_tokens

    def _write(self, batch: Batch) -> bool:
        """Append a batch's documents; return False when the limit is reached."""
        progress = self.progress
        if batch.source != progress.source:
            progress.source, progress.documents_of_source = batch.source, 0
        while len(progress.per_source) <= batch.source:
            progress.per_source.append({"documents": 0, "tokens": 0})
        of_source = progress.per_source[batch.source]
        try:
            documents = list(batch.documents())
        except ValueError as error:
            first, last = progress.documents_of_source + 1, progress.documents_of_source + len(batch.facts)
            where = f"{self.sources[batch.source].name}: one of documents {first:,} to {last:,}"
            raise ValueError(f"{where} cannot be tokenized ({error}); leave it out") from error
        for document in documents:
            if self._is_full(batch.source):
                return False
            if not self._is_dropped(document):
                named = SPLITS[batch.source < self.num_for_validation] if self.num_for_validation else None
                self.writers[named or split_of(document.digest, self.options)].append(document.tokens)
                of_source["documents"] += 1
                of_source["tokens"] += len(document.tokens)
                progress.ends_in_text += document.ends_in_text
            progress.documents += 1
            progress.documents_of_source += 1
        return True

    def _is_dropped(self, document: Encoded) -> bool:
        """Return whether a document is left out, and count why."""
        progress = self.progress
        if document.dropped is EMPTY:
            progress.empty += 1
        elif document.dropped:
            progress.bad += 1
            progress.first_bad = progress.first_bad or document.dropped.reason
        elif self._seen and not self._seen.add(document.digest, progress.documents):
            progress.duplicates += 1
        else:
            return False
        return True

    def give_up(self) -> None:
        """After an error, remove the hidden folder if nothing is in it, else name it."""
        if not self.folder.exists():
            return
        if self.progress.documents:
            done = counted(self.progress.documents, "document")
            log.info(f"{done}: kept in {self.folder}; the same command resumes, or remove that folder")
        else:
            self._close_files()
            shutil.rmtree(self.folder)

    def save_progress(self) -> None:
        """Save the progress, after the tokens that it counts."""
        for split, writer in self.writers.items():
            writer.fsync()
            self.progress.tokens[split] = writer.num_tokens
        if self._seen:
            self._seen.commit()
        _write_json(self.folder / PROGRESS_FILE, asdict(self.progress))
        self._saved_at = time.monotonic()

    def finish(self, show: Callable[[int], None]) -> dict[str, Any]:
        """Complete the token files and `data.json`, and rename the folder.

        Returns the content of `data.json`. `show` is called with the number of training tokens searched for validation
        text. Raises ValueError when a split would be empty.
        """
        if not (self.folder / DESCRIPTION).exists():
            self._complete(show)
        for path in self.folder.iterdir():
            if path.suffix != ".safetensors" and path.name not in (DESCRIPTION, TOKENIZER_FILE, PROGRESS_FILE, LOCK):
                path.unlink()
        if self.out.exists():
            shutil.rmtree(self.out)
        self.folder.rename(self.out)
        for name in (PROGRESS_FILE, LOCK):
            (self.out / name).unlink()
        fsync(self.out.parent)
        return read_json(self.out / DESCRIPTION, description.MAX_BYTES)

    def _complete(self, show: Callable[[int], None]) -> None:
        hold_out_the_end(self)
        for split, writer in self.writers.items():
            if not writer.num_tokens:
                shutil.rmtree(self.folder)  # the same command could not go on either
                raise ValueError(lacking(self, split))
        if self._seen:
            self._seen.close()
        for split, writer in self.writers.items():
            writer.finish()
            finished = self.folder / f"{split}.safetensors"
            if self.options.shuffle:
                log.info(f"shuffling the documents of {split}")
                shuffle_documents(writer.path, finished, self.options.seed, self.tokenizer.end_of_text)
            else:
                writer.path.rename(finished)
        log.info("hashing sources, counting tokens, checking for train/validation overlap")
        _write_json(self.folder / DESCRIPTION, self._describe(show))

    def _describe(self, show: Callable[[int], None]) -> dict[str, Any]:
        return record(self, show)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    atomic.write_text(path, json.dumps(content, indent=1) + "\n", durable=True)
