"""Documents of a Hub dataset, streamed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from outside_in.data.prepare.compression import require
from outside_in.data.prepare.rows import Bad, Document, ReadOptions, accepted, text_of


@dataclass(frozen=True)
class HubDataset:
    """A dataset that the library `datasets` loads, from the Hub or locally."""

    dataset: str
    config: str | None
    split: str
    revision: str | None = None  # a commit

    def at(self, revision: str | None) -> Self:
        return replace(self, revision=revision)

    def sha256(self) -> None:
        """Return None: it is not read as files."""

    def newest_revision(self) -> str | None:
        """Ask the Hub for the newest commit; None for a local folder."""
        if Path(self.dataset).exists():
            return None
        from huggingface_hub import HfApi  # half a second, which local text does not need

        try:
            return HfApi().dataset_info(self.dataset).sha
        except Exception as error:  # of any library below
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> ValueError:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return ValueError(f"{self.name}: the dataset cannot be opened: {reason}")

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.dataset, self.config, self.split) if part)

    @property
    def size_bytes(self) -> None:
        return None

    @property
    def version(self) -> str | None:
        return self.revision

    def documents(self, reading: ReadOptions, skip: int) -> Iterator[tuple[Document, int]]:
        """Stream documents after the first `skip`, and their bytes so far. See `File.documents`."""
        datasets = require("datasets")
        datasets.disable_progress_bars()
        try:
            rows = datasets.load_dataset(
                self.dataset, self.config, split=self.split, revision=self.revision, streaming=True
            )
        except Exception as error:  # of any library below
            raise self._unavailable(error) from error
        size = 0
        for index, row in enumerate(rows.skip(skip), start=skip):
            text = accepted(text_of(row, reading.field, f"{self.name}: row {index + 1:,} (index {index})"), reading)
            size += 0 if isinstance(text, Bad) else len(text.encode("utf-8", "surrogatepass"))
            yield text, size
