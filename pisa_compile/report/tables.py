"""Tables as text, by rich where it is installed."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

TOP_LEVEL = "(top level)"
"""Instead of the name of a module that has none."""


def table_text(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines of a table, without a newline at the end."""
    rows = list(rows)
    try:
        from rich.console import Console
    except ImportError:
        return _plain(columns, rows)
    text = io.StringIO()
    Console(file=text, width=140).print(rich_table(columns, rows))
    return text.getvalue().rstrip()


def rich_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")  # never cut a module's name
    for row in rows:
        table.add_row(*row)
    return table


def _plain(columns: Sequence[str], rows: list[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]
    lines = [columns, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
