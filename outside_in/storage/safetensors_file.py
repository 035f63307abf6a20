"""Opens safetensors files, which may come from anybody."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

MAX_HEADER_BYTES = 4_000_000  # enough for thousands of layers


def open_tensors(path: Path) -> Any:
    """Open a safetensors file for reading slices as NumPy arrays. Raises ValueError when it is another kind of file."""
    try:
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > MAX_HEADER_BYTES:
                raise OSError("its header is too large")
        return safe_open(path, "numpy")
    except (SafetensorError, OSError) as error:  # which may quote the file, line breaks and all
        raise ValueError(f"{path}: not a readable safetensors file ({str(error)[:200]!r}); make it again") from None
