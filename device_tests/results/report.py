"""The report of a results file: text, Markdown, JSON, or one self-contained HTML page.

What it says is `summary.py`, plots are drawn in `plots.py`; two results are set side by side in
`compare.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from device_tests.results.intervals import share_interval
from device_tests.results.plain_text import field_name, markdown, quantity
from device_tests.results.prediction import EXPLANATION, HEADINGS, Forecast
from device_tests.results.summary import Group, Quantity, Summary
from device_tests.results.tables import WIDTH, Table, as_text


def to_json(summary: Summary) -> dict[str, Any]:
    """The summary as one JSON document: numbers exact, bytes as bytes, all of them finite."""
    return {
        "report": "pocketdiff",
        "schema_version": 1,
        "runs": summary.runs,
        "failed": summary.failed,
        "configurations": [_group_json(group) for group in summary.groups],
    }


def _group_json(group: Group) -> dict[str, Any]:
    return {
        "title": group.title,
        "conditions": group.raw_conditions,
        "notes": list(group.notes),
        "passes": {name: {"ok": ok, "failed": bad} for name, (ok, bad) in group.passes.items()},
        "metrics": {
            found.metric.name: {
                "unit": found.metric.unit,
                "median": found.median,
                "p5": found.p5,
                "p95": found.p95,
                "runs": len(found.repeats),
                "failed": found.failed,
                "steps": found.steps,
                "repeats": [repeat.value for repeat in found.repeats],
                **_share_json(found),
            }
            for found in group.quantities
            if found.median is not None
        },
        "failures": [
            {
                "run_id": run.run_id,
                "pass": run.pass_,
                "repeat": run.repeat,
                "reason": run.reason,
                "sentence": run.sentence,
            }
            for run in group.failures
        ],
        **({} if group.forecast is None else {"forecast": group.forecast.to_json()}),
    }


def _share_json(found: Quantity) -> dict[str, Any]:
    interval = share_interval(found.trials)
    if interval is None:
        return {}
    correct = sum(is_exact for _, is_exact in found.trials)
    return {"correct": correct, "count": len(found.trials), "interval_95": list(interval)}


def _metrics(group: Group) -> Table:
    rows = [
        (
            found.title,
            found.show(found.median),
            found.range,
            found.count,
            str(found.failed) if found.failed else "",
        )
        for found in group.quantities
        if found.median is not None
    ]
    return Table(("metric", "median", "p5 to p95", "runs", "failed"), rows, "lrrrr")


def _forecast(forecast: Forecast) -> Table:
    return Table(HEADINGS, [row.cells for row in forecast.rows], "lrrrrr")


def to_markdown(summary: Summary) -> str:
    """The summary as Markdown with tables, as GitHub shows it."""
    lines = ["# Benchmark", "", f"{summary.counted}.", ""]
    for group in summary.groups:
        lines += [f"## {markdown(group.title)}", "", f"{markdown(group.subtitle)}.", ""]
        lines += [f"- **Note**: {markdown(note)}." for note in group.notes]
        lines += [""] if group.notes else []
        if group.forecast is not None:
            lines += ["**Predicted and measured**", "", f"{markdown(group.forecast.basis)}.", ""]
            lines += [*_forecast(group.forecast).to_markdown(), "", f"{markdown(EXPLANATION)}.", ""]
        lines += [*_metrics(group).to_markdown(), ""]
        lines += [f"Not measured: {_missing(group)}.", ""] if group.missing else []
        if group.failures:
            failures = [
                (f"{run.pass_} {run.repeat}", run.reason, run.sentence) for run in group.failures
            ]
            lines += [*Table(("failed run", "reason", "what happened"), failures).to_markdown(), ""]
        repeats = [
            (found.title, ", ".join(found.show(repeat.value) for repeat in found.repeats))
            for found in group.quantities
            if len(found.repeats) > 1
        ]
        lines += [*Table(("repeat of", "each run"), repeats).to_markdown(), ""]
        lines += [*Table(("condition", "value"), group.conditions).to_markdown(), ""]
    return "\n".join(lines)


def _missing(group: Group) -> str:
    return ", ".join(title.lower() for title in group.missing)


def to_rich(summary: Summary) -> Any:
    """The summary for a terminal: one renderable of rich, readable at a width of 100."""
    from rich.console import Group as Lines
    from rich.text import Text

    shown: list[Any] = [Text(summary.counted)]
    for group in summary.groups:
        shown += [Text(), Text(group.title, style="bold"), Text(group.subtitle, style="dim")]
        shown += [Text(f"note: {note}", style="yellow") for note in group.notes]
        shown.append(_metrics(group).to_rich())
        if group.missing:
            shown.append(Text(f"not measured: {_missing(group)}", style="dim"))
        for run in group.failures:
            what = f"failed: {run.pass_} {run.repeat}: {run.reason}: {run.sentence}"
            shown.append(Text(what, style="red"))
        if group.forecast is not None:
            shown += [
                Text(),
                _forecast(group.forecast).to_rich("predicted and measured"),
                Text(group.forecast.basis, style="dim"),
                Text(EXPLANATION, style="dim"),
            ]
    return Lines(*shown)


def to_text(summary: Summary, width: int = WIDTH) -> str:
    """The summary as plain text of at most `width` columns, without colours."""
    return as_text(to_rich(summary), width)


def to_html(summary: Summary) -> str:
    """One page that needs nothing else: style and plots are in it, nothing is loaded, no script."""
    # Imported here: drawing takes a second to import that the other formats need not pay.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from device_tests.results import plots

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = [
        plots.draw_all(group.records, f"g{index}") for index, group in enumerate(summary.groups)
    ]
    return environment.get_template("report.html.j2").render(
        summary=summary,
        groups=list(zip(summary.groups, figures, strict=True)),
        style=Markup((folder / "report.css").read_text(encoding="utf-8")),
        celsius=lambda number: quantity(number, "°C"),
        seconds=lambda number: f"{number:,.1f} s",
        condition_groups=_by_condition,
        headings=HEADINGS,
        explanation=EXPLANATION,
    )


def _by_condition(group: Group) -> list[tuple[str, list[tuple[str, str]]]]:
    """The conditions of a group under their names; the unit is in the value and leaves the name."""
    found: dict[str, list[tuple[str, str]]] = {}
    for leaf, shown in group.conditions:
        name, _, field = leaf.partition(".")
        if field and name not in ("polling", "gate"):
            found.setdefault(name, []).append((field_name(field), shown))
        else:
            found.setdefault("run", []).append((field_name(field or name), shown))
    return list(found.items())
