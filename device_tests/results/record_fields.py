"""What the record of one run says: its steps, answers, memory samples and sensors.

Records come from a device: whatever is not there, or is no finite number, is left out or None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from device_tests.remote.sensors import is_cpu_sensor

Record = Mapping[str, Any]


def each(found: object, path: str) -> list[Any]:
    """Everything at a dotted path, in order; a list stands for each of its items, and `answer` at
    the beginning for the answer of a run of one prompt."""
    if path.startswith("answer."):
        found, path = _answer(found), path.removeprefix("answer.")
    items = found if isinstance(found, list) else [found]
    for name in path.split("."):
        items = [item[name] for item in items if isinstance(item, Mapping) and name in item]
        items = [part for item in items for part in (item if isinstance(item, list) else [item])]
    return items


def _answer(record: object) -> list[Any]:
    answers = each(record, "result.answers")
    return answers if len(answers) == 1 else []


def as_number(found: object) -> float | None:
    """A finite number as a float, None for anything else."""
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        return None
    try:
        number = float(found)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def known(found: Iterable[object]) -> list[float]:
    """The numbers among these, in order."""
    return [number for item in found if (number := as_number(item)) is not None]


def numbers(found: object, path: str) -> list[float]:
    """The numbers at a path, in order."""
    return known(each(found, path))


def number(found: object, path: str) -> float | None:
    """The number at a path, None unless there is one thing and it is a number."""
    items = each(found, path)
    return as_number(items[0]) if len(items) == 1 else None


def sums(found: Iterable[object], *names: str) -> list[float]:
    """The sum of the named numbers for each item that has all of them."""
    rows = ([number(item, name) for name in names] for item in found)
    return [sum(known(row)) for row in rows if None not in row]


def ratio(above: float | None, below: float | None, factor: float = 1.0) -> float | None:
    """A quotient; None where a part is missing, or of 0."""
    return None if above is None or not below else factor * above / below


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The percentile by linear interpolation between order statistics (numpy's default); None of
    nothing."""
    return float(np.percentile(np.asarray(values, dtype=float), percent)) if values else None


def trials(record: Record, kind: str | None = None) -> list[tuple[str, bool]]:
    """Prompt of each puzzle (of one kind), and whether the answer was exactly right."""
    return [
        (str(puzzle.get("prompt")), puzzle["is_exact"])
        for puzzle in each(record, "puzzles")
        if isinstance(puzzle, Mapping)
        and isinstance(puzzle.get("is_exact"), bool)
        and kind in (None, puzzle.get("kind"))
    ]


def step_times(record: Record) -> list[float]:
    """Layers and head of every denoising step of the run, in ms, in their order."""
    return sums(each(record, "answer.canvases.steps"), "layers_ms", "head_ms")


def event_step_times(record: Record) -> list[float]:
    """As `step_times`, from the events: what a run that failed left."""
    return sums(each(record, "steps"), "layers_ms", "head_ms")


def accepted_positions(record: Record) -> list[list[float]]:
    """Positions accepted at each step, canvas by canvas; steps without that number are left out."""
    return [numbers(canvas, "steps.accepted") for canvas in each(record, "answer.canvases")]


def canvas_length(record: Record) -> int:
    """Tokens of the longest canvas, 0 if there is none."""
    return max((len(each(c, "tokens")) for c in each(record, "answer.canvases")), default=0)


def memory_samples(record: Record) -> list[Any]:
    """The memory samples of a run: those taken on the way, then after loading and at the end."""
    ends = (each(record, f"result.memory.{name}") for name in ("after_load", "at_end"))
    return [*each(record, "memory"), *(sample for end in ends for sample in end)]


def memory_series(record: Record, name: str) -> list[tuple[float, float]]:
    """Seconds since the process began and the value, for the samples taken on the way."""
    pairs = ((number(s, "t_ms"), number(s, name)) for s in each(record, "memory"))
    return [(t_ms / 1000, value) for t_ms, value in pairs if t_ms is not None and value is not None]


def sensor_samples(record: Record, *phases: str) -> list[Mapping[str, Any]]:
    """The sensor samples of the phases (`before`, `during`, `after`), phase by phase."""
    samples = [sample for sample in each(record, "sensors") if isinstance(sample, Mapping)]
    return [sample for phase in phases for sample in samples if sample.get("phase") == phase]


def hottest(sample: Mapping[str, Any]) -> float | None:
    """The hottest CPU sensor of one sensor sample in °C, as the thermal gate sees it: the hottest
    zone where none is a CPU's by its name."""
    zones = sample.get("temperature_c")
    zones = zones if isinstance(zones, Mapping) else {}
    names = [name for name in zones if is_cpu_sensor(name)] or list(zones)
    return max(known(zones[name] for name in names), default=None)


def fastest(sample: Mapping[str, Any]) -> float | None:
    """The clock of the fastest core in one sensor sample, in MHz."""
    cores = sample.get("cpu_mhz")
    return max(known(cores.values() if isinstance(cores, Mapping) else ()), default=None)
