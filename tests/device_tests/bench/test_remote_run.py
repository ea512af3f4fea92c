"""A run on the real adbd, followed through every fault to an end that has a name.

Scripted runners (pieces of shell) where the runner's part does not matter, the real one where the
kernel and the runtime do.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from device_tests.adb.direct import open_tcp
from device_tests.adb.transport import Transport
from device_tests.bench import remote_run, run_folder
from device_tests.bench.deploy import Deployment, deploy
from device_tests.bench.remote_run import Interrupted, RunOutcome, Sample, start
from device_tests.bench.run_folder import RUNS_FOLDER
from device_tests.bench.runner import LinuxRunner, choose_runner
from device_tests.errors import DeviceError, StorageFull
from device_tests.local.adbd import LocalDeviceUnavailable
from device_tests.local.device import LocalDevice
from device_tests.local.fixture import MakeLocalDevice
from export.contract.bundle import open_bundle
from export.contract.runner_protocol import RunRequest
from tests.support.bench_tools import (
    ScriptRunner,
    connect,
    processes_of,
    request,
    result,
    started,
    step,
    tell,
    wait_for,
)

POLL_S = 0.05


@pytest.fixture
def transport(local_device: LocalDevice) -> Iterator[Transport]:
    with connect(local_device) as transport:
        yield transport
        transport.shell(f"rm -rf {RUNS_FOLDER}")


def run_script(transport: Transport, run_id: str, script: str, **options: float) -> RunOutcome:
    run = start(transport, ScriptRunner(script), request(run_id))
    return run.follow(poll_s=POLL_S, **options)


def names(outcome: RunOutcome) -> list[str]:
    return [event["event"] for event in outcome.events]


# The run that goes well.


def test_a_run_is_followed_to_its_result(transport: Transport) -> None:
    told: list[object] = []
    script = started("good") + tell(step(1)) + f"sleep 0.3; {tell(step(2))}" + result("good")
    run = start(transport, ScriptRunner(script), request("good"))
    outcome = run.follow(told.append, poll_s=POLL_S)
    assert outcome.failure is None and outcome.result["run_id"] == "good"
    assert [e.get("step") for e in outcome.events] == [None, 1, 2]
    assert [e for e in told if isinstance(e, dict)] == list(outcome.events)
    samples = [e for e in told if isinstance(e, Sample)]
    assert len(samples) == len(outcome.samples) >= 3
    assert samples[0].t_s < samples[-1].t_s
    run.remove()
    assert transport.stat(run.folder) is None


def test_the_run_needs_no_open_connection(local_device: LocalDevice) -> None:
    with connect(local_device) as first:
        run = start(first, ScriptRunner(f"sleep 0.2; {result('alone')}"), request("alone"))
    with connect(local_device) as second:
        wait_for(lambda: second.stat(f"{run.folder}/exit"))
        run.transport = second
        assert run.follow(poll_s=POLL_S).failure is None


def test_a_run_is_started_once_even_if_it_is_asked_for_twice(transport: Transport) -> None:
    script = f"echo x >>count; {result('once')}"
    run = start(transport, ScriptRunner(script), request("once"))
    again = start(transport, ScriptRunner(script), request("once"))
    assert again.follow(poll_s=POLL_S).failure is None
    assert transport.shell(f"cat {run.folder}/count").text == "x\n"


def test_more_events_than_fit_in_an_answer_all_arrive(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "MAXIMUM_POLL_BYTES", 1000)
    script = "".join(tell(step(number)) for number in range(1, 41)) + result("many")
    outcome = run_script(transport, "many", script)
    assert outcome.failure is None
    assert [event["step"] for event in outcome.events] == list(range(1, 41))


def test_an_event_that_is_written_in_two_pieces_is_read_once(transport: Transport) -> None:
    line = json.dumps(step(1))
    script = (
        f"printf %s '{line[:30]}' >>events.jsonl; sleep 0.3; printf '%s\\n' '{line[30:]}'"
        f" >>events.jsonl; {result('pieces')}"
    )
    assert run_script(transport, "pieces", script).events == (step(1),)


# Runs that fail by themselves.


@pytest.mark.parametrize(
    ("script", "reason", "said"),
    [
        ("kill -SEGV $$", "crash_signal", "SIGSEGV"),
        ("kill -KILL $$", "crash_signal", "SIGKILL, most likely"),
        ("echo last words; exit 1", "internal", "ended with 1 (last words)"),
        ("exit 0", "internal", "left no result"),
        ("no-such-program", "runner_missing", "not found"),
        ("echo 'ModuleNotFoundError: No module named export'; exit 1", "runner_missing", "export"),
        ("echo MemoryError; exit 1", "out_of_memory", "MemoryError"),
        ("echo 'terminate: std::bad_alloc'; kill -ABRT $$", "out_of_memory", "bad_alloc"),
        ("echo 'No space left on device'; exit 1", "storage_full", "no room"),
        ("echo '{' >>events.jsonl; sleep 600", "internal", "broke its protocol"),
        ("echo '{' >result.json", "internal", "broke its protocol"),
        (result("another"), "internal", "another run"),
    ],
)
def test_an_end_of_its_own_is_named(
    transport: Transport,
    local_device: LocalDevice,
    script: str,
    reason: str,
    said: str,
) -> None:
    run_id = f"end-{time.monotonic_ns()}"
    outcome = run_script(transport, run_id, script)
    assert outcome.failure.reason == reason
    assert said in outcome.failure.sentence
    wait_for(lambda: not processes_of(local_device, run_id))


def test_a_runner_that_vanishes_with_its_shell_is_noticed(transport: Transport) -> None:
    run = start(transport, ScriptRunner(started("gone") + "sleep 602"), request("gone"))
    wait_for(lambda: transport.stat(f"{run.folder}/events.jsonl"))
    transport.shell(f"read -r p rest <{run.folder}/pid; kill -9 -$p")
    outcome = run.follow(poll_s=POLL_S)
    assert outcome.failure.reason == "crash_signal"
    assert "vanished" in outcome.failure.sentence


def test_a_run_that_tells_without_end_is_ended(
    transport: Transport,
    local_device: LocalDevice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_run, "MAXIMUM_EVENTS_BYTES", 20_000)
    outcome = run_script(transport, "endless", f"while :; do {tell(step(1))} done")
    assert outcome.failure.reason == "internal" and "more than" in outcome.failure.sentence
    wait_for(lambda: not processes_of(local_device, "endless"))


def test_a_hang_is_named_and_every_process_of_it_killed(
    transport: Transport,
    local_device: LocalDevice,
) -> None:
    memory = {"event": "memory", "t_ms": 5} | dict.fromkeys(
        ("rss_bytes", "pss_bytes", "anonymous_bytes", "file_bytes", "swap_bytes", "major_faults",
         "minor_faults"), 1)  # fmt: skip
    # A timer that goes on telling does not show that the run goes on.
    script = f"{started('hung')}sleep 603 & while :; do {tell(memory)} sleep 0.05; done"
    outcome = run_script(transport, "hung", script, hang_s=0.5)
    assert outcome.failure.reason == "hang"
    assert "after its event 'started'" in outcome.failure.sentence
    assert "memory" in names(outcome)
    wait_for(lambda: not processes_of(local_device, "sleep 603"))
    wait_for(lambda: not processes_of(local_device, "hung"))


class Struck(Exception):
    """Raised in the middle of following: a run can be followed again."""


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGKILL, "crash_signal"), (signal.SIGSTOP, "hang")]
)
def test_a_runner_that_is_killed_or_stopped_is_named(
    transport: Transport,
    local_device: LocalDevice,
    number: signal.Signals,
    reason: str,
) -> None:
    run_id = f"signal-{reason}"
    script = f"{started(run_id)}while :; do {tell(step(1))} sleep 0.05; done"
    run = start(transport, ScriptRunner(script), request(run_id))

    def strike(event: object) -> None:
        if isinstance(event, dict) and event["event"] == "step":
            # Not its shell, which is to tell how it ended.
            [pid] = processes_of(local_device, run.folder, program="sh -c cd ")
            os.kill(pid, number)
            raise Struck

    with pytest.raises(Struck):
        run.follow(strike, poll_s=POLL_S)
    outcome = run.follow(poll_s=POLL_S, hang_s=0.5)
    assert outcome.failure.reason == reason
    if reason == "crash_signal":
        assert outcome.failure.evidence["signal"] == "SIGKILL"
        assert outcome.failure.evidence["exit_code"] == 137
    wait_for(lambda: not processes_of(local_device, run_id))


# Faults of the connection and of the device.


@contextmanager
def cable(device: LocalDevice) -> Iterator[tuple[int, threading.Event]]:
    """A port that leads to the device as long as the event is set: then it cuts and refuses."""
    plugged = threading.Event()
    plugged.set()
    ends: list[socket.socket] = []
    server = socket.create_server(("127.0.0.1", 0))

    def carry(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while plugged.is_set() and (data := source.recv(1 << 16)):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = server.accept()
                if not plugged.is_set():
                    client.close()
                    continue
                far = socket.create_connection(("127.0.0.1", device.port))
                ends.extend((client, far))
                for pair in ((client, far), (far, client)):
                    threading.Thread(target=carry, args=pair, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()

    def unplug() -> None:
        plugged.clear()
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    plugged.unplug = unplug  # type: ignore[attr-defined]
    try:
        yield server.getsockname()[1], plugged
    finally:
        unplug()
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        for end in ends:
            end.close()


def test_a_cable_that_is_pulled_and_put_back_loses_nothing(
    local_device: LocalDevice,
) -> None:
    told: list[object] = []
    numbers = "i=0; while [ $i -lt 40 ]; do i=$((i+1)); "
    line = json.dumps(step(999)).replace("999", "'$i'")
    script = f"{numbers} echo '{line}' >>events.jsonl; sleep 0.02; done; {result('cut')}"
    with cable(local_device) as (port, plugged), open_tcp("127.0.0.1", port) as transport:
        run = start(transport, ScriptRunner(script), request("cut"), gone_s=20)

        def listen(event: object) -> None:
            told.append(event)
            if isinstance(event, dict) and event["step"] == 5:
                plugged.unplug()
                threading.Timer(0.4, plugged.set).start()

        outcome = run.follow(listen, poll_s=POLL_S)
    assert outcome.failure is None
    assert outcome.interruptions >= 1
    assert any(isinstance(event, Interrupted) for event in told)
    assert [event["step"] for event in outcome.events] == list(range(1, 41))


def test_a_device_that_does_not_come_back_is_named(local_device: LocalDevice) -> None:
    with cable(local_device) as (port, plugged), open_tcp("127.0.0.1", port) as transport:
        run = start(
            transport, ScriptRunner(started("lost") + "sleep 1"), request("lost"), gone_s=0.5
        )
        outcome = run.follow(
            lambda event: plugged.unplug() if isinstance(event, dict) else None, poll_s=POLL_S
        )
    assert outcome.failure.reason == "device_gone"
    assert names(outcome) == ["started"]


def test_a_device_that_restarts_is_named(make_local_device: MakeLocalDevice) -> None:
    device = make_local_device()
    with connect(device) as transport:
        script = started("restart") + "sleep 600"
        run = start(transport, ScriptRunner(script), request("restart"))
        outcome = run.follow(
            lambda event: device.restart() if isinstance(event, dict) else None, poll_s=POLL_S
        )
    assert outcome.failure.reason == "device_restarted"
    evidence = outcome.failure.evidence
    assert evidence["boot_id_before"] != evidence["boot_id_after"]


def test_a_full_disk_is_named(make_local_device: MakeLocalDevice) -> None:
    device = make_local_device(data_bytes=1 << 20)
    with connect(device) as transport:
        # Everything but a runner that notices: it ends badly and can say nothing any more.
        script = f"{started('full')} cat /dev/zero >big; echo words; exit 1"
        outcome = run_script(transport, "full", script)
        assert outcome.failure.reason == "storage_full"
        assert outcome.failure.evidence["exit_code"] == 1
        # And one that cannot even begin.
        with pytest.raises(StorageFull, match="No space"):
            start(transport, ScriptRunner(":"), request("second"))


# The real runner.


@pytest.fixture
def deployed(local_device: LocalDevice, toy_bundle: Path) -> Deployment:
    with connect(local_device) as transport:
        return deploy(transport, open_bundle(toy_bundle, verify=False))


def real_request(run_id: str, deployed: Deployment, **changes: object) -> RunRequest:
    fields = {"bundle": deployed.remote_folder, "bundle_sha256": deployed.bundle_sha256}
    return request(run_id, **fields | {"threads": 1, "warmup_steps": 0} | changes)


LONG = {"force_steps": 10**6}
"""Minutes of the toy model; whoever asks for it ends it."""


def test_a_budget_that_is_too_small_is_named(transport: Transport, deployed: Deployment) -> None:
    limited = real_request("budget", deployed, memory_limit_bytes=200 << 20)
    outcome = start(transport, LinuxRunner(), limited).follow(poll_s=POLL_S)
    assert outcome.failure.reason == "out_of_memory"


def test_a_kill_by_the_kernel_for_want_of_memory_is_named(
    make_local_device: MakeLocalDevice,
) -> None:
    try:
        device = make_local_device(memory_bytes=64 << 20)
    except LocalDeviceUnavailable as error:
        pytest.skip(str(error))
    with connect(device) as transport:
        eater = "python3 -c 'x = [bytearray(1 << 20) for _ in range(1000)]'"
        outcome = run_script(transport, "eater", f"{started('eater')} exec {eater}")
    assert outcome.failure.reason == "out_of_memory"
    assert outcome.failure.evidence["oom_kills"] >= 1
    assert outcome.failure.evidence["exit_code"] in (137, None)
    assert "the kernel killed" in outcome.failure.sentence


def test_a_bundle_that_changed_on_the_device_is_refused(
    transport: Transport, deployed: Deployment
) -> None:
    file = f"{deployed.remote_folder}/head.pte"
    assert transport.shell(f"chmod u+w {file}; echo x >>{file}").exit_code == 0
    try:
        run = start(transport, LinuxRunner(), real_request("refused", deployed))
        outcome = run.follow(poll_s=POLL_S)
    finally:
        transport.shell(f"rm -rf {deployed.remote_folder}")
    assert outcome.failure.reason == "bundle_refused"
    assert "head.pte" in outcome.failure.sentence
    assert outcome.result["status"] == "failed"


def test_a_disk_that_fills_up_under_the_runner_is_named(
    make_local_device: MakeLocalDevice,
    toy_bundle: Path,
) -> None:
    device = make_local_device(data_bytes=32 << 20)
    with connect(device) as transport, connect(device) as another:
        deployed = deploy(transport, open_bundle(toy_bundle, verify=False))
        run = start(transport, LinuxRunner(), real_request("fills", deployed, **LONG))

        def fill(event: object) -> None:
            if isinstance(event, dict) and event["event"] == "loaded":
                another.shell("cat /dev/zero >/data/filler")

        outcome = run.follow(fill, poll_s=POLL_S)
    assert outcome.failure.reason == "storage_full"
    assert "step" in names(outcome)


def test_a_python_that_is_not_there_is_named(transport: Transport) -> None:
    run = start(transport, LinuxRunner(python="/no/python"), request("no-python"))
    assert run.follow(poll_s=POLL_S).failure.reason == "runner_missing"


def test_android_has_no_runner_yet() -> None:
    assert isinstance(choose_runner(None), LinuxRunner)
    with pytest.raises(DeviceError, match="not there yet"):
        choose_runner(34)
