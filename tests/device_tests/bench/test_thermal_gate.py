"""The thermal gate: what is waited for, and what becomes of runs that it holds back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from device_tests.adb.transport import Transport
from device_tests.bench.events import BenchEvent, GateWaiting, RunEnded, RunStarted
from device_tests.bench.plan import BenchPlan
from device_tests.local.fixture import MakeLocalDevice
from tests.support.bench_tools import QUICK, connect


@pytest.fixture
def warm(
    make_local_device: MakeLocalDevice,
    thermometer: Path,
) -> Iterator[Transport]:
    device = make_local_device(binds={thermometer.parents[1]: "/sys/class/thermal"})
    with connect(device) as transport:
        yield transport


def test_the_gate_waits_for_the_temperature_and_not_for_a_time(
    run_bench: Callable, warm: Transport, thermometer: Path
) -> None:
    told: list[BenchEvent] = []

    def listen(event: BenchEvent) -> None:
        told.append(event)
        waits = [one for one in told if isinstance(one, GateWaiting)]
        if len(waits) == 2:
            thermometer.write_text("45000\n")  # not under the threshold
        if len(waits) == 4:
            thermometer.write_text("44900\n")

    plan = BenchPlan(passes={"speed": 1}, **QUICK)
    outcome = run_bench(plan, transport=warm, on_event=listen)
    waits = [event for event in told if isinstance(event, GateWaiting)]
    assert [wait.temperature_c for wait in waits] == [61.5, 61.5, 45.0, 45.0]
    assert waits[0].sensor == "cpu-thermal" and waits[0].threshold_c == 45
    assert [type(event) for event in told].index(RunStarted) == len(waits) + 1
    record = outcome.records[0]
    assert record["status"] == "ok"
    assert record["gate"] | {"waited_s": 0} == {
        "threshold_c": 45.0, "sensor": "cpu-thermal", "begin_c": 44.9, "waited_s": 0,
        "timed_out": False,
    }  # fmt: skip
    assert record["gate"]["waited_s"] > 0
    assert {s["temperature_c"]["cpu-thermal"] for s in record["sensors"]} == {44.9}


def test_a_device_that_stays_warm_is_recorded_and_given_up_after_two_runs(
    run_bench: Callable, warm: Transport
) -> None:
    plan = BenchPlan(passes={"speed": 5}, gate_timeout_s=0.2, **QUICK)
    outcome = run_bench(plan, transport=warm)
    assert [r["failure"]["reason"] for r in outcome.records] == ["thermal_timeout"] * 2
    assert "61.5" in outcome.records[0]["failure"]["sentence"]
    assert outcome.records[0]["gate"]["timed_out"] is True
    assert outcome.records[0]["sensors"][0]["temperature_c"] == {"cpu-thermal": 61.5}
    assert "3 of 5 runs were not made" in outcome.ended_early


def test_one_time_out_does_not_end_the_bench(
    run_bench: Callable, warm: Transport, thermometer: Path
) -> None:
    def cool(event: BenchEvent) -> None:
        if isinstance(event, RunEnded):
            thermometer.write_text("30000\n" if event.number == 1 else "70000\n")

    plan = BenchPlan(passes={"speed": 3}, gate_timeout_s=0.1, **QUICK)
    outcome = run_bench(plan, transport=warm, on_event=cool)
    assert [r["status"] for r in outcome.records] == ["failed", "ok", "failed"]


def test_a_device_without_a_thermometer_is_recorded_as_such(
    run_bench: Callable,
    make_local_device: MakeLocalDevice,
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    device = make_local_device(binds={tmp_path / "empty": "/sys/class/thermal"})
    with connect(device) as transport:
        plan = BenchPlan(passes={"speed": 1}, max_temperature_c=0, **QUICK)
        outcome = run_bench(plan, transport=transport)
    gate = outcome.records[0]["gate"]
    assert (gate["sensor"], gate["begin_c"], gate["timed_out"]) == (None, None, False)
    assert outcome.records[0]["status"] == "ok"
