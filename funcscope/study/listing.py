"""A table and what is to be said of it: the same cells in a terminal and on a page."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from tabulate import tabulate

MOST = 100
"""Columns of text that are still easy to read."""


class Listing(NamedTuple):
    """Rows start with a name; what a cell leaves out is unknown, and a note says why."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def trimmed(self) -> Listing:
        """Without columns of which every cell is empty."""
        seen = [i for i in range(len(self.headers)) if not i or any(row[i] for row in self.rows)]
        cut = [tuple(row[i] for i in seen) for row in (self.headers, *self.rows)]
        return self._replace(headers=cut[0], rows=tuple(cut[1:]))

    def text(self, width: int = 0) -> str:
        """As plain text; a table that is wider than `width` goes on below, by columns. 0: as wide as it is."""
        tables = _tables(self.headers, self.rows, width) if self.rows else []
        return "\n".join(["\n\n".join(tables), *(wrapped(note, width) for note in self.notes)]).strip("\n")


def wrapped(text: str, width: int = 0) -> str:
    """A sentence on lines of at most `width`, and of `MOST` columns; long names and paths stay whole.

    >>> print(wrapped("one two three", 8))
    one two
    three
    """
    most = min(width or MOST, MOST)
    return textwrap.fill(text, most, break_long_words=False, break_on_hyphens=False)


def terminal_width() -> int:
    """Columns of the terminal, or of COLUMNS where that is set; 0 where the output goes elsewhere."""
    return shutil.get_terminal_size((0, 0)).columns


def _tables(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """The table, cut between columns where it must be; names stand before each part."""
    tables, first = [], 1
    while first < len(headers):
        last = len(headers)
        while not _fits(shown := _table(headers, rows, first, last), width) and last > first + 1:
            last -= 1
        room = width - 2 - max(len(row[0]) for row in (headers, *rows))
        tables.append(shown if _fits(shown, width) else _table(headers, rows, first, last, max(room, 20)))
        first = last
    return tables


def _fits(table: str, width: int) -> bool:
    return not width or max(map(len, table.split("\n"))) <= width


def _table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], first: int, last: int, most: int | None = None
) -> str:
    """Some columns behind the names, their cells on lines of at most `most` characters."""
    cut = [[row[0], *row[first:last]] for row in (headers, *rows)]
    widths = None if most is None else [None, *[most] * (last - first)]
    table = tabulate(cut[1:], headers=cut[0], disable_numparse=True, maxcolwidths=widths)
    return "\n".join(line.rstrip() for line in table.split("\n"))
