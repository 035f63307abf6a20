"""Markdown tables."""

from collections.abc import Iterable, Sequence


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Return the lines of a table, its first `left` columns aligned left."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---"] * left + ["---:"] * (len(headings) - left)
    return [f"| {' | '.join(row)} |" for row in (headings, rule, *rows)]
