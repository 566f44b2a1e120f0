"""A table on the terminal: drawn by rich for people, tab-free aligned text for pipes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence


def show(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Prints a table on stdout."""
    if sys.stdout.isatty():
        _drawn(headers, rows, title)
        return
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]
    for row in (headers, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _drawn(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*headers, title=title or None, show_lines=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
