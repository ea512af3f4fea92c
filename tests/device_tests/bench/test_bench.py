"""The measurement protocol on the real adbd: what is run, recorded and resumed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from device_tests.adb.server import ServerAddress, open_server
from device_tests.adb.transport import Transport
from device_tests.bench.deploy import deploy
from device_tests.bench.device_lock import DeviceLock, holder
from device_tests.bench.events import BenchEvent, BenchStarted, RunEnded, RunProgress, RunStarted
from device_tests.bench.measurement import bench
from device_tests.bench.plan import BenchPlan
from device_tests.bench.run_folder import RUNS_FOLDER
from device_tests.bench.runner import LinuxRunner
from device_tests.errors import DeviceBusy
from device_tests.local.device import LocalDevice
from device_tests.local.fixture import MakeLocalDevice
from device_tests.results import records
from device_tests.results.metrics import METRICS
from export.contract.bundle import Bundle, open_bundle
from quantize.errors import OutputError
from tests.support import small_systems
from tests.support.bench_tools import (
    DEPLOYMENT,
    QUICK,
    Scripted,
    ScriptRunner,
    connect,
    processes_of,
    wait_for,
)

# Runs and records.


def test_every_run_of_the_plan_is_made_in_order_and_recorded(
    run_bench: Callable, tmp_path: Path, transport: Transport
) -> None:
    told: list[BenchEvent] = []
    plan = BenchPlan(passes={"natural": 1, "speed": 2}, threads=(2, None), **QUICK)
    outcome = run_bench(plan, on_event=told.append)
    assert outcome.ended_early is None and outcome.failed == 0
    written = records.read(tmp_path / "results.jsonl")
    assert written == list(outcome.records)
    assert [(r["conditions"]["threads"], r["pass"], r["repeat"]) for r in written] == [
        (2, "speed", 0), (2, "speed", 1), (2, "natural", 0),
        (None, "speed", 0), (None, "speed", 1), (None, "natural", 0),
    ]  # fmt: skip
    first = written[0]
    assert first["conditions"]["bundle"]["name"] == "toy"
    assert first["conditions"]["versions"]["script"] == "1"
    assert first["conditions"]["device"]["kernel"]
    assert [s["phase"] for s in first["sensors"]][:: len(first["sensors"]) - 1] == [
        "before", "after",
    ]  # fmt: skip
    assert {s["phase"] for s in first["sensors"]} == {"before", "during", "after"}
    assert first["sensors"][0]["t_s"] < 0
    assert [e["step"] for e in first["steps"]] == [1]
    assert set(first["metrics"]) == {metric.name for metric in METRICS}
    kinds = [type(event) for event in told]
    assert kinds[0] is BenchStarted and kinds.count(RunStarted) == kinds.count(RunEnded) == 6
    assert RunProgress in kinds
    ends = [event for event in told if isinstance(event, RunEnded)]
    assert [event.number for event in ends] == [1, 2, 3, 4, 5, 6]
    assert ends[-1].eta_s == 0 and ends[0].eta_s > 0
    assert holder(transport) is None
    assert transport.shell(f"ls {RUNS_FOLDER}").text == ""  # what went well leaves nothing


def test_a_failure_is_recorded_and_the_next_run_made(
    run_bench: Callable, transport: Transport
) -> None:
    outcome = run_bench(
        BenchPlan(passes={"speed": 3}, **QUICK), Scripted("kill -KILL $$", only="-1")
    )
    assert [r["status"] for r in outcome.records] == ["ok", "failed", "ok"]
    failed = outcome.records[1]
    assert failed["failure"]["reason"] == "crash_signal"
    assert len(failed["steps"]) == 1  # what it told before
    assert set(failed["metrics"].values()) == {None}
    assert failed["conditions"]["versions"]["script"] == "1"
    # What failed stays on the device for whoever wants to look.
    assert transport.shell(f"ls {RUNS_FOLDER}").text.split() == [failed["run_id"]]


def test_a_runner_that_is_missing_ends_the_bench_with_one_record(run_bench: Callable) -> None:
    outcome = run_bench(BenchPlan(passes={"speed": 3}, **QUICK), ScriptRunner("no-such-program"))
    assert [r["failure"]["reason"] for r in outcome.records] == ["runner_missing"]
    assert "2 of 3 runs were not made" in outcome.ended_early


def test_a_device_that_is_gone_ends_the_bench_and_resume_makes_the_rest(
    make_local_device: MakeLocalDevice,
    run_bench: Callable,
) -> None:
    device = make_local_device()
    plan = BenchPlan(passes={"speed": 3}, **QUICK | {"gone_s": 0.5})

    def pull(event: BenchEvent) -> None:
        if isinstance(event, RunProgress) and event.run.repeat == 1:
            device.stop()

    with connect(device) as transport:
        outcome = run_bench(plan, Scripted("sleep 1"), transport=transport, on_event=pull)
        assert [r["status"] for r in outcome.records] == ["ok", "failed"]
        assert outcome.records[1]["failure"]["reason"] == "device_gone"
        assert outcome.ended_early is not None
        device.start()
        # The lock is still there; whoever held it is this very process, which lives. It gives it up
        # by itself only when it can reach the device.
        transport.reconnect(10)
        transport.shell("rm -rf /data/local/tmp/pocketdiff/lock")
        again = run_bench(plan, transport=transport, resume=True)
    assert again.skipped == 1
    assert [r["repeat"] for r in again.records] == [1, 2] and again.failed == 0


def test_a_device_that_restarts_costs_one_run(
    make_local_device: MakeLocalDevice,
    run_bench: Callable,
) -> None:
    device = make_local_device()

    def restart(event: BenchEvent) -> None:
        is_first = isinstance(event, RunProgress) and event.run.repeat == 0
        if is_first and event.event["event"] == "started":
            device.restart()

    with connect(device) as transport:
        outcome = run_bench(
            BenchPlan(passes={"speed": 2}, **QUICK | {"gone_s": 20.0}),
            Scripted("sleep 1"),
            transport=transport,
            on_event=restart,
        )
        assert holder(transport) is None
    first, second = outcome.records
    assert first["failure"]["reason"] == "device_restarted" and second["status"] == "ok"


def test_a_results_file_that_cannot_be_is_refused_before_the_first_run(
    transport: Transport, scripted_bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        plan = BenchPlan(passes={"speed": 1}, **QUICK)
        bench(
            transport,
            scripted_bundle,
            DEPLOYMENT,
            Scripted(),
            plan,
            tmp_path / "no" / "results.jsonl",
        )


# Resume and interruption.


def test_resume_makes_what_is_missing_or_failed_and_nothing_else(run_bench: Callable) -> None:
    plan = BenchPlan(passes={"speed": 3}, **QUICK)
    run_bench(plan, Scripted("exit 1", only="-1"))
    again = run_bench(plan, resume=True)
    assert again.skipped == 2 and [r["repeat"] for r in again.records] == [1]
    assert run_bench(plan, resume=True).records == ()
    for change in (
        {"seed": 1},
        {"force_steps": 3},
        {"threads": (1,)},
        {"max_temperature_c": 30.0},
        {"poll_s": 0.25},
    ):
        other = BenchPlan(**{"passes": {"speed": 3}} | QUICK | change)
        assert len(run_bench(other, resume=True).records) == 3
    assert len(run_bench(plan).records) == 3  # without resume all are made


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_kills_the_run_and_gives_the_device_back(
    run_bench: Callable,
    local_device: LocalDevice,
    transport: Transport,
    tmp_path: Path,
    error: type[BaseException],
) -> None:
    def interrupt(event: BenchEvent) -> None:
        if isinstance(event, RunProgress) and event.run.repeat == 1:
            assert processes_of(local_device, "sleep 604")
            raise error

    plan = BenchPlan(passes={"speed": 3}, **QUICK)
    with pytest.raises(error):
        run_bench(plan, Scripted("sleep 604", only="-1"), on_event=interrupt)
    wait_for(lambda: not processes_of(local_device, "sleep 604"))
    assert holder(transport) is None
    [left] = records.read(tmp_path / "results.jsonl")
    assert (left["repeat"], left["status"]) == (0, "ok")


def test_a_bench_that_was_killed_is_resumed(
    run_bench: Callable,
    local_device: LocalDevice,
    transport: Transport,
    tmp_path: Path,
) -> None:
    results = tmp_path / "results.jsonl"
    code = (
        "from device_tests.bench.measurement import bench\n"
        "from tests.support.bench_tools import *\n"
        "from device_tests.bench.plan import BenchPlan\n"
        "from export.contract.bundle import open_bundle\n"
        f"device = type('Device', (), {{'port': {local_device.port}}})\n"
        f"bench(connect(device), open_bundle({str(tmp_path / 'bundle')!r}), DEPLOYMENT, "
        "Scripted('sleep 605', only='-1'), BenchPlan(passes={'speed': 3}, **QUICK), "
        f"{str(results)!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_for(lambda: processes_of(local_device, "sleep 605"), 60)
    finally:
        process.kill()
        process.wait()
    with results.open("ab") as file:
        file.write(b'{"schema_version": 1, "rec')  # and in the middle of a line
    told: list[BenchEvent] = []
    outcome = run_bench(BenchPlan(passes={"speed": 3}, **QUICK), resume=True, on_event=told.append)
    assert outcome.skipped == 1 and outcome.failed == 0
    assert [r["repeat"] for r in records.read(results)] == [0, 1, 2]
    assert "left behind" in told[0].note
    assert not processes_of(local_device, "sleep 605")


def test_a_second_bench_is_refused_with_the_name_of_the_first(
    run_bench: Callable, transport: Transport, tmp_path: Path
) -> None:
    refused: list[str] = []

    def second(event: BenchEvent) -> None:
        if isinstance(event, RunProgress) and not refused:
            with pytest.raises(DeviceBusy) as caught:
                run_bench(BenchPlan(passes={"speed": 1}, **QUICK))
            refused.append(str(caught.value))

    plan = BenchPlan(passes={"speed": 1}, **QUICK)
    outcome = run_bench(plan, Scripted("sleep 0.3"), on_event=second)
    assert outcome.bench_id in refused[0]
    assert len(records.read(tmp_path / "results.jsonl")) == 1


def test_a_bench_that_lost_its_lock_ends(run_bench: Callable, transport: Transport) -> None:
    def steal(event: BenchEvent) -> None:
        if isinstance(event, RunEnded) and event.number == 1:
            transport.shell("rm -rf /data/local/tmp/pocketdiff/lock")
            DeviceLock(transport, "thief").acquire()

    with pytest.raises(DeviceBusy, match=r"taken away.*thief"):
        run_bench(BenchPlan(passes={"speed": 2}, **QUICK), on_event=steal)
    assert holder(transport).bench_id == "thief"
    transport.shell("rm -rf /data/local/tmp/pocketdiff/lock")


# Other ways to a device, and other systems on it.


def test_a_bench_through_an_adb_server(
    run_bench: Callable,
    make_local_device: MakeLocalDevice,
    private_server: ServerAddress,
) -> None:
    device = make_local_device()
    transport = open_server(device.serial)

    def restart(event: BenchEvent) -> None:
        is_second = isinstance(event, RunProgress) and event.run.repeat == 1
        if is_second and event.event["event"] == "started":
            device.restart()

    plan = BenchPlan(passes={"speed": 3}, **QUICK | {"gone_s": 30.0})
    outcome = run_bench(plan, Scripted("sleep 0.5"), transport=transport, on_event=restart)
    assert [r["conditions"]["transport"] for r in outcome.records] == ["server"] * 3
    assert [r["failure"] and r["failure"]["reason"] for r in outcome.records] == [
        None, "device_restarted", None,
    ]  # fmt: skip
    assert holder(transport) is None


TOOLS = (
    "cat", "date", "grep", "head", "ls", "mkdir", "mv", "rm", "setsid", "sleep", "stat", "tail",
    "touch", "uname",
)  # fmt: skip


@pytest.fixture(params=["toybox with mksh", "busybox"])
def small_system(request: pytest.FixtureRequest, tmp_path: Path) -> dict[Path, str]:
    """The shell and the tools of Android, or of busybox, in the places of this machine's."""
    packages = ("toybox", "mksh") if "mksh" in request.param else ("busybox",)
    small_systems.small_system(request.param, packages, tmp_path)
    programs = {tool: tmp_path / "bin" / packages[0] for tool in TOOLS}
    # The first name that its file is called by tells busybox what to be.
    programs["sh"] = tmp_path / "bin" / packages[-1]
    (tmp_path / "tools").mkdir()
    binds = {}
    for name, program in programs.items():
        os.link(program, tmp_path / "tools" / name)
        binds[tmp_path / "tools" / name] = str(Path(shutil.which(name)).resolve())
    return binds


