"""A comparison for people and programs: for a terminal, as plain text, Markdown and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from device_tests.results.compare import Comparison, Row, Side
from device_tests.results.intervals import LEVEL, Interval
from device_tests.results.plain_text import markdown, plain
from device_tests.results.tables import WIDTH, Table, as_text

_HEADINGS = ("metric", "A", "B", "runs A, B", "B / A", "95 % interval", "B is")
_COLOURS = {"better": "green", "worse": "red"}


def _table(rows: Sequence[Row]) -> Table:
    return Table(_HEADINGS, [_cells(row) for row in rows], "lrrrrrl")


def _cells(row: Row) -> tuple[str, ...]:
    interval = row.why if row.interval is None else "{:.3f} to {:.3f}".format(*row.interval)
    return (
        row.title,
        row.a.show(row.metric.unit),
        row.b.show(row.metric.unit),
        f"{_count(row.a)}, {_count(row.b)}",
        "-" if row.ratio is None else f"{row.ratio:.3f}",
        interval,
        "" if row.verdict == "not known" else row.verdict,
    )


def _count(side: Side) -> str:
    return f"{len(side.repeats)} (+{side.failed} failed)" if side.failed else f"{len(side.repeats)}"


def _summary(comparison: Comparison) -> str:
    (runs_a, runs_b), (failed_a, failed_b) = comparison.runs, comparison.failed
    return f"A: {runs_a} runs, {failed_a} failed; B: {runs_b} runs, {failed_b} failed"


def to_rich(comparison: Comparison) -> Any:
    """The comparison for a terminal: one renderable of rich, readable at a width of 100."""
    from rich.console import Group
    from rich.text import Text

    shown: list[Any] = [
        Text(f"{side}: {heading}", style="bold")
        for side, heading in zip("AB", comparison.headings, strict=True)
    ]
    shown.append(Text(_summary(comparison)))
    shown += [
        Text(f"on purpose: {found.sentence}", style="yellow") for found in comparison.differences
    ]
    for title, rows in comparison.groups:
        shown.append(_table(rows).to_rich(title, gap=1, style_of=lambda v: _COLOURS.get(v, "")))
    shown += [
        Text(f"failed: {side} {run}: {reason}: {sentence}", style="red")
        for side, run, reason, sentence in comparison.failures
    ]
    shown += [Text(note, style="dim") for note in comparison.notes]
    return Group(*shown)


def to_text(comparison: Comparison, width: int = WIDTH) -> str:
    """The comparison as plain text of at most `width` columns, without colours."""
    return as_text(to_rich(comparison), width)


def to_markdown(comparison: Comparison) -> str:
    """The comparison as Markdown with tables."""
    lines = [
        f"- **{side}**: {markdown(heading)}"
        for side, heading in zip("AB", comparison.headings, strict=True)
    ]
    lines += ["", f"{_summary(comparison)}.", ""]
    if comparison.differences:
        different = [(found.leaf, found.a, found.b) for found in comparison.differences]
        lines += [*Table(("different on purpose", "A", "B"), different).to_markdown(), ""]
    for title, rows in comparison.groups:
        lines += [f"**{title.capitalize()}**", ""] if title else []
        lines += [*_table(rows).to_markdown(), ""]
    if comparison.failures:
        failures = [(f"{side} {run}", *why) for side, run, *why in comparison.failures]
        lines += [*Table(("failed run", "reason", "what happened"), failures).to_markdown(), ""]
    lines += [f"- {markdown(note)}." for note in comparison.notes]
    return "\n".join(lines) + "\n"


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as one JSON document, all numbers exact and finite."""
    return {
        "compare": "pocketdiff",
        "schema_version": 1,
        "across": list(comparison.across),
        "differences": [
            {"condition": plain(found.leaf), "a": found.a, "b": found.b}
            for found in comparison.differences
        ],
        **{
            side: {
                "runs": comparison.runs[index],
                "failed": comparison.failed[index],
                "bundle": comparison.bundles[index],
            }
            for index, side in enumerate("ab")
        },
        "level": LEVEL,
        "metrics": {
            row.name: {
                "unit": row.metric.unit,
                "a": row.a.median,
                "b": row.b.median,
                "a_repeats": list(row.a.repeats),
                "b_repeats": list(row.b.repeats),
                "a_failed": row.a.failed,
                "b_failed": row.b.failed,
                **_share_json(row),
                "ratio": row.ratio,
                "interval": _finite(row.interval),
                "verdict": row.verdict,
                "why": row.why,
            }
            for row in comparison.rows
        },
        "failures": [
            {"side": side, "run": run, "reason": reason, "sentence": sentence}
            for side, run, reason, sentence in comparison.failures
        ],
        "notes": list(comparison.notes),
    }


def _finite(interval: Interval | None) -> list[float | None] | None:
    """JSON has no infinity: an end that is open is null."""
    return None if interval is None else [end if math.isfinite(end) else None for end in interval]


def _share_json(row: Row) -> dict[str, Any]:
    """What a share has more: how many of how many, and each side's own interval."""
    if row.metric.trials is None:
        return {}
    return {
        f"{name}_{what}": found
        for name, side in (("a", row.a), ("b", row.b))
        for what, found in (
            ("correct", sum(is_exact for _, is_exact in side.trials)),
            ("count", len(side.trials)),
            ("interval_95", None if side.interval is None else list(side.interval)),
        )
    }
