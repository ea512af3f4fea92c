"""The plots of the report as inline SVG, from the records of one configuration.

Colours come from the page's style sheet, so that they follow a light or dark page. Text in a plot
is text and is never read as mathematics or markup.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from device_tests.results.metrics import BY_NAME, value
from device_tests.results.plain_text import quantity
from device_tests.results.record_fields import (
    Record,
    accepted_positions,
    canvas_length,
    event_step_times,
    fastest,
    hottest,
    memory_series,
    percentile,
    step_times,
)

WIDTH_IN, HEIGHT_IN = 4.5, 2.9
"""Small, so that 8.5 points are still readable when a phone shows the plot in its full width."""

MAXIMUM_POINTS = 1500
"""Marks in one plot at most: more make a page of megabytes, and hide each other."""

# Each colour is a place holder that leaves as a variable of the style sheet.
_INK, _FAINT, _PAPER, _BAD = "#010203", "#010204", "#010205", "#010206"
_SERIES = tuple(f"#0102{number:02x}" for number in range(0x10, 0x18))
_VARIABLES = {
    _INK: "--ink",
    _FAINT: "--faint",
    _PAPER: "--paper",
    _BAD: "--bad",
    **{colour: f"--series-{index}" for index, colour in enumerate(_SERIES)},
}
_COLOUR = re.compile(r"(?<=: )(" + "|".join(_VARIABLES) + r")(?=[;\"])")
_TAG = re.compile(r"<[^<>]*>")
_IDENTIFIER = re.compile(r'(\bid="|url\(#|href="#)')

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 3,
    "legend.labelcolor": _INK,
}

_MEMORY = (
    ("rss_bytes", "RSS"),
    ("pss_bytes", "PSS"),
    ("anonymous_bytes", "anonymous"),
    ("file_bytes", "file-backed"),
)

_SPREAD = (
    "load_warm_ms",
    "prompt_ms",
    "first_draft_ms",
    "step_ms",
    "layers_ms",
    "head_ms",
    "first_commit_ms",
    "tokens_per_s",
)


@dataclass(frozen=True)
class Plot:
    """A plot for the page: `svg`, or None where `missing` says in one sentence why there is none.

    `alternative` says in words what the plot shows.
    """

    name: str
    title: str
    caption: str
    alternative: str
    svg: Markup | None = None
    missing: str = ""


class NothingToDraw(Exception):
    """The records have not what a plot shows; the message is a sentence for the reader."""


def draw_all(records: Sequence[Record], prefix: str) -> list[Plot]:
    """Every plot of one configuration; `prefix` keeps the SVG's identifiers apart on the page."""
    return [
        _draw(f"{prefix}-{name}", name, title, paint, records)
        for name, (title, paint) in PLOTS.items()
    ]


def _draw(
    prefix: str,
    name: str,
    title: str,
    paint: Callable[[Figure, Sequence[Record]], tuple[str, str]],
    records: Sequence[Record],
) -> Plot:
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": prefix}):
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
        try:
            caption, alternative = paint(figure, records)
        except NothingToDraw as reason:
            return Plot(name, title, "", "", missing=str(reason))
        return Plot(name, title, caption, alternative, _svg(figure, prefix, alternative))


def _svg(figure: Figure, prefix: str, alternative: str) -> Markup:
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Only tags are rewritten: between them is text that a device may have chosen.
    text = _TAG.sub(lambda tag: _rewrite(tag.group(), prefix), text)
    start = Markup('<svg role="img" aria-label="{}" ').format(alternative)
    return Markup(start + Markup(text.removeprefix("<svg ")))


def _rewrite(tag: str, prefix: str) -> str:
    tag = _COLOUR.sub(lambda colour: f"var({_VARIABLES[colour.group()]})", tag)
    return _IDENTIFIER.sub(lambda found: f"{found.group()}{prefix}-", tag)


def _of_pass(records: Sequence[Record], pass_: str) -> list[Record]:
    return [record for record in records if record["pass"] == pass_]


def _ok(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["status"] == "ok"]


def _colours(count: int) -> Iterator[tuple[int, str]]:
    for index in range(count):
        yield index, _SERIES[index % len(_SERIES)]


