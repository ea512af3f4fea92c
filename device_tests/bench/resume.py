"""Which runs of a plan are in the results already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from device_tests.bench.deploy import Deployment
from device_tests.bench.plan import BenchPlan, PlannedRun
from device_tests.bench.workload import Workloads
from device_tests.remote.conditions import Device
from device_tests.results.configuration import device_serial
from device_tests.results.records import Record

_Key = tuple[int | None, str, int, str]


def missing_runs(
    plan: BenchPlan,
    workloads: Workloads,
    earlier: Sequence[Record],
    device: Device,
    deployment: Deployment,
) -> list[PlannedRun]:
    """The runs that have not gone well on this device with this bundle, gated and polled alike."""
    done = set(_done(earlier, device, deployment, plan))
    return [
        run
        for run in plan.runs
        if _key(run.threads, run.pass_, run.repeat, workloads[run.pass_]) not in done
    ]


def _done(
    earlier: Sequence[Record], device: Device, deployment: Deployment, plan: BenchPlan
) -> Iterable[_Key]:
    for record in earlier:
        conditions = record["conditions"]
        if (
            record["status"] == "ok"
            and record["gate"]["threshold_c"] == plan.max_temperature_c
            and conditions["poll_s"] == plan.poll_s
            and conditions["bundle"]["sha256"] == deployment.bundle_sha256
            and _identity(conditions["device"]) == _identity(asdict(device))
        ):
            yield _key(
                conditions["threads"], record["pass"], record["repeat"], conditions["workload"]
            )


def _key(threads: int | None, pass_: str, repeat: int, work: Mapping[str, Any]) -> _Key:
    return threads, pass_, repeat, repr(sorted(work.items()))


def _identity(device: Mapping[str, Any]) -> tuple[Any, ...]:
    """A device over its restarts."""
    names = ("model", "soc", "abi", "memory_bytes")
    return device_serial(device["serial"]), *(device[name] for name in names)
