"""The transport through a real adb server, to a real adbd: exit codes, files, faults."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import adbutils
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from device_tests.adb import server as adb_server
from device_tests.adb.server import ServerAddress, ServerTransport, open_server
from device_tests.adb.transport import ShellResult
from device_tests.errors import (
    CommandFailed,
    CommandTimeout,
    DeviceGone,
    DeviceNotFound,
    DeviceUnauthorized,
    ProtocolError,
    StorageFull,
)
from device_tests.local.device import LocalDevice
from device_tests.local.fixture import MakeLocalDevice
from quantize.errors import DeviceError

FOLDER = "/data/local/tmp"


@pytest.fixture
def transport(local_device: LocalDevice, private_server: ServerAddress) -> ServerTransport:
    return open_server(local_device.serial)


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
    transport = ServerTransport("1234", no_server)
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
    with pytest.raises(DeviceNotFound, match=r"cannot connect to 127.0.0.1:1"):
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
    assert adb_server._parse_device(line) == adb_server.ServerDevice(*device)


def test_states_of_a_device_are_errors_of_their_own() -> None:
    transport = ServerTransport("R58", ServerAddress())
    with pytest.raises(DeviceUnauthorized, match="unlock its screen"):
        transport.check("unauthorized")
    with pytest.raises(DeviceGone, match="is offline"):
        transport.check("offline")


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
    transport = ServerTransport("R58", address)
    transport._shell_v2 = True
    fresh = ServerTransport("R58", address)
    calls = [
        lambda: transport.shell("true"),
        lambda: transport.stat("/file"),
        lambda: transport.push(io.BytesIO(b"data"), "/file", 4),
        lambda: transport.pull("/file", io.BytesIO()),
        lambda: transport.forward("tcp:1").__enter__(),
        lambda: fresh.shell("true"),
        lambda: adb_server.server_version(address),
        lambda: adb_server.server_devices(address),
    ]
    for call in calls:
        with contextlib.suppress(DeviceError):
            call()
    if answer == b"OKAY\x01\x05\0\0\0hello\x03\x01\0\0\0\x02":
        assert transport.shell("true") == ShellResult(2, b"hello", b"")


# The shell.


def test_exit_code_stdout_and_stderr_are_apart(transport: ServerTransport) -> None:
    result = transport.shell("echo out; echo err >&2; exit 7")
    assert (result.exit_code, result.stdout, result.stderr) == (7, b"out\n", b"err\n")
    assert transport.shell("kill -9 $$").exit_code == 128 + 9
    assert transport.shell("printf '\\r\\n\\0'").stdout == b"\r\n\0"


def test_a_command_has_no_input(transport: ServerTransport) -> None:
    assert transport.shell("cat; echo end", timeout_s=10).stdout == b"end\n"


def test_much_output_on_both_streams(transport: ServerTransport) -> None:
    result = transport.shell("head -c 3000000 /dev/zero & head -c 3000000 /dev/zero >&2; wait")
    assert (len(result.stdout), len(result.stderr)) == (3000000, 3000000)


def test_a_command_that_goes_on_ends_in_a_timeout(transport: ServerTransport) -> None:
    with pytest.raises(CommandTimeout, match="took too long over 'sleep 60'"):
        transport.shell("sleep 60", timeout_s=0.2)
    with pytest.raises(CommandTimeout):
        transport.shell("while true; do echo busy; sleep 0.01; done", timeout_s=0.3)


def test_endless_output_is_refused(
    transport: ServerTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adb_server, "MAXIMUM_OUTPUT_BYTES", 2**20)
    with pytest.raises(ProtocolError, match="more than 1048576 bytes"):
        transport.shell("cat /dev/zero")


def test_a_command_that_no_request_can_hold_is_refused(transport: ServerTransport) -> None:
    assert transport.shell("true " + "x" * 60000).exit_code == 0
    with pytest.raises(CommandFailed, match="at most 65519 bytes"):
        transport.shell("true " + "x" * 70000)


# Files.


def sha256(transport: ServerTransport, remote: str) -> str:
    return transport.shell(f"sha256sum < '{remote}'").text.split()[0]


@pytest.mark.parametrize("plain_file", [True, False], ids=["file", "stream"])
def test_pieces_at_any_offset_make_the_file(
    transport: ServerTransport,
    tmp_path: Path,
    plain_file: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In another order, with unround lengths, over what is there; large enough for two streams."""
    data = random.Random(5).randbytes(20 * 2**20 + 12345)
    (tmp_path / "data").write_bytes(data)
    remote = f"{FOLDER}/pieces of 'file' {plain_file}"
    pieces = [(11 * 2**20 + 3, len(data)), (0, 4097), (4000, 5 * 2**20)]
    pieces += [(5 * 2**20 - 65536, 10 * 2**20), (10 * 2**20, 11 * 2**20 + 3)]
    for begin, end in pieces:
        moved: list[int] = []
        if plain_file:
            with (tmp_path / "data").open("rb") as source:
                source.seek(begin)
                transport.push(source, remote, end - begin, offset=begin, progress=moved.append)
                assert source.tell() == end
        else:
            transport.push(
                io.BytesIO(data[begin:]), remote, end - begin, offset=begin, progress=moved.append
            )
        assert moved == sorted(moved) and moved[-1] == end - begin
    found = transport.stat(remote)
    assert found is not None and found.size_bytes == len(data)
    path = remote.replace("'", "'\\''")
    assert sha256(transport, path) == hashlib.sha256(data).hexdigest()

    back = io.BytesIO()
    assert transport.pull(remote, back) == len(data) and back.getvalue() == data
    monkeypatch.setattr(adb_server, "_MAXIMUM_HEAD_BYTES", 500)
    for length in (777, 1000):
        part = io.BytesIO()
        assert transport.pull(remote, part, offset=12345, length=length) == length
        assert part.getvalue() == data[12345 : 12345 + length]
    assert transport.pull(remote, io.BytesIO(), offset=len(data) - 700, length=1500) == 700
    assert transport.pull(remote, io.BytesIO(), offset=len(data)) == 0
    transport.shell(f"rm '{path}'")