def test_small_systems_measure_as_well(
    run_bench: Callable,
    make_local_device: MakeLocalDevice,
    small_system: dict[Path, str],
    thermometer: Path,
) -> None:
    thermometer.write_text("40000\n")
    device = make_local_device(binds=small_system | {thermometer.parents[1]: "/sys/class/thermal"})
    with connect(device) as transport:
        plan = BenchPlan(passes={"speed": 3}, **QUICK | {"hang_s": 0.5})
        outcome = run_bench(plan, SmallRunner(), transport=transport)
        assert [r["failure"] and r["failure"]["reason"] for r in outcome.records] == [
            "crash_signal", "hang", None,
        ]  # fmt: skip
        assert {r["gate"]["begin_c"] for r in outcome.records} == {40.0}
        wait_for(lambda: not processes_of(device, "sleep 606"))
        lock = DeviceLock(transport, "left")
        lock.acquire()
        with pytest.raises(DeviceBusy, match="left"):
            run_bench(plan, transport=transport)
        lock.beat()
        transport.shell("touch -d @5 /data/local/tmp/pocketdiff/lock/beat")
        lock.release()
        assert holder(transport) is None


class SmallRunner:
    """Killed, hung, well: by the number of the repeat."""

    def command(self, request: str) -> str:
        run_id = request.split("/")[-2]
        return Scripted(["kill -KILL $$", "sleep 606", ""][int(run_id[-1])]).command(request)


