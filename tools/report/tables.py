"""Tables of a report in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A table: words to the left, figures to the right.

    Args:
        columns: their titles.
        rows: cells as text, as many in each row as there are columns.
        words: how many columns hold words; the others, behind them, hold figures.

    Returns:
        One line a row, no line break at the end.

    Raises:
        ValueError: a row has more or fewer cells than there are columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"expected {len(columns)} cells in a row, got {len(row)}: {row}")
    rule = ["---" if place < words else "---:" for place in range(len(columns))]
    return "\n".join([_line(columns), _rule(rule), *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return _rule([cell.replace("|", "\\|") for cell in cells])


def _rule(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
