"""A table once described: as Markdown, or for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from device_tests.results.plain_text import markdown

WIDTH = 100
"""Columns of a terminal that everything fits in."""


@dataclass(frozen=True)
class Table:
    """Headings, rows of cells as text, and how the columns are aligned: `l` or `r` for each, by
    default all to the left."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str = ""

    def to_markdown(self, escape: Callable[[object], str] = markdown) -> list[str]:
        """The lines of a Markdown table; no cell can end its row."""
        align = self.align or "l" * len(self.headings)
        ruler = "|".join("---:" if side == "r" else "---" for side in align)
        cells = [" | ".join(map(escape, row)) for row in self.rows]
        return [f"| {' | '.join(self.headings)} |", f"|{ruler}|", *(f"| {row} |" for row in cells)]

    def to_rich(
        self, title: str = "", *, gap: int = 2, style_of: Callable[[str], str] = lambda cell: ""
    ) -> Any:
        """A table of rich with `gap` spaces between columns, the first of which is coloured;
        `style_of` says how the last cell of a row is shown."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=title or None, title_justify="left", box=None, pad_edge=False,
            padding=(0, 1, 0, gap - 1),
        )  # fmt: skip
        for index, (heading, side) in enumerate(zip(self.headings, self.align, strict=True)):
            table.add_column(
                heading,
                justify="right" if side == "r" else "left",
                style="" if index else "cyan",
                overflow="fold",
            )
        for *cells, last in self.rows:
            table.add_row(*map(Text, cells), Text(last, style=style_of(last)))
        return table


def as_text(renderable: Any, width: int = WIDTH) -> str:
    """What rich shows, as plain text of at most `width` columns without colours."""
    from rich.console import Console

    console = Console(width=width, highlight=False, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()
