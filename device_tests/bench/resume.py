"""Which runs of a plan are in the results already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from device_tests.bench.context import BenchContext
from device_tests.bench.plan import PlannedRun
from device_tests.results.configuration import device_serial
from device_tests.results.records import Record

_Key = tuple[int | None, str, int, str]


def missing_runs(context: BenchContext, earlier: Sequence[Record]) -> list[PlannedRun]:
    """The runs that have not gone well on this device with this bundle, gated and polled alike."""
    done = set(_done(context, earlier))
    return [
        run
        for run in context.plan.runs
        if _key(run.threads, run.pass_, run.repeat, context.workloads[run.pass_]) not in done
    ]


def _done(context: BenchContext, earlier: Sequence[Record]) -> Iterable[_Key]:
    for record in earlier:
        conditions = record["conditions"]
        if (
            record["status"] == "ok"
            and record["gate"]["threshold_c"] == context.plan.max_temperature_c
            and conditions["poll_s"] == context.plan.poll_s
            and conditions["bundle"]["sha256"] == context.deployment.bundle_sha256
            and _identity(conditions["device"]) == _identity(asdict(context.device))
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
