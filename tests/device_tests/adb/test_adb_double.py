"""The double of an adb device against software that we did not write: the real adb client."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import adbutils
import pytest

from tests.support.adb_double import AdbDouble

Adb = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture(scope="module")
def adb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adb]:
    """The adb client with a server, a home and keys of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {
        "HOME": str(home),
        "ANDROID_ADB_SERVER_PORT": str(port),
        "ADB_MDNS_AUTO_CONNECT": "0",
    }

    def run(*arguments: str, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [adbutils.adb_path(), *arguments],
            env=environment,
            input=input,
            capture_output=True,
            timeout=60,
        )

    run("start-server")
    yield run
    run("kill-server")


@pytest.fixture
def double(tmp_path: Path) -> Iterator[AdbDouble]:
    with AdbDouble(tmp_path).running() as device:
        yield device


@pytest.fixture
def connected(adb: Adb, double: AdbDouble) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    serial = f"127.0.0.1:{double.port}"
    assert b"connected to" in adb("connect", serial).stdout
    yield lambda *arguments, **options: adb("-s", serial, *arguments, **options)
    adb("disconnect", serial)


def test_adb_sees_exit_code_and_both_outputs(connected: Adb) -> None:
    ended = connected("shell", "printf 'a\\0\\r\\nb'; echo e >&2; exit 7")
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, b"a\0\r\nb", b"e\n")


def test_adb_sees_a_killed_command(connected: Adb) -> None:
    assert connected("shell", "kill -9 $$").returncode == 137


def test_adb_gives_the_shell_input(connected: Adb) -> None:
    assert connected("shell", "wc -c", input=b"x" * 300_000).stdout.strip() == b"300000"


def test_adb_execs(connected: Adb) -> None:
    assert connected("exec-out", "printf '\\n\\r\\n'; echo e >&2").stdout == b"\n\r\ne\n"


def test_adb_pushes_and_pulls(connected: Adb, tmp_path: Path) -> None:
    content = os.urandom(3_000_001)
    (tmp_path / "here").write_bytes(content)
    pushed = connected("push", str(tmp_path / "here"), str(tmp_path / "there"))
    assert pushed.returncode == 0, pushed.stderr
    assert (tmp_path / "there").read_bytes() == content
    pulled = connected("pull", str(tmp_path / "there"), str(tmp_path / "back"))
    assert pulled.returncode == 0, pulled.stderr
    assert (tmp_path / "back").read_bytes() == content


def test_adb_is_told_what_fails(connected: Adb, tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(b"x")
    assert connected("push", str(tmp_path / "here"), "/no/such/folder/x").returncode != 0
    assert connected("pull", "/no/such/file", str(tmp_path)).returncode != 0


def test_adb_forwards_a_port(connected: Adb) -> None:
    with socket.create_server(("127.0.0.1", 0)) as echo:
        local = int(connected("forward", "tcp:0", f"tcp:{echo.getsockname()[1]}").stdout)
        with socket.create_connection(("127.0.0.1", local), timeout=10) as client:
            client.sendall(b"ping")
            carried, _ = echo.accept()
            with carried:
                assert carried.recv(10) == b"ping"
                carried.sendall(b"pong")
                assert client.recv(10) == b"pong"


def test_adb_is_authorised_by_the_person_once(adb: Adb, tmp_path: Path) -> None:
    with AdbDouble(tmp_path, authentication="ask").running() as device:
        serial = f"127.0.0.1:{device.port}"
        for _ in range(2):
            adb("connect", serial)  # says "failed to authenticate" while the person is asked
            adb("-s", serial, "wait-for-device")
            assert adb("-s", serial, "shell", "echo in").stdout == b"in\n"
            adb("disconnect", serial)
        assert len(device.asked) == 1, "the second time the signature was enough"


def test_adb_is_refused(adb: Adb, tmp_path: Path) -> None:
    with AdbDouble(tmp_path, authentication="refuse").running() as device:
        serial = f"127.0.0.1:{device.port}"
        adb("connect", serial)
        assert adb("-s", serial, "shell", "echo in").returncode != 0
        assert device.asked
        adb("disconnect", serial)


def test_old_versions_check_checksums(adb: Adb, tmp_path: Path) -> None:
    """adb itself computes them; a wrong one of ours would end the connection."""
    with AdbDouble(tmp_path, version=0x01000000).running() as device:
        serial = f"127.0.0.1:{device.port}"
        assert b"connected to" in adb("connect", serial).stdout
        assert adb("-s", serial, "shell", "echo in").stdout == b"in\n"
        adb("disconnect", serial)
