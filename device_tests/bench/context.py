"""What all runs of one benchmark share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from device_tests.adb.transport import Transport
from device_tests.bench.deploy import Deployment
from device_tests.bench.plan import BenchPlan
from device_tests.bench.runner import Runner
from device_tests.remote.conditions import Device
from device_tests.results.records import Pass
from export.contract.bundle import Bundle
from export.host.puzzles import Puzzle

Workloads = Mapping[Pass, dict[str, Any]]


@dataclass(frozen=True)
class BenchContext:
    """A plan, and the device, bundle and runner that it is carried out with.

    workloads: of each pass, as a record has it. puzzles: what the pass of that name asks.
    """

    bench_id: str
    transport: Transport
    device: Device
    bundle: Bundle
    deployment: Deployment
    runner: Runner
    plan: BenchPlan
    workloads: Workloads
    puzzles: tuple[Puzzle, ...]
