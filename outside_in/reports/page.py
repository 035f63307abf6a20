"""A self-contained HTML page of charts, tables and samples. Never touches JAX.

`page.html`, `page.css`, `page.js` and `page_drawing.js` beside this module make it from one JSON object: a `Page`.
"""

import json
import re
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from outside_in.storage import atomic

FOLDER = Path(__file__).parent
NOT_IN_HTML = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}  # JSON's own escapes

Tile = tuple[str, float | str | None, str]  # its name, its value, and what to know about it


@dataclass
class Page:
    """What a page shows. Lists of charts and the like come from `page_charts`."""

    title: str
    status: str
    x: str  # the horizontal axis at first: steps, tokens or seconds
    runs: list[str]  # their names; several have a key to hide and show them
    clocks: list[dict[str, Any]]  # of each run: tokens and seconds by step
    tiles: list[Tile] = field(default_factory=list)
    charts: list[dict[str, Any]] = field(default_factory=list)
    heat_maps: list[dict[str, Any]] = field(default_factory=list)
    marks: list[dict[str, Any]] = field(default_factory=list)  # steps at which something happened, and what
    tables: list[dict[str, Any]] = field(default_factory=list)
    samples: list[tuple[int, list[str]]] = field(default_factory=list)
    reload_seconds: float | None = None  # None: the page is final
    written: float = field(default_factory=time.time)


def write(path: Path, page: Page) -> None:
    """Write a page, in place of the one before it."""
    atomic.write_text(path, html(page))


def html(page: Page) -> str:
    parts = {
        "STYLE": _read("page.css"),
        "SCRIPT": _read("page_drawing.js") + _read("page.js"),
        "DATA": embedded(asdict(page)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("page.html"))


def embedded(content: Any) -> str:
    """Return JSON that no text in it can end, wherever it stands in HTML."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).translate(NOT_IN_HTML)


def table(
    title: str, columns: list[str], rows: list[list[Any]], *, note: str = "", folded: bool = False
) -> dict[str, Any]:
    """Return a table. Its cells are texts, numbers, None, or `moment`s."""
    return {"title": title, "note": note, "columns": columns, "rows": rows, "folded": folded}


def moment(seconds: float | None) -> dict[str, float | None]:
    """Return a cell with a date, which is shown in the reader's time zone."""
    return {"time": seconds}


@cache
def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
