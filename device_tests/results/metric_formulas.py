"""How metrics are computed: functions from a record to a number, or to None where it has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from device_tests.results.record_fields import (
    Record,
    accepted_positions,
    each,
    known,
    memory_samples,
    number,
    numbers,
    percentile,
    ratio,
    sensor_samples,
)

Compute = Callable[[Record], float | None]

COLD_RESIDENT_LIMIT = 0.05
"""A load counts as cold when at most this share of the bundle was in the page cache before it."""


def at(path: str) -> Compute:
    return lambda record: number(record, path)


def quotient(above: str, below: str, factor: float = 1.0) -> Compute:
    """Of the numbers at two paths."""
    return lambda record: ratio(number(record, above), number(record, below), factor)


def median_at(path: str) -> Compute:
    return lambda record: percentile(numbers(record, path), 50)


def answers_tokens_per_s(record: Record) -> float | None:
    tokens, ms = (numbers(record, f"result.answers.{name}") for name in ("new_tokens", "total_ms"))
    return ratio(sum(tokens), sum(ms), 1000) if len(tokens) == len(ms) else None


def per_canvas(record: Record) -> float | None:
    return ratio(number(record, "answer.encode_ms"), len(each(record, "answer.canvases")) - 1)


def load_cold(record: Record) -> float | None:
    resident = number(record, "result.cold.resident_after")
    is_cold = resident is not None and resident <= COLD_RESIDENT_LIMIT
    return number(record, "result.load_ms") if is_cold else None


def steps_per_canvas(record: Record) -> float | None:
    canvases = each(record, "answer.canvases")
    return ratio(len(each(record, "answer.canvases.steps")), len(canvases))


def accepted_per_step(record: Record) -> float | None:
    accepted = [count for canvas in accepted_positions(record) for count in canvas]
    return ratio(sum(accepted), len(accepted))


def tokens_per_forward(record: Record) -> float | None:
    steps = len(each(record, "answer.canvases.steps"))
    return ratio(number(record, "answer.new_tokens"), steps)


def tokens_per_s_with_padding(record: Record) -> float | None:
    committed = len(each(record, "answer.canvases.tokens"))
    return ratio(committed, number(record, "answer.total_ms"), 1000)


def steps_of_answers(record: Record) -> list[int]:
    """Denoising steps of each answer."""
    return [len(each(answer, "canvases.steps")) for answer in each(record, "result.answers")]


def answers_tokens_per_forward(record: Record) -> float | None:
    tokens, steps = numbers(record, "result.answers.new_tokens"), steps_of_answers(record)
    return ratio(sum(tokens), sum(steps)) if len(tokens) == len(steps) else None


def forwards_per_answer(record: Record) -> float | None:
    encodings, steps = numbers(record, "result.answers.encodings"), steps_of_answers(record)
    if len(encodings) != len(steps):
        return None
    return ratio(sum(steps) + sum(encodings), len(steps))


def charge_per_answer(record: Record) -> float | None:
    """None while charging: the current is then not the run's."""
    status = [each(sample, "battery.status") for sample in sensor_samples(record, "during")]
    if not status or any(found != ["discharging"] for found in status):
        return None
    current, ms = battery_current(record), numbers(record, "result.answers.total_ms")
    return None if current is None else ratio(abs(current) * sum(ms), len(ms) * 3600)


def largest(name: str) -> Compute:
    return lambda record: max(numbers(memory_samples(record), name), default=None)


def at_largest_rss(name: str) -> Compute:
    def compute_at_peak(record: Record) -> float | None:
        samples = [sample for sample in memory_samples(record) if number(sample, "rss_bytes")]
        peak = max(samples, key=lambda sample: number(sample, "rss_bytes") or 0, default=None)
        return None if peak is None else number(peak, name)

    return compute_at_peak


Pick = Callable[[Mapping[str, Any]], float | None]


def sensed(record: Record, pick: Pick, *phases: str) -> list[float]:
    return known(pick(sample) for sample in sensor_samples(record, *phases))


def last_sensed(pick: Pick, *phases: str) -> Compute:
    """Of the last sample of these phases that has it."""
    return lambda record: next(reversed(sensed(record, pick, *phases)), None)


def median_sensed(pick: Pick) -> Compute:
    """Of the samples during the run."""
    return lambda record: percentile(sensed(record, pick, "during"), 50)


battery_current = median_sensed(lambda sample: number(sample, "battery.current_ma"))


def operators(where: str) -> Compute:
    def count(record: Record) -> float | None:
        stages = [
            found for found in each(record, "result.delegation") if isinstance(found, Mapping)
        ]
        counts = each([stage for found in stages for stage in found.values()], where)
        totals = known(
            sum(known(found.values())) if isinstance(found, Mapping) else found for found in counts
        )
        return sum(totals) if totals else None

    return count
