"""A table as a value, and its two forms: plain columns for pipes, folded and coloured lines for terminals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gpujobs.faces.words import columns

if TYPE_CHECKING:
    from rich.text import Text

_GAP = 2
"""Columns between two cells."""

_LEAST = 10
"""A column that gives way keeps so many columns of the terminal."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One text, already clean, and how it looks on a terminal (a style of rich; empty for none)."""

    text: str
    style: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        right: Aligned to the right, for numbers.
        fold: It gives way where the terminal is narrow: its text goes on in the next line.
    """

    title: str
    right: bool = False
    fold: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its cells, and what stands below it over the whole width (nothing where it is empty)."""

    cells: tuple[Cell, ...]
    below: Cell = field(default_factory=lambda: Cell(""))


@dataclass(frozen=True, slots=True)
class Grid:
    """A table: its columns, and rows of as many cells."""

    columns: tuple[Column, ...]
    rows: list[Row] = field(default_factory=list)

    def add(self, *cells: Cell | str, below: Cell | None = None) -> None:
        """Add a row."""
        self.rows.append(Row(tuple(Cell(cell) if isinstance(cell, str) else cell for cell in cells), below or Cell("")))

    def plain(self) -> str:
        """Aligned columns, nothing cut off and nothing folded; each line with its newline."""
        return "".join("".join(text for text, _ in line).rstrip() + "\n" for line in self.lines(None))

    def rich(self, width: int) -> Text:
        """As it is shown on a terminal of so many columns."""
        from rich.text import Text

        shown = Text(no_wrap=True, overflow="ignore", end="")
        for line in self.lines(width):
            for text, style in line:
                shown.append(text, style or None)
            shown.append("\n")
        return shown

    def lines(self, width: int | None) -> list[list[tuple[str, str]]]:
        """The lines as pieces of text and style, folded to so many columns where a width is given."""
        widths = self._widths(width)
        title = tuple(Cell(column.title, "bold") for column in self.columns)
        lines = self._row(title, widths)
        for row in self.rows:
            lines += self._row(row.cells, widths)
            if row.below.text:
                indent = " " * (widths[0] + _GAP)
                room = None if width is None else max(_LEAST, width - len(indent))
                lines += [[(indent, ""), (part, row.below.style)] for part in fold(row.below.text, room)]
        return lines

    def _widths(self, width: int | None) -> list[int]:
        """Columns for each column: as much as its texts need, then less for those that give way."""
        needed = [
            max([columns(column.title), *(columns(row.cells[i].text) for row in self.rows)])
            for i, column in enumerate(self.columns)
        ]
        if width is None:
            return needed
        over = sum(needed) + _GAP * (len(needed) - 1) - width
        while over > 0:
            widest = max(
                (i for i, column in enumerate(self.columns) if column.fold and needed[i] > _LEAST),
                key=lambda i: needed[i],
                default=None,
            )
            if widest is None:
                break
            needed[widest] -= 1
            over -= 1
        return needed

    def _row(self, cells: Sequence[Cell], widths: Sequence[int]) -> list[list[tuple[str, str]]]:
        """One row as lines: as many as its most folded cell has."""
        folded = [fold(cell.text, width) for cell, width in zip(cells, widths, strict=True)]
        lines = []
        for n in range(max(len(parts) for parts in folded)):
            line = []
            for i, (cell, parts) in enumerate(zip(cells, folded, strict=True)):
                text = parts[n] if n < len(parts) else ""
                space = " " * (widths[i] - columns(text))
                end = "" if i == len(cells) - 1 else " " * _GAP
                before, after = (space, end) if self.columns[i].right else ("", space + end)
                line += [(before, ""), (text, cell.style), (after if i < len(cells) - 1 else "", "")]
            lines.append(line)
        return lines


def fold(text: str, width: int | None) -> list[str]:
    """A text as lines of at most so many columns, broken between words where that is possible, else after a dash."""
    if width is None or columns(text) <= width:
        return [text]
    lines, line = [], ""
    for word in text.split(" "):
        candidate = f"{line} {word}" if line else word
        if columns(candidate) <= width:
            line = candidate
            continue
        if line:
            lines.append(line)
        line = word
        while columns(line) > width:
            cut = next(n for n in range(len(line), 0, -1) if columns(line[:n]) <= width or n == 1)
            cut = line.rfind("-", 0, cut) + 1 or cut
            lines.append(line[:cut])
            line = line[cut:]
    return [*lines, line] if line or not lines else lines
