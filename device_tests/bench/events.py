"""What a benchmark reports while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from device_tests.bench.plan import PlannedRun
from device_tests.remote import conditions
from device_tests.results.records import Record


@dataclass(frozen=True)
class BenchStarted:
    """The device is locked; `skipped` runs of the plan are in the results already.

    note: what was found on the device, such as the lock of a benchmark that died.
    """

    bench_id: str
    device: conditions.Device
    runs: int
    skipped: int
    note: str | None


@dataclass(frozen=True)
class GateWaiting:
    """The device is too warm for the next run."""

    run: PlannedRun
    sensor: str
    temperature_c: float
    threshold_c: float
    waited_s: float


@dataclass(frozen=True)
class RunStarted:
    """Run `number` (from 1) of `runs` goes; `eta_s` until the end of all, None before the first
    has ended."""

    run: PlannedRun
    run_id: str
    number: int
    runs: int
    eta_s: float | None


@dataclass(frozen=True)
class RunProgress:
    """An event of the runner, as it is."""

    run: PlannedRun
    event: Mapping[str, Any]


@dataclass(frozen=True)
class ConnectionLost:
    """The device is being waited for; the run on it goes on."""

    sentence: str


@dataclass(frozen=True)
class RunEnded:
    """A record was written."""

    run: PlannedRun
    record: Record
    number: int
    runs: int
    eta_s: float | None


BenchEvent = BenchStarted | GateWaiting | RunStarted | RunProgress | ConnectionLost | RunEnded


@dataclass(frozen=True)
class BenchOutcome:
    """What a benchmark wrote; `ended_early` says why runs of the plan were not made."""

    bench_id: str
    records: tuple[Record, ...]
    skipped: int
    ended_early: str | None

    @property
    def failed(self) -> int:
        """Records of failed runs."""
        return sum(record["status"] == "failed" for record in self.records)