def test_a_push_never_shortens(transport: ServerTransport) -> None:
    remote = f"{FOLDER}/long"
    transport.push(io.BytesIO(b"0123456789"), remote, 10)
    transport.push(io.BytesIO(b"ab"), remote, 2)
    transport.push(io.BytesIO(b""), remote, 0)
    assert transport.shell(f"cat {remote}").stdout == b"ab23456789"


def test_beyond_4_gib(transport: ServerTransport) -> None:
    """A sparse file: only its end is written."""
    remote, offset = f"{FOLDER}/sparse", 5 * 2**30 + 1
    transport.push(io.BytesIO(b"end"), remote, 3, offset=offset)
    found = transport.stat(remote)
    assert found is not None and found.size_bytes == offset + 3
    end = io.BytesIO()
    assert transport.pull(remote, end, offset=offset - 1) == 4 and end.getvalue() == b"\0end"
    transport.shell(f"rm {remote}")


def test_stat_follows_links_and_knows_what_is_absent(transport: ServerTransport) -> None:
    transport.shell(f"cd {FOLDER}; echo text > target; chmod 640 target; ln -sf target link")
    found = transport.stat(f"{FOLDER}/link")
    assert found is not None and (found.size_bytes, found.mode) == (5, 0o100640)
    assert transport.stat(f"{FOLDER}/absent") is None
    folder = transport.stat(FOLDER)
    assert folder is not None and folder.mode & 0o170000 == 0o040000


@pytest.mark.parametrize("length", [10, 30 * 2**20], ids=["small", "two streams"])
def test_a_file_that_cannot_be_written_says_why(
    transport: ServerTransport, tmp_path: Path, length: int
) -> None:
    (tmp_path / "data").write_bytes(bytes(length))
    with (tmp_path / "data").open("rb") as source:
        with pytest.raises(CommandFailed, match=r"/no/folder.*onexistent"):
            transport.push(source, "/no/folder/file", length)
        with pytest.raises(CommandFailed, match="ends"):
            transport.push(source, f"{FOLDER}/short", length + 1)
    with pytest.raises(CommandFailed, match="No such file"):
        transport.pull("/no/folder/file", io.BytesIO())


