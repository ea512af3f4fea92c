"""Progress as it is printed, in a terminal and elsewhere."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from scripts.console import Reporter


def test_the_time_left_is_of_the_pace_since_the_first_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = io.StringIO()
    clock = SimpleNamespace(monotonic=lambda: clock.now)
    clock.now = 0.0
    monkeypatch.setattr("scripts.console.time", clock)
    reporter = Reporter("quantizing", Console(file=said, width=100))
    # Eighty of a hundred were done by an earlier command, and say nothing about this one's pace.
    for now, done in ((10.0, 80), (16.0, 81), (30.0, 84), (130.0, 90)):
        clock.now = now
        reporter(done, 100, "a weight")
    assert said.getvalue().splitlines() == [
        "quantizing: 80 % a weight",
        "quantizing: 81 % (1 min 54 s left) a weight",
        "quantizing: 84 % (1 min 20 s left) a weight",
        "quantizing: 90 % (2 min 0 s left) a weight",
    ]


def test_the_bar_in_a_terminal_shows_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    clock = SimpleNamespace(monotonic=lambda: clock.now)
    clock.now = 0.0
    monkeypatch.setattr("scripts.console.time", clock)
    reporter = Reporter("quantizing", Console(file=said, width=120, force_terminal=True))
    reporter.start()
    for now, done in ((0.0, 10), (10.0, 11)):
        clock.now = now
        reporter(done, 10_000, "a weight")
    reporter.stop()
    assert "27 h 44 min left" in said.getvalue()
