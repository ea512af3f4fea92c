"""The lock of a device, on the real adbd: one benchmark at a time, and what dead ones leave."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_tests.adb.transport import Transport
from device_tests.bench import device_lock
from device_tests.bench.device_lock import LOCK_FOLDER, DeviceLock, Process, holder, parse_holder
from device_tests.bench.remote_run import start
from device_tests.errors import DeviceBusy
from device_tests.local.device import LocalDevice
from tests.support.bench_tools import ScriptRunner, connect, processes_of, request, wait_for

ANOTHER_HOST = Process("another machine", 1, "1")


@pytest.fixture
def transport(local_device: LocalDevice) -> Iterator[Transport]:
    with connect(local_device) as transport:
        transport.shell(f"rm -rf {LOCK_FOLDER}")
        yield transport
        transport.shell(f"rm -rf {LOCK_FOLDER}")


@pytest.fixture
def from_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks are taken as if by a process that cannot be looked at from here."""
    monkeypatch.setattr(Process, "this", classmethod(lambda cls: ANOTHER_HOST))


def age(transport: Transport, minutes: int) -> None:
    """Make the last heartbeat older."""
    command = f"touch -d @$(( $(date +%s) - 60 * {minutes} )) {LOCK_FOLDER}/beat"
    assert transport.shell(command).exit_code == 0


def test_a_second_benchmark_is_refused_with_the_name_of_the_first(
    transport: Transport,
) -> None:
    with DeviceLock(transport, "first"):
        who = holder(transport)
        assert who is not None and who.bench_id == "first"
        with pytest.raises(
            DeviceBusy, match=re.escape(f"first of {who.host}, begun {who.started_at}")
        ):
            DeviceLock(transport, "second").acquire()
        assert holder(transport).bench_id == "first"
    assert holder(transport) is None
    with DeviceLock(transport, "second"):
        assert holder(transport).bench_id == "second"


def test_a_repeated_attempt_of_the_same_benchmark_is_no_second(transport: Transport) -> None:
    lock = DeviceLock(transport, "first")
    lock.acquire()
    lock.acquire()  # as after a broken connection
    lock.beat()
    lock.release()
    assert holder(transport) is None


def test_a_silent_lock_is_taken_over_and_the_old_owner_learns_it(
    transport: Transport, from_another_host: None
) -> None:
    first = DeviceLock(transport, "first")
    first.acquire()
    age(transport, 9)
    with pytest.raises(DeviceBusy, match="first"):
        DeviceLock(transport, "second").acquire()
    age(transport, 11)
    assert holder(transport) is None
    with DeviceLock(transport, "second") as second:
        assert second.note is not None and "first" in second.note
        with pytest.raises(DeviceBusy, match=r"taken away.*second"):
            first.beat()
        first.release()  # and does not give away what is not its own
        second.beat()


def test_a_sign_of_life_keeps_the_lock(transport: Transport, from_another_host: None) -> None:
    first = DeviceLock(transport, "first")
    first.acquire()
    for beat in (first.beat, lambda: transport.shell(first.beat_command)):
        age(transport, 11)
        beat()
        with pytest.raises(DeviceBusy):
            DeviceLock(transport, "second").acquire()


def test_a_silent_lock_with_a_run_on_the_device_is_kept(
    transport: Transport, from_another_host: None
) -> None:
    DeviceLock(transport, "first").acquire()
    run = start(transport, ScriptRunner("sleep 600"), request("lock-run"))
    try:
        wait_for(lambda: transport.stat(f"{run.folder}/pid"))
        age(transport, 60)
        assert holder(transport).runs == ("lock-run",)
        with pytest.raises(DeviceBusy, match="first"):
            DeviceLock(transport, "second").acquire()
    finally:
        run.kill()
    wait_for(lambda: holder(transport) is None)


def test_the_lock_of_a_process_that_died_here_is_taken_over_at_once(
    transport: Transport,
    local_device: LocalDevice,
) -> None:
    code = (
        "import sys; from tests.support.bench_tools import *\n"
        "from device_tests.bench.remote_run import start\n"
        "from device_tests.bench.device_lock import DeviceLock\n"
        "from device_tests.adb.direct import *\n"
        f"t = open_tcp('127.0.0.1', {local_device.port}); DeviceLock(t, 'dead').acquire()\n"
        "start(t, ScriptRunner(started('left') + 'sleep 601'), request('left'))\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    wait_for(lambda: processes_of(local_device, "sleep 601"))
    with DeviceLock(transport, "next") as lock:
        assert "dead" in lock.note
        wait_for(lambda: not processes_of(local_device, "sleep 601"))


def test_a_lock_without_a_readable_owner_is_respected_and_goes_stale(
    transport: Transport,
) -> None:
    for content in ("", "{broken", '{"bench_id": 5}'):
        transport.shell(f"mkdir -p {LOCK_FOLDER}")
        transport.shell(f"printf %s '{content}' >{LOCK_FOLDER}/owner.json; : >{LOCK_FOLDER}/beat")
        with pytest.raises(DeviceBusy, match="unknown"):
            DeviceLock(transport, "next").acquire()
        age(transport, 11)
        with DeviceLock(transport, "next"):
            assert holder(transport).bench_id == "next"


def test_only_one_of_two_that_saw_a_stale_lock_gets_it(
    transport: Transport, from_another_host: None
) -> None:
    DeviceLock(transport, "dead").acquire()
    age(transport, 11)
    slow, quick = DeviceLock(transport, "slow"), DeviceLock(transport, "quick")
    seen = slow._look()
    quick.acquire()
    slow._take_over(seen)
    assert holder(transport).bench_id == "quick"
    quick.beat()


def test_a_process_is_dead_only_if_that_can_be_known() -> None:
    this = Process.this()
    assert not this.is_dead
    assert replace(this, started="1").is_dead  # its number was given to another
    assert replace(this, pid=2**22 - 1).is_dead
    assert not replace(this, machine="another", pid=2**22 - 1).is_dead
    assert not Process().is_dead


@given(st.text() | st.builds("held yes\nnow {}\nbeat {}\nowner {}\nrun {}".format, st.text(),
                             st.text(), st.text(), st.text()))  # fmt: skip
def test_no_answer_breaks_the_parser(answer: str) -> None:
    found = parse_holder(answer)
    assert found is None or (len(str(found)) < 2000 and str(found).isprintable())


def test_an_owner_is_shown_and_not_believed() -> None:
    owner = json.dumps({"bench_id": "x" * 5000, "host": "a\x1b[2Jb", "started_at": None})
    found = parse_holder(f"held yes\nnow 10\nbeat 20\nowner {owner}\nrun ../../etc\nrun ok\n")
    assert found.runs == ("ok",) and found.silent_s == 0
    assert "\x1b" not in str(found) and len(str(found)) < 500
    assert device_lock.STALE_S == 600
