"""What every verb of the command line says and how: results, progress, numbers with units."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

PLAIN_LINE_EVERY_S = 5.0

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead of text for people.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier result of this command.")
]


def err_console() -> Console:
    """Where progress and errors go."""
    return Console(stderr=True, highlight=False)


def out_console() -> Console:
    """Where results for people go."""
    return Console(highlight=False)


def print_json(document: dict[str, Any]) -> None:
    """Print one compact JSON document as the last line of stdout."""
    print(json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False))


class Reporter:
    """Takes `(done, total, what)` and shows it: a bar in a terminal, now and then a line else."""

    def __init__(self, title: str, console: Console) -> None:
        self._title = title
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[what]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=None, what="")
        self._last_line = time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        """Show that `done` of `total` units are done and what is being worked on."""
        if self._console.is_terminal:
            self._progress.update(self._task, completed=done, total=total or None, what=what)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line = time.monotonic()
            share = f"{100 * done / total:.0f} %" if total else ""
            self._console.print(f"{self._title}: {share} {what}", soft_wrap=True)

    def line(self, text: str) -> None:
        """Say something that stays, above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def start(self) -> None:
        """Begin to draw."""
        self._progress.start()

    def stop(self) -> None:
        """Remove the bar."""
        self._progress.stop()


@contextmanager
def reporting(title: str) -> Iterator[Reporter]:
    """A Reporter on stderr for the duration of a piece of work."""
    reporter = Reporter(title, err_console())
    reporter.start()
    try:
        yield reporter
    finally:
        reporter.stop()


def size(count: int | float) -> str:
    """Bytes with a unit: `1.5 MiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def number(value: float | None, unit: str, digits: int = 1) -> str:
    """A number with its unit, or a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f} {unit}".rstrip()


def fact_table(rows: list[tuple[str, str]], title: str | None = None) -> Table:
    """Two columns without rules: what, and how much."""
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table
