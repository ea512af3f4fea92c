"""What a person sees while a benchmark runs: a bar with the time left, and a line for each run."""

from __future__ import annotations

from typing import Any

from device_tests.bench.events import (
    BenchEvent,
    BenchStarted,
    ConnectionLost,
    GateWaiting,
    RunEnded,
    RunProgress,
    RunStarted,
)
from device_tests.bench.plan import PlannedRun
from device_tests.results.metrics import METRICS
from device_tests.results.plain_text import plain, quantity
from scripts.console import Reporter, duration

SHOWN = {
    "cold": ("load_cold_ms",),
    "warm_up": (),
    "speed": ("step_ms", "prefill_tokens_per_s"),
    "natural": ("steps_per_canvas", "tokens_per_s"),
    "memory": ("peak_rss_bytes", "peak_pss_bytes"),
    "puzzles": ("exact_match", "answer_ms", "answer_tokens_per_s"),
}
"""The numbers of a pass that are worth a look while one waits."""

_UNITS = {metric.name: metric.unit for metric in METRICS}


class BenchView:
    """Takes the benchmark's events and shows them through a Reporter."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._done = 0
        self._runs = 0
        self._now = ""
        self._lost = False

    def on_event(self, event: BenchEvent) -> None:
        """Show one event."""
        match event:
            case BenchStarted():
                self._started(event)
            case GateWaiting():
                self._show(
                    f"cooling down: {plain(event.sensor)} {event.temperature_c:.1f} °C, begins "
                    f"under {event.threshold_c:g} °C"
                )
            case RunStarted():
                self._done, self._runs = event.number - 1, event.runs
                left = "" if event.eta_s is None else f", {duration(event.eta_s)} left"
                self._now = f"{_name(event.run)}{left}"
                self._show(self._now)
            case RunProgress():
                self._lost = False
                self._show(f"{self._now}: {_progress(event.event)}")
            case ConnectionLost():
                if not self._lost:
                    self._reporter.line(f"connection lost, waiting: {plain(event.sentence)}")
                self._lost = True
            case RunEnded():
                self._done = event.number
                self._reporter.line(_line(event))
                self._show("")

    def _started(self, event: BenchStarted) -> None:
        self._runs = event.runs
        device = event.device
        names = [device.manufacturer, device.model, device.soc]
        what = plain(" ".join(name for name in names if name) or device.serial)
        skipped = f", {event.skipped} more are in the results already" if event.skipped else ""
        self._reporter.line(f"{what}: {event.runs} runs{skipped}")
        if event.note is not None:
            self._reporter.line(f"note: {plain(event.note)}")

    def _show(self, what: str) -> None:
        self._reporter(self._done, self._runs, what)


def _name(run: PlannedRun) -> str:
    threads = "" if run.threads is None else f", {run.threads} threads"
    return f"{run.pass_} {run.repeat + 1}/{run.repeats}{threads}"


def _progress(event: Any) -> str:
    kind = event["event"]
    if kind == "step":
        return f"canvas {event['canvas'] + 1}, step {event['step']}/{event['max_steps']}"
    if kind == "prefill":
        return f"prefill {event['done']}/{event['total']} tokens"
    if kind == "answer":
        return f"answer {event['done']}/{event['total']}"
    return plain(kind, 40)


def _line(event: RunEnded) -> str:
    record = event.record
    head = f"{event.number}/{event.runs} {_name(event.run)}"
    gate = record["gate"]
    warm = "" if gate["begin_c"] is None else f", began at {gate['begin_c']:.1f} °C"
    if record["status"] == "failed":
        failure = record["failure"]
        return f"{head}: failed, {failure['reason']}: {plain(failure['sentence'], 1000)}"
    numbers = [
        f"{name} {quantity(record['metrics'].get(name), _UNITS[name])}"
        for name in SHOWN[record["pass"]]
    ]
    return f"{head}: {', '.join(numbers) or 'done'}{warm}"