# The real runner.


def test_the_toy_model_is_measured(transport: Transport, toy_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(toy_bundle)
    plan = BenchPlan(
        passes={"cold": 1, "speed": 1, "natural": 1, "memory": 1}, threads=(1,), force_steps=4,
        prompt_text="abc", poll_s=0.2, prompt_tokens=6,
    )  # fmt: skip
    results = tmp_path / "results.jsonl"
    outcome = bench(transport, bundle, deploy(transport, bundle), LinuxRunner(), plan, results)
    cold, speed, natural, memory = records.read(results)
    assert outcome.failed == 0
    assert cold["result"]["cold"]["requested"] and not speed["result"]["cold"]["requested"]
    assert [len(r["steps"]) for r in (cold, speed, memory)] == [4, 4, 4]
    of_speed, of_natural = speed["result"]["answers"][0], natural["result"]["answers"][0]
    assert of_speed["prompt_tokens"] == 6 and of_natural["prompt_tokens"] != 6
    assert isinstance(of_natural["text"], str)
    assert memory["memory"] and not speed["memory"]
    assert speed["metrics"]["step_ms"] > 0
    assert memory["metrics"]["peak_pss_bytes"] > 0
    # The same seed and steps give the same tokens, whatever is measured beside.
    tokens = [
        [canvas["tokens"] for canvas in record["result"]["answers"][0]["canvases"]]
        for record in (cold, speed, memory)
    ]
    assert tokens[0] == tokens[1] == tokens[2]
