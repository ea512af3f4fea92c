"""The adb server: where it is, that none is started unasked, whatever it answers."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from device_tests.adb import server as adb_server
from device_tests.adb.opener import Deadline
from device_tests.adb.server import DeviceEntry, ServerAddress, ServerOpener, open_server
from device_tests.adb.transport import ShellResult, Transport, opened
from device_tests.errors import (
    CommandFailed,
    DeviceGone,
    DeviceNotFound,
    DeviceUnauthorized,
    ProtocolError,
)
from device_tests.local.device import LocalDevice
from quantize.errors import DeviceError

# Where the server is, and that none is started unasked.


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({}, "127.0.0.1:5037"),
        ({"ANDROID_ADB_SERVER_PORT": "6000"}, "127.0.0.1:6000"),
        ({"ANDROID_ADB_SERVER_ADDRESS": "10.0.0.2"}, "10.0.0.2:5037"),
        ({"ADB_SERVER_SOCKET": "tcp:6001", "ANDROID_ADB_SERVER_PORT": "1"}, "127.0.0.1:6001"),
        ({"ADB_SERVER_SOCKET": "tcp:localhost:6002"}, "127.0.0.1:6002"),
        ({"ADB_SERVER_SOCKET": "tcp:host:6003"}, "host:6003"),
    ],
)
def test_the_server_is_where_adb_would_look(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], address: str
) -> None:
    for name in ("ADB_SERVER_SOCKET", "ANDROID_ADB_SERVER_ADDRESS", "ANDROID_ADB_SERVER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(adb_server.server_address()) == address


@pytest.mark.parametrize(
    ("name", "value"),
    [("ADB_SERVER_SOCKET", "localabstract:adb"), ("ANDROID_ADB_SERVER_PORT", "70000")],
)
def test_an_address_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.delenv("ADB_SERVER_SOCKET", raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(ProtocolError, match=value):
        adb_server.server_address()


def test_looking_for_a_server_starts_none(no_server: ServerAddress) -> None:
    assert adb_server.server_version() is None
    assert adb_server.server_devices() == []
    with pytest.raises(DeviceNotFound, match=f"no adb server runs at {no_server}"):
        open_server("1234")
    transport = Transport(ServerOpener("1234", no_server))
    with pytest.raises(DeviceGone, match="does not answer any more"):
        transport.shell("true")
    with socket.socket() as probe:
        assert probe.connect_ex((no_server.host, no_server.port)) != 0


def test_a_running_server_of_another_version_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that says version 40; the real `adb start-server` would end it."""
    asked: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                request = connection.recv(100)
                asked.append(request)
                if request == b"000chost:version":
                    connection.sendall(b"OKAY00040028")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.delenv("ADB_SERVER_SOCKET", raising=False)
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(listener.getsockname()[1]))
        threading.Thread(target=serve, daemon=True).start()
        assert adb_server.server_version() == 40
        adb_server.start_server()
        assert adb_server.server_version() == 40
    assert set(asked) <= {b"", b"000chost:version"}


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400\r\n\r\n", b"OKAY0004wxyz", b"FAIL0003no!"])
def test_something_else_on_the_port_is_named(
    monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    def serve() -> None:
        for _ in range(2):
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.delenv("ADB_SERVER_SOCKET", raising=False)
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(listener.getsockname()[1]))
        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(ProtocolError, match="does not answer as an adb server"):
            adb_server.server_version()


def test_a_device_that_the_server_does_not_know(private_server: ServerAddress) -> None:
    with pytest.raises(DeviceNotFound, match="knows no device '1234'"):
        open_server("1234")
    with pytest.raises(DeviceGone, match=r"connection to 127\.0\.0\.1:1 is broken .*refused"):
        open_server("127.0.0.1:1")


@pytest.mark.parametrize(
    ("line", "device"),
    [
        ("R58 device usb:1-1 product:p model:SM_S928B device:e3q transport_id:2",
         ("R58", "device", "SM_S928B")),
        ("127.0.0.1:5555         offline transport_id:3", ("127.0.0.1:5555", "offline", "")),
        ("R58   no permissions (missing udev rules?); see [http://x.y/z.html] usb:1-1",
         ("R58", "no permissions (missing udev rules?); see [http://x.y/z.html]", "")),
        ("R58 unauthorized", ("R58", "unauthorized", "")),
    ],
)  # fmt: skip
def test_lines_of_adb_devices(line: str, device: tuple[str, str, str]) -> None:
    serial, state, model = device
    assert adb_server._parse_device(line) == DeviceEntry(serial, state, "server", model)


def test_states_of_a_device_are_errors_of_their_own() -> None:
    opener = ServerOpener("R58", ServerAddress())
    with pytest.raises(DeviceUnauthorized, match="unlock its screen"):
        opener.check("unauthorized")
    with pytest.raises(DeviceGone, match="is offline"):
        opener.check("offline")


# Whatever the server answers, it is a DeviceError or a result.

PIECES = st.sampled_from(
    [b"OKAY", b"FAIL", b"0000", b"0004", b"ffff", b"zzzz", b"device offline", b"R58\tdevice\n",
     b"\x01\x05\0\0\0hello", b"\x03\x01\0\0\0\0", b"\x02\xff\xff\xff\xff", b"\x03\0\0\0\0",
     b"\x07\0\0\0\0"]
)  # fmt: skip
ANSWERS = st.lists(PIECES | st.binary(max_size=8), max_size=6).map(b"".join)


@pytest.fixture(scope="module")
def liar() -> Iterator[tuple[ServerAddress, list[bytes]]]:
    """A server that says to each request what the list's only item is, and hangs up."""
    answer = [b""]

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(1)
                if connection.recv(4096):
                    connection.sendall(answer[0])
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):
                        pass

    with socket.create_server(("127.0.0.1", 0), backlog=50) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield ServerAddress("127.0.0.1", listener.getsockname()[1]), answer
        listener.shutdown(socket.SHUT_RDWR)


@settings(max_examples=100, deadline=None)
@given(answer=ANSWERS, greeted=st.booleans())
@example(answer=b"OKAY\x01\x05\0\0\0hello\x03\x01\0\0\0\x02", greeted=True)
def test_any_answer_is_a_result_or_a_device_error(
    liar: tuple[ServerAddress, list[bytes]], answer: bytes, greeted: bool
) -> None:
    address, slot = liar
    slot[0] = b"OKAY" * greeted + answer
    opener = ServerOpener("R58", address)
    transport = Transport(opener)
    calls = [
        lambda: transport.shell("true"),
        lambda: transport.stat("/file"),
        lambda: transport.push(io.BytesIO(b"data"), "/file", 4),
        lambda: transport.pull("/file", io.BytesIO()),
        lambda: opener.open_apart(b"tcp:1", Deadline(10)).close(),
        lambda: opened(opener),
        lambda: adb_server.server_version(address),
        lambda: adb_server.server_devices(address),
    ]
    for call in calls:
        with contextlib.suppress(DeviceError):
            call()
    if answer == b"OKAY\x01\x05\0\0\0hello\x03\x01\0\0\0\x02":
        assert transport.shell("true") == ShellResult(2, b"hello", b"")


def test_a_command_that_no_request_can_hold_is_refused(
    shared_device: LocalDevice, shared_server: ServerAddress
) -> None:
    transport = open_server(shared_device.serial, shared_server)
    with pytest.raises(CommandFailed, match="longer than the 65535"):
        transport.shell("true " + "x" * 70000)