def _key(axes: Axes, columns: int = 3) -> None:
    """A legend under the plot, where it hides nothing; none for more lines than there are
    colours, which could not be told apart."""
    handles, labels = axes.get_legend_handles_labels()
    if 0 < len(handles) <= len(_SERIES) + 1:
        axes.figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, handlelength=1.4
        )


def _run_names(records: Sequence[Record]) -> list[str]:
    """`repeat 3`, or, where benches were put together and repeats come twice, `run 3`."""
    repeats = [record["repeat"] for record in records if record["status"] == "ok"]
    if len(set(repeats)) < len(repeats):
        return [f"run {number}" for number in range(1, len(records) + 1)]
    failed = (" (failed)" if record["status"] != "ok" else "" for record in records)
    return [
        f"repeat {record['repeat']}{mark}" for record, mark in zip(records, failed, strict=True)
    ]


def _paint_steps(figure: Figure, records: Sequence[Record]) -> tuple[str, str]:
    speed = _of_pass(records, "speed")
    runs = [(record, step_times(record)) for record in _ok(speed)]
    runs = [(record, times) for record, times in runs if times]
    failed = [(r, times) for r in speed if r["status"] != "ok" and (times := event_step_times(r))]
    if not runs and not failed:
        raise NothingToDraw("No speed run has steps, so there are no step times to show.")
    axes = figure.subplots()
    names = _run_names([record for record, _ in runs])
    marker = "o-" if sum(len(times) for _, times in runs) <= MAXIMUM_POINTS else "-"
    for index, colour in _colours(len(runs)):
        times = runs[index][1]
        axes.plot(
            range(1, len(times) + 1), times, marker, color=colour, linewidth=0.9,
            label=names[index],
        )  # fmt: skip
    for index, (_, times) in enumerate(failed):
        axes.plot(
            range(1, len(times) + 1), times, "x--", color=_BAD, linewidth=0.9, markersize=4,
            label="failed run" if index == 0 else None,
        )  # fmt: skip
    ends = _canvas_ends(runs[0][0]) if runs else []
    for end in ends[:-1]:
        axes.axvline(end + 0.5, color=_FAINT, linewidth=1, linestyle=":")
    everything = [time for _, times in runs for time in times]
    median = percentile(everything, 50)
    if median is not None:
        axes.axhline(median, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(xlabel="step of the run", ylabel="step, ms")
    axes.set_ylim(0, 1.08 * max(time for _, times in [*runs, *failed] for time in times))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _key(axes)
    caption = "Layers and head of each forced step, one line a repeat."
    if median is not None:
        caption += f" Dashed: the median of all, {quantity(median, 'ms')}."
    if len(ends) > 1:
        caption += " Dotted: a new canvas."
    if failed:
        caption += " Crosses: runs that failed, as far as they came."
    return caption, f"Line plot of step times in ms over {len(runs)} repeats. {caption}"


def _canvas_ends(record: Record) -> list[int]:
    return list(accumulate(len(canvas) for canvas in accepted_positions(record)))


def _paint_accepted(figure: Figure, records: Sequence[Record]) -> tuple[str, str]:
    natural = _ok(_of_pass(records, "natural"))
    runs = [r for r in natural or _ok(_of_pass(records, "speed")) if any(accepted_positions(r))]
    if not runs:
        raise NothingToDraw("No run that went well has steps, so nothing was accepted.")
    # Runs of one seed mostly agree: each different course is drawn once.
    courses: Counter[tuple[tuple[float, ...], ...]] = Counter(
        tuple(map(tuple, accepted_positions(record))) for record in runs
    )
    axes = figure.subplots()
    for (course, count), (_, colour) in zip(courses.items(), _colours(len(courses)), strict=True):
        step = 1
        for index, canvas in enumerate(course):
            axes.plot(
                range(step, step + len(canvas)), canvas, "o-", color=colour,
                label=f"{count} run{'s' * (count != 1)}" if index == 0 else None,
            )  # fmt: skip
            step += len(canvas)
    length = max(map(canvas_length, runs))
    axes.axhline(length, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    ends = _canvas_ends(runs[0])
    for end in ends[:-1]:
        axes.axvline(end + 0.5, color=_FAINT, linewidth=1, linestyle=":")
    axes.set(xlabel="step of the run", ylabel="accepted positions")
    axes.set_ylim(0, max(1, length) * 1.08)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    caption = f"Positions accepted at each step; dashed: the whole canvas of {length}."
    if len(ends) > 1:
        caption += " Dotted: a new canvas."
    if len(courses) > 1:
        _key(axes)
    elif len(runs) > 1:
        caption += f" All {len(runs)} runs took the same course."
    if not natural:
        caption += " Steps were forced: no natural run went well."
    return caption, f"Line plot of accepted positions over steps. {caption}"


def _paint_memory(figure: Figure, records: Sequence[Record]) -> tuple[str, str]:
    runs = [r for r in _of_pass(records, "memory") if memory_series(r, "rss_bytes")]
    if not runs:
        raise NothingToDraw("No run of the memory pass left a memory sample.")
    axes = figure.subplots()
    for (name, label), (index, colour) in zip(_MEMORY, _colours(len(_MEMORY)), strict=True):
        for number, record in enumerate(runs):
            points = memory_series(record, name)
            times, sizes = zip(*points, strict=True) if points else ((), ())
            axes.plot(
                times, [size / 2**20 for size in sizes], color=colour,
                linestyle=("-", "--")[index == 1], label=label if number == 0 else None,
            )  # fmt: skip
    axes.set(xlabel="s since the process began", ylabel="MiB")
    axes.set_ylim(bottom=0)
    _key(axes, 4)
    caption = "Memory of the process in the memory pass, from loading to the end."
    if len(runs) > 1:
        caption += f" {len(runs)} runs lie over each other."
    if any(record["status"] != "ok" for record in runs):
        caption += " A run that failed is among them."
    return caption, f"Line plot of RSS, PSS, anonymous and file-backed memory in MiB. {caption}"


def _paint_sensors(figure: Figure, records: Sequence[Record]) -> tuple[str, str]:
    speed = _of_pass(records, "speed")
    hot = [(record, _series(record, hottest)) for record in speed]
    clocks = [(record, _series(record, fastest)) for record in speed]
    has_heat, has_clock = (any(points for _, points in found) for found in (hot, clocks))
    if not has_heat and not has_clock:
        raise NothingToDraw("This device shows neither temperatures nor clocks to the shell.")
    rows = has_heat + has_clock
    figure.set_size_inches(WIDTH_IN, HEIGHT_IN * (0.6 + 0.4 * rows))
    all_axes = figure.subplots(rows, sharex=True, squeeze=False)[:, 0]
    captions = []
    if has_heat:
        axes = all_axes[0]
        _sensor_lines(axes, hot)
        threshold = speed[0]["gate"]["threshold_c"]
        axes.axhline(threshold, color=_BAD, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_ylabel("hottest, °C")
        captions.append(
            f"The hottest sensor; dashed: the {quantity(threshold, '°C')} under which a run begins."
        )
    else:
        captions.append("This device shows no temperature to the shell.")
    if has_clock:
        axes = all_axes[-1]
        _sensor_lines(axes, clocks)
        axes.set_ylabel("clock, MHz")
        axes.set_ylim(bottom=0)
        captions.append("The clock of the fastest core.")
    else:
        captions.append("This device shows no clock to the shell.")
    for axes in all_axes:
        axes.axvline(0, color=_FAINT, linewidth=1.2)
    all_axes[-1].set_xlabel("s since the run was started")
    _key(all_axes[0])
    captions.append("Hollow: before and after a run.")
    caption = " ".join(captions)
    return caption, f"Line plot of sensors over {len(speed)} speed runs. {caption}"


def _series(
    record: Record, read: Callable[[Mapping[str, Any]], float | None]
) -> list[tuple[float, float, str]]:
    return [
        (sample["t_s"], number, sample["phase"])
        for sample in record["sensors"]
        if (number := read(sample)) is not None
    ]


def _sensor_lines(axes: Axes, found: list[tuple[Record, list[tuple[float, float, str]]]]) -> None:
    names = _run_names([record for record, _ in found])
    has_markers = sum(len(points) for _, points in found) <= MAXIMUM_POINTS
    for index, colour in _colours(len(found)):
        record, points = found[index]
        if not points:
            continue
        colour = colour if record["status"] == "ok" else _BAD
        axes.plot(
            [t_s for t_s, _, _ in points], [number for _, number, _ in points], "-", color=colour,
            linewidth=0.9, label=names[index],
        )  # fmt: skip
        for is_during in (True, False):
            marked = [p for p in points if (p[2] == "during") == is_during]
            if marked and (has_markers or not is_during):
                axes.plot(
                    [t_s for t_s, _, _ in marked], [number for _, number, _ in marked], "o",
                    color=colour, markerfacecolor=colour if is_during else _PAPER,
                )  # fmt: skip


def _paint_step_spread(figure: Figure, records: Sequence[Record]) -> tuple[str, str]:
    runs = [(r, times) for r in _ok(_of_pass(records, "speed")) if (times := step_times(r))]
    if not runs:
        raise NothingToDraw("No speed run has steps, so there is no distribution.")
    axes = figure.subplots()
    stride = -(-sum(len(times) for _, times in runs) // MAXIMUM_POINTS)
    axes.boxplot(
        [times for _, times in runs], positions=range(len(runs)), widths=0.5, showfliers=False,
        whis=(5, 95), boxprops={"color": _INK}, whiskerprops={"color": _INK},
        capprops={"color": _INK}, medianprops={"color": _INK, "linewidth": 1.6},
    )  # fmt: skip
    for index, colour in _colours(len(runs)):
        times = runs[index][1]
        shown = range(0, len(times), stride)
        # Spread sideways by the order of the steps, so that points do not hide each other.
        places = [index - 0.2 + 0.4 * step / max(1, len(times) - 1) for step in shown]
        drawn = [times[step] for step in shown]
        axes.plot(places, drawn, "o", color=colour, markersize=2.5, alpha=0.8)
    names = [name.split(maxsplit=1) for name in _run_names([record for record, _ in runs])]
    every = -(-len(runs) // 12)
    axes.set_xticks(range(0, len(runs), every), [number for _, number in names[::every]])
    axes.set(xlabel=names[0][0], ylabel="step, ms")
    axes.grid(axis="x", visible=False)
    which = "Every step" if stride == 1 else f"One step in {stride}"
    caption = (
        f"{which} of every repeat, in its order from left to right. Box: quartiles and median of "
        "all steps; whiskers: 5th and 95th percentile. The axis does not begin at 0."
    )
    return caption, f"Strip and box plot of the step times of {len(runs)} repeats. {caption}"


def _paint_spread(figure: Figure, records: Sequence[Record]) -> tuple[str, str]:
    style = records[0]["conditions"]["bundle"]["style"]
    rows = []
    for name in _SPREAD:
        metric = BY_NAME[name]
        title = metric.title_in(style)
        numbers = [n for record in records if (n := value(metric, record)) is not None]
        median = percentile(numbers, 50)
        if title is not None and len(numbers) > 1 and median:
            rows.append((title, [100 * (number / median - 1) for number in numbers]))
    if not rows:
        raise NothingToDraw("No metric has two runs, so nothing is known of the spread over runs.")
    axes = figure.subplots()
    for index, (_, shifts) in enumerate(reversed(rows)):
        axes.plot([min(shifts), max(shifts)], [index, index], color=_FAINT, linewidth=2.5)
        axes.plot(shifts, [index] * len(shifts), "o", color=_SERIES[0], markersize=4, alpha=0.75)
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [title for title, _ in reversed(rows)])
    axes.set_xlabel("difference from the median of the repeats, %")
    axes.grid(axis="y", visible=False)
    caption = "One point a repeat, each as its difference from the median over repeats."
    return caption, f"Strip plot of {len(rows)} metrics over repeats. {caption}"


PLOTS: dict[str, tuple[str, Callable[[Figure, Sequence[Record]], tuple[str, str]]]] = {
    "steps": ("Step time over a run", _paint_steps),
    "step-spread": ("Step times, repeat by repeat", _paint_step_spread),
    "accepted": ("Accepted positions over steps", _paint_accepted),
    "memory": ("Memory over time", _paint_memory),
    "sensors": ("Temperature and clock over time", _paint_sensors),
    "spread": ("Spread over repeats", _paint_spread),
}
"""The plots in the order of the page: name -> title, and what paints it."""
