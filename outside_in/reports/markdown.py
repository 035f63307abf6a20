"""Markdown tables."""

from collections.abc import Iterable, Sequence


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Return the lines of a table, its first `left` columns aligned left, for terminals and documents alike."""
    rows = [list(headings), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    align = [str.ljust] * left + [str.rjust] * (len(headings) - left)
    first, *others = [[put(cell, width) for put, cell, width in zip(align, row, widths)] for row in rows]
    rule = ["-" * (width - (i >= left)) + ":" * (i >= left) for i, width in enumerate(widths)]
    return [f"| {' | '.join(row)} |" for row in (first, rule, *others)]
