"""How every command of the project prints: lines, tables, JSON, progress."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

PLAIN_LINE_EVERY_S = 5.0
PACE_AFTER_S = 2.0
"""An estimate from less would jump about."""


def err_console() -> Console:
    """Where progress and errors go."""
    return Console(stderr=True, highlight=False)


def out_console() -> Console:
    """Where results for people go."""
    return Console(highlight=False)


def say(text: str, *, on_stderr: bool = False) -> None:
    """Print a line as it is, without markup, however long."""
    (err_console() if on_stderr else out_console()).print(text, markup=False, soft_wrap=True)


def print_json(document: dict[str, Any]) -> None:
    """Print one compact JSON document as the last line of stdout."""
    print(json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False))


class _Pace:
    """The time that is left, if the rest goes as what was done since the first call."""

    def __init__(self) -> None:
        # What is done at the first call was done before: by an earlier, interrupted command.
        self._first: tuple[float, int] | None = None

    def left_s(self, done: int, total: int, now_s: float) -> float | None:
        """Seconds; None while there is nothing to judge by."""
        if self._first is None or done < self._first[1]:
            self._first = now_s, done
        began_s, before = self._first
        if done <= before or not total or now_s - began_s < PACE_AFTER_S:
            return None
        return (total - done) * (now_s - began_s) / (done - before)


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
            TextColumn("{task.fields[left]}"),
            TextColumn("[dim]{task.fields[what]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=None, what="", left="")
        self._pace = _Pace()
        self._last_line = time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        """Show that `done` of `total` units are done and what is being worked on."""
        left_s = self._pace.left_s(done, total, time.monotonic())
        left = "" if left_s is None else f"{duration(left_s)} left"
        if self._console.is_terminal:
            self._progress.update(
                self._task, completed=done, total=total or None, what=what, left=left
            )
        elif time.monotonic() - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line = time.monotonic()
            share = f"{100 * done / total:.0f} %" if total else ""
            words = [f"{self._title}:", share, f"({left})" if left else "", what]
            self.line(" ".join(filter(None, words)))

    def line(self, text: str) -> None:
        """Print something that stays, above the bar."""
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


def duration(seconds: float) -> str:
    """`27 h 44 min`, `1 min 54 s` or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def number(value: float | None, unit: str = "", digits: int = 1) -> str:
    """A number with its unit, or a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f} {unit}".rstrip()


def fact_table(rows: Sequence[tuple[str, str]], title: str | None = None) -> Table:
    """Two columns without rules: what, and how much."""
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def column_table(title: str | None, texts: Sequence[str], numbers: Sequence[str] = ()) -> Table:
    """Columns with headings and without rules: texts fold, numbers stand right and stay whole."""
    table = Table(title=title, title_justify="left", box=None)
    for heading in texts:
        table.add_column(heading, overflow="fold")
    for heading in numbers:  # a cut number is a wrong one
        table.add_column(heading, justify="right", no_wrap=True)
    return table