def test_a_fault_here_is_not_taken_for_the_devices(transport: ServerTransport) -> None:
    class Broken(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise OSError(5, "Input/output error")

        def write(self, *_: object) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(DeviceError, match="cannot be read") as refused:
        transport.push(Broken(), f"{FOLDER}/broken", 10)
    assert refused.type is DeviceError
    with pytest.raises(DeviceError, match="cannot be written here") as refused:
        transport.pull("/proc/version", Broken())
    assert refused.type is DeviceError


def test_a_full_disk_is_an_error_of_its_own(
    make_local_device: MakeLocalDevice,
    private_server: ServerAddress,
    tmp_path: Path,
) -> None:
    transport = open_server(make_local_device(data_bytes=4 * 2**20).serial)
    (tmp_path / "data").write_bytes(bytes(40 * 2**20))
    with (tmp_path / "data").open("rb") as source, pytest.raises(StorageFull, match="No space"):
        transport.push(source, f"{FOLDER}/big", 40 * 2**20)
    with pytest.raises(StorageFull, match="No space"):
        transport.push(io.BytesIO(bytes(8 * 2**20)), f"{FOLDER}/big", 8 * 2**20)


# Connections that break.


def test_a_device_that_restarts_in_a_push_is_gone_and_comes_back(
    make_local_device: MakeLocalDevice,
    private_server: ServerAddress,
    tmp_path: Path,
) -> None:
    device = make_local_device()
    transport = open_server(device.serial)
    size = 64 * 2**20
    (tmp_path / "data").write_bytes(bytes(size))
    stopped: list[int] = []

    def stop(moved: int) -> None:
        if not stopped and moved > size // 4:
            stopped.append(moved)
            device.stop()

    with (tmp_path / "data").open("rb") as source, pytest.raises(DeviceGone):
        transport.push(source, f"{FOLDER}/file", size, progress=stop)
    with pytest.raises(DeviceGone):
        transport.shell("true")
    with pytest.raises(DeviceGone, match="did not come back within 0 s"):
        transport.reconnect(0.1)
    device.start()
    transport.reconnect(20)
    with (tmp_path / "data").open("rb") as source:
        transport.push(source, f"{FOLDER}/file", size)
    found = transport.stat(f"{FOLDER}/file")
    assert found is not None and found.size_bytes == size


def test_a_device_that_goes_during_a_command(
    make_local_device: MakeLocalDevice,
    private_server: ServerAddress,
) -> None:
    device = make_local_device()
    transport = open_server(device.serial)
    timer = threading.Timer(0.3, device.stop)
    timer.start()
    with pytest.raises(DeviceGone, match="broke during 'sleep 30'"):
        transport.shell("sleep 30", timeout_s=25)
    timer.join()


def test_a_server_that_goes_during_a_command(
    local_device: LocalDevice,
    no_server: ServerAddress,
) -> None:
    adb_server.start_server()
    transport = open_server(local_device.serial)
    kill = [adbutils.adb_path(), "kill-server"]
    timer = threading.Timer(0.3, lambda: subprocess.run(kill, check=False))
    timer.start()
    with pytest.raises(DeviceGone):
        transport.shell("sleep 30", timeout_s=25)
    timer.join()
    with pytest.raises(DeviceGone, match="did not come back"):
        transport.reconnect(0.3)


# Ports.


@pytest.fixture
def listener_on_device(transport: ServerTransport) -> Iterator[int]:
    """A web server in the device; its network is this machine's, so the port is free here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    python = os.path.realpath("/proc/self/exe")
    transport.shell(f"cd {FOLDER} && mkdir -p web && echo served > web/page")
    transport.shell(
        f"cd {FOLDER}/web && setsid sh -c '{python} -I -m http.server --bind 127.0.0.1 {port} "
        "& echo $! >../web.pid' </dev/null >/dev/null 2>&1"
    )
    yield port
    transport.shell(f"kill $(cat {FOLDER}/web.pid)")


def test_a_forwarded_port_leads_to_the_device(
    transport: ServerTransport, listener_on_device: int
) -> None:
    with transport.forward(f"tcp:{listener_on_device}") as port:
        give_up = time.monotonic() + 20
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/page", timeout=5) as page:
                    assert page.read() == b"served\n"
                break
            except OSError:
                assert time.monotonic() < give_up
                time.sleep(0.05)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
