"""The same fault is the same error, class and sentence, by both ways."""

from __future__ import annotations

import io
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from device_tests.adb import shell_stream
from device_tests.adb.link import Authorisation
from device_tests.adb.server import ServerAddress
from device_tests.adb.transport import Transport
from device_tests.errors import (
    AccessDenied,
    CommandFailed,
    CommandTimeout,
    DeviceGone,
    DeviceUnauthorized,
    ProtocolError,
    StorageFull,
)
from quantize.errors import DeviceError
from tests.support.adb_double import AdbDouble
from tests.support.adb_ways import Way, push

MIB = 1024 * 1024


@pytest.fixture
def ways(shared_server: ServerAddress) -> list[Way]:
    return [Way(), Way(shared_server)]


def check_same(
    ways: list[Way], call: Callable[[Way], object], kind: type[DeviceError], sentence: str
) -> None:
    """What the connection's library said, in brackets, may differ."""
    errors = []
    for way in ways:
        with pytest.raises(DeviceError) as caught:
            call(way)
        errors.append(caught.value)
    for error in errors:
        assert type(error) is kind and re.search(sentence, str(error)), repr(error)
    said = [re.sub(r" \((ConnectionReset|ConnectionRefused|the adb server).*\)", "", str(e))
            for e in errors]  # fmt: skip
    assert said[0] == said[1]


@pytest.mark.parametrize(
    "reason, kind, sentence",
    [
        ("No space left on device", StorageFull, "make room there"),
        ("Disk quota exceeded", StorageFull, "make room there"),  # EDQUOT in glibc
        ("Quota exceeded", StorageFull, "make room there"),  # and in bionic
        ("Permission denied", AccessDenied, "may not do that"),
        ("Read-only file system", AccessDenied, "may not do that"),
        ("Input/output error", CommandFailed, "check the path"),
    ],
)
@pytest.mark.parametrize("size", [10, 20 * MIB], ids=["small", "large"])
def test_device_that_cannot_write(
    double: AdbDouble,
    ways: list[Way],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
    kind: type[DeviceError],
    sentence: str,
    size: int,
) -> None:
    """Its `dd` takes a little and says what the C library says."""
    programs = tmp_path / "programs"
    programs.mkdir()
    script = f"head -c 5 >/dev/null; echo \"dd: error writing 'x': {reason}\" >&2; exit 1"
    (programs / "dd").write_text(f"#!/bin/sh\n{script}\n")
    (programs / "dd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (tmp_path / "data").write_bytes(bytes(size))

    def write(way: Way) -> None:
        with way.open(double.port) as transport, (tmp_path / "data").open("rb") as source:
            transport.push(source, "/somewhere/x", size)

    check_same(ways, write, kind, f"{reason}.*{sentence}")


Call = Callable[[Transport, str], object]
CALLS: dict[str, tuple[Call, type[DeviceError], str]] = {
    "no folder": (
        lambda t, folder: push(t, b"data", f"{folder}/none/file"), CommandFailed, "No such file"),
    "full": (lambda t, _: push(t, bytes(5 * MIB), "/dev/full"), StorageFull, "No space left"),
    "nothing to pull": (
        lambda t, folder: t.pull(f"{folder}/none", io.BytesIO()), CommandFailed, "No such file"),
    "a folder to pull": (
        lambda t, folder: t.pull(folder, io.BytesIO()), CommandFailed, "directory"),
    "nothing moves": (
        lambda t, folder: t.pull(f"{folder}/pipe", io.BytesIO()),
        DeviceGone, r"moved nothing for 0\.3 s while pulling"),
    "source ends": (
        lambda t, folder: t.push(io.BytesIO(b"ab"), f"{folder}/file", 5),
        DeviceError, "ended 3 bytes early"),
    "too long": (lambda t, _: t.shell("sleep 60", timeout_s=0.2), CommandTimeout, "sleep 60"),
    "too much": (
        lambda t, _: t.shell("cat /dev/zero"), ProtocolError, "more than 100000 bytes"),
    "no command": (lambda t, _: t.shell("a\0b"), CommandFailed, "null character"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_call_that_fails(
    double: AdbDouble,
    ways: list[Way],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    call, kind, sentence = CALLS[name]
    monkeypatch.setattr(shell_stream, "MAX_OUTPUT_BYTES", 100_000)
    os.mkfifo(tmp_path / "pipe")

    def attempt(way: Way) -> None:
        with way.open(double.port, stall_s=0.3) as transport:
            call(transport, str(tmp_path))

    check_same(ways, attempt, kind, sentence)


def test_connection_that_breaks(double: AdbDouble, ways: list[Way], tmp_path: Path) -> None:
    def attempt(way: Way) -> None:
        with way.open(double.port) as transport:
            double.faults.cut_after = 2 * MIB
            push(transport, bytes(4 * MIB), str(tmp_path / "file"))

    check_same(ways, attempt, DeviceGone, "connection to 127.*is broken.*check the cable")


def test_silent_device(double: AdbDouble, ways: list[Way]) -> None:
    def attempt(way: Way) -> None:
        with way.open(double.port) as transport:
            double.faults.stall_after = 0
            transport.shell("true", timeout_s=0.3)

    check_same(ways, attempt, DeviceGone, r"did not begin a command within 0\.3 s")


def test_device_that_does_not_trust_us(tmp_path: Path, ways: list[Way]) -> None:
    known = Authorisation(tmp_path / "keys", timeout_s=0.3)
    with AdbDouble(tmp_path, "refuse").running() as double:
        for way in ways:
            with (
                pytest.raises(
                    DeviceUnauthorized, match=r'^127\S+ does not trust this machine.*press "Allow"'
                ),
                way.open(double.port, authorisation=known),
            ):
                pass


def test_device_that_is_too_old(tmp_path: Path, ways: list[Way]) -> None:
    def attempt(way: Way) -> None:
        with way.open(double.port):
            pass

    with AdbDouble(tmp_path, features="cmd").running() as double:
        check_same(ways, attempt, DeviceError, "Android 7")


def test_nobody_there(ways: list[Way]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    def attempt(way: Way) -> None:
        with way.open(port):
            pass

    check_same(ways, attempt, DeviceGone, f"127.0.0.1:{port}")
