"""The transport without adb server, on the double and on the real adbd, and every fault's error."""

from __future__ import annotations

import io
import os
import random
import shlex
import socket
import stat
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import usb1
from adb_shell.exceptions import UsbReadFailedError
from adb_shell.transport.tcp_transport import TcpTransport

from device_tests.adb import direct as adb_direct
from device_tests.adb import link as adb_link
from device_tests.adb.direct import DirectTransport, list_usb, open_tcp, open_usb
from device_tests.adb.link import load_key
from device_tests.errors import (
    CommandFailed,
    CommandTimeout,
    DeviceGone,
    DeviceNotFound,
    DeviceUnauthorized,
    ProtocolError,
    StorageFull,
)
from device_tests.local.fixture import MakeLocalDevice
from quantize.errors import DeviceError
from tests.support.adb_double import AdbDouble, Authentication

MIB = 1024 * 1024


@dataclass
class Device:
    """A connected device and a folder on it that may be written."""

    transport: DirectTransport
    folder: str


@pytest.fixture(params=["double", "adbd"])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Device]:
    """The double and the real adbd: every test that takes this runs on both."""
    if request.param == "double":
        with (
            AdbDouble(tmp_path).running() as double,
            open_tcp("127.0.0.1", double.port) as transport,
        ):
            yield Device(transport, str(tmp_path))
    else:
        local = request.getfixturevalue("local_device")
        with open_tcp("127.0.0.1", local.port) as transport:
            folder = f"/data/local/tmp/direct-{os.urandom(4).hex()}"
            assert transport.shell(f"mkdir -p {folder}").exit_code == 0
            yield Device(transport, folder)
        with open_tcp("127.0.0.1", local.port) as transport:
            transport.shell(f"rm -rf {folder}")


@pytest.fixture
def double(tmp_path: Path) -> Iterator[AdbDouble]:
    with AdbDouble(tmp_path).running() as running:
        yield running


def opened(double: AdbDouble, **options: object) -> DirectTransport:
    return open_tcp("127.0.0.1", double.port, **options)  # type: ignore[arg-type]


def push(transport: DirectTransport, data: bytes, remote: str, offset: int = 0) -> None:
    transport.push(io.BytesIO(data), remote, len(data), offset=offset)


def pull(transport: DirectTransport, remote: str, **range_: int) -> bytes:
    taken = io.BytesIO()
    assert transport.pull(remote, taken, **range_) == len(taken.getvalue())
    return taken.getvalue()


# --- shell ---


def test_shell_keeps_exit_code_and_outputs_apart(device: Device) -> None:
    result = device.transport.shell("printf 'a\\0\\r\\n\\377'; echo no >&2; exit 7")
    assert (result.exit_code, result.stdout, result.stderr) == (7, b"a\0\r\n\xff", b"no\n")


def test_shell_names_the_signal_by_the_exit_code(device: Device) -> None:
    assert device.transport.shell("kill -9 $$").exit_code == 137


def test_shell_has_no_input(device: Device) -> None:
    assert device.transport.shell("cat; echo end").stdout == b"end\n"


def test_shell_gives_long_output_whole(device: Device) -> None:
    result = device.transport.shell("seq 300000; seq 300000 >&2")
    expected = "".join(f"{i}\n" for i in range(1, 300001)).encode()
    assert result.stdout == expected and result.stderr == expected


def test_shell_refuses_endless_output(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adb_direct, "MAX_OUTPUT_BYTES", 100_000)
    with pytest.raises(ProtocolError, match="more than 100000 bytes"):
        device.transport.shell("cat /dev/zero")
    assert device.transport.shell("echo on").stdout == b"on\n"


def test_shell_reports_a_syntax_error_as_the_shell_does(device: Device) -> None:
    result = device.transport.shell("echo 'unfinished")
    assert result.exit_code != 0 and result.stderr


def test_shell_is_not_fooled_by_output_that_looks_like_a_reply(device: Device) -> None:
    """A frame `exit 0` printed by the command is just output."""
    result = device.transport.shell("printf '\\003\\001\\000\\000\\000\\000'; exit 5")
    assert (result.exit_code, result.stdout) == (5, b"\x03\x01\0\0\0\0")


def test_command_that_outlasts_its_time_leaves_the_transport_usable(device: Device) -> None:
    with pytest.raises(CommandTimeout, match="sleep 60"):
        device.transport.shell("echo begun; sleep 60", timeout_s=0.2)
    assert device.transport.shell("echo on").stdout == b"on\n"


def test_command_that_outlasts_its_time_costs_no_connection(double: AdbDouble) -> None:
    """Over USB opening another one would end what else goes on."""
    with opened(double) as transport:
        for command in ("sleep 60", "echo on; sleep 60", "sleep 60 >&2"):
            with pytest.raises(CommandTimeout):
                transport.shell(command, timeout_s=0.1)
            assert transport.shell("echo on").stdout == b"on\n"
        assert double.connections == 1


def test_impossible_commands_are_refused(device: Device) -> None:
    with pytest.raises(CommandFailed, match="null character"):
        device.transport.shell("echo a\0b")
    with pytest.raises(CommandFailed, match="longer than"):
        device.transport.shell("#" * (2 * MIB))
    assert device.transport.shell("echo on").stdout == b"on\n"


def test_threads_take_turns(device: Device) -> None:
    results: dict[int, bytes] = {}

    def work(index: int) -> None:
        for _ in range(5):
            results[index] = device.transport.shell(f"seq {index} 3000").stdout

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        assert results[index] == "".join(f"{i}\n" for i in range(index, 3001)).encode()


# --- files ---


def test_file_makes_the_round_trip(device: Device) -> None:
    data, moved = os.urandom(3 * MIB + 17), []
    remote = f"{device.folder}/a 'file' $HOME"
    device.transport.push(io.BytesIO(data), remote, len(data), progress=moved.append)
    assert moved == sorted(moved) and moved[-1] == len(data)
    assert pull(device.transport, remote) == data


def test_ranges_are_written_and_read_like_a_file(device: Device) -> None:
    """Against a model in memory: offsets around block borders, beyond the end, of no bytes."""
    numbers = random.Random(3)
    remote, model = f"{device.folder}/file", bytearray()
    borders = [0, 1, 4095, 4096, 4097, 65536, MIB - 1, MIB, MIB + 4096, 2 * MIB]
    for _ in range(40):
        offset = numbers.choice([*borders, numbers.randrange(2 * MIB)])
        data = numbers.randbytes(numbers.choice([0, 1, 100, 4096, 70_000]))
        push(device.transport, data, remote, offset)
        if data:
            model.extend(bytes(max(0, offset + len(data) - len(model))))
            model[offset : offset + len(data)] = data
        start, length = numbers.choice(borders), numbers.choice([0, 1, 5000, 3 * MIB])
        part = pull(device.transport, remote, offset=start, length=length)
        assert part == model[start : start + length]
    assert pull(device.transport, remote) == model


def test_sizes_beyond_4_gib_are_exact(device: Device) -> None:
    remote, beyond = f"{device.folder}/sparse", 5 * 2**30 + 77
    push(device.transport, b"tail", remote, beyond)
    found = device.transport.stat(remote)
    assert found is not None and found.size_bytes == beyond + 4
    assert pull(device.transport, remote, offset=beyond - 2) == b"\0\0tail"
    device.transport.shell(f"rm {remote}")


def test_push_takes_only_its_length_of_the_source(device: Device) -> None:
    source = io.BytesIO(b"headbodytail")
    source.seek(4)
    device.transport.push(source, f"{device.folder}/body", 4)
    assert source.read() == b"tail"
    assert pull(device.transport, f"{device.folder}/body") == b"body"


def test_empty_push_makes_the_file(device: Device) -> None:
    push(device.transport, b"", f"{device.folder}/empty")
    found = device.transport.stat(f"{device.folder}/empty")
    assert found is not None and found.size_bytes == 0


def test_stat_follows_links_and_tells_what_is_there(device: Device) -> None:
    device.transport.shell(
        f"cd {device.folder} && printf 12345 > '-f l' && ln -s -- '-f l' link && ln -s no dead"
    )
    found = device.transport.stat(f"{device.folder}/link")
    assert found is not None and found.size_bytes == 5 and stat.S_ISREG(found.mode)
    assert abs(found.modified_s - int(device.transport.shell("date +%s").text)) < 60
    folder = device.transport.stat(device.folder)
    assert folder is not None and stat.S_ISDIR(folder.mode)
    assert device.transport.stat(f"{device.folder}/dead") is None
    assert device.transport.stat(f"{device.folder}/nothing") is None


def test_what_cannot_be_written_or_read_is_said(device: Device) -> None:
    transport = device.transport
    with pytest.raises(CommandFailed, match="No such file"):
        push(transport, bytes(5 * MIB), f"{device.folder}/no/such/folder")
    with pytest.raises(CommandFailed, match="No such file"):
        pull(transport, f"{device.folder}/nothing")
    with pytest.raises(CommandFailed, match="directory"):
        pull(transport, device.folder)
    assert transport.shell("echo on").stdout == b"on\n"


def test_full_storage_is_said(device: Device) -> None:
    with pytest.raises(StorageFull, match="No space left"):
        push(device.transport, bytes(5 * MIB), "/dev/full")
    assert device.transport.shell("echo on").stdout == b"on\n"


def test_full_file_system_of_a_device_is_said(make_local_device: MakeLocalDevice) -> None:
    local = make_local_device(data_bytes=4 * MIB)
    with open_tcp("127.0.0.1", local.port) as transport:
        with pytest.raises(StorageFull):
            push(transport, bytes(8 * MIB), "/data/local/tmp/file")
        push(transport, b"small", "/data/local/tmp/file")  # over what is there


def test_source_that_ends_early_is_said(device: Device) -> None:
    with pytest.raises(DeviceError, match="ended 3 bytes early"):
        device.transport.push(io.BytesIO(b"ab"), f"{device.folder}/file", 5)
    assert device.transport.shell("echo on").stdout == b"on\n"


# --- ports ---


@pytest.fixture
def echo_port() -> Iterator[int]:
    """A server that sends back what it gets, until it gets nothing more."""

    def echo(client: socket.socket) -> None:
        with client:
            while data := client.recv(65536):
                client.sendall(data)

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def test_forwarded_port_carries_both_directions_of_several_connections(
    device: Device, echo_port: int
) -> None:
    data = os.urandom(500_000)
    with device.transport.forward(f"tcp:{echo_port}") as port:
        clients = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(3)]
        for client in clients:
            sender = threading.Thread(target=client.sendall, args=(data,), daemon=True)
            sender.start()
            got = b""
            while len(got) < len(data):
                got += client.recv(65536)
            assert got == data
            sender.join()
        assert device.transport.shell("echo meanwhile").stdout == b"meanwhile\n"
        for client in clients:
            client.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_forwarded_port_closes_where_nobody_listens(device: Device) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = taken.getsockname()[1]
    with (
        device.transport.forward(f"tcp:{nobody}") as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as client,
    ):
        assert client.recv(1) == b""


# --- faults ---


def test_cut_in_a_push_is_gone_then_goes_on(double: AdbDouble, tmp_path: Path) -> None:
    data, remote = os.urandom(4 * MIB), str(tmp_path / "file")
    with opened(double) as transport:
        double.faults.cut_after = 2 * MIB
        with pytest.raises(DeviceGone, match="connection"):
            push(transport, data, remote)
        assert double.faults.fired == ["cut_after"]
        transport.reconnect(10)
        written = (tmp_path / "file").stat().st_size
        assert 0 < written < len(data)
        push(transport, data[written:], remote, written)
    assert (tmp_path / "file").read_bytes() == data


def test_cut_in_a_pull_is_gone(double: AdbDouble, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4 * MIB))
    with opened(double) as transport:
        double.faults.cut_after = 2 * MIB
        with pytest.raises(DeviceGone):
            pull(transport, str(tmp_path / "file"))
        assert len(pull(transport, str(tmp_path / "file"))) == 4 * MIB


def test_cut_at_every_packet_of_a_command_is_gone(double: AdbDouble) -> None:
    for cut in range(120, 600, 24):
        with opened(double) as transport:
            double.faults.cut_after, double.faults.fired = cut, []
            try:
                transport.shell("echo out; echo err >&2")
            except DeviceGone:
                assert double.faults.fired == ["cut_after"]
            double.faults.cut_after = None
            transport.reconnect(10)  # the cut may have come after the reply
            assert transport.shell("echo on").stdout == b"on\n"


def test_stalled_device_is_gone(double: AdbDouble, tmp_path: Path) -> None:
    with opened(double) as transport:
        transport._stall_s = 0.3
        double.faults.stall_after = 0
        with pytest.raises(DeviceGone, match="did not begin"):
            transport.shell("echo", timeout_s=0.3)
        double.faults.stall_after = MIB
        with pytest.raises(DeviceGone, match="moved nothing"):
            push(transport, bytes(4 * MIB), str(tmp_path / "file"))
        assert transport.shell("echo on").stdout == b"on\n"
    assert double.faults.fired == ["stall_after"] * 2


def test_corrupted_chunk_arrives_and_differs_by_a_bit(double: AdbDouble, tmp_path: Path) -> None:
    """Nothing in adb's protocol sees it: what is pushed must be verified by its hash."""
    data = bytes(2 * MIB)
    with opened(double) as transport:
        double.faults.corrupt_after = MIB
        push(transport, data, str(tmp_path / "file"))
        written = (tmp_path / "file").read_bytes()
        assert len(written) == len(data) and sum(written) == 0x10
        push(transport, data, str(tmp_path / "file"))
        assert (tmp_path / "file").read_bytes() == data


def test_corruption_is_seen_by_a_device_that_still_checks(tmp_path: Path) -> None:
    """Version 0x01000000: we compute the sums it checks, and check its."""
    with AdbDouble(tmp_path, version=0x01000000).running() as old, opened(old) as transport:
        data = os.urandom(600_000)
        push(transport, data, str(tmp_path / "file"))
        assert pull(transport, str(tmp_path / "file")) == data
        old.faults.malformed = adb_link._HEADER.pack(
            0x45545257, 1, 1, 3, 0, 0x45545257 ^ 0xFFFFFFFF
        ) + b"abc"  # fmt: skip
        with pytest.raises(ProtocolError, match="checksum"):
            transport.shell("echo")


@pytest.mark.parametrize(
    "packet",
    [
        bytes(24),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        adb_link._HEADER.pack(0x45545257, 1, 1, 0xFFFFFFFF, 0, 0x45545257 ^ 0xFFFFFFFF),
        adb_link._HEADER.pack(0x45545257, 1, 1, 0, 0, 0),
    ],
    ids=["zeros", "another protocol", "4 GiB announced", "wrong magic"],
)
def test_malformed_packet_is_a_protocol_error(double: AdbDouble, packet: bytes) -> None:
    with opened(double) as transport:
        double.faults.malformed = packet
        with pytest.raises(ProtocolError):
            transport.shell("echo")
        assert transport.shell("echo on").stdout == b"on\n"


def test_socket_that_takes_little_at_a_time_gets_everything(
    double: AdbDouble, tmp_path: Path
) -> None:
    """adb-shell's socket sends what fits; its own device class takes that for all."""

    class Narrow(TcpTransport):
        def bulk_write(self, data: bytes, transport_timeout_s: float | None) -> int:
            return super().bulk_write(data[:1000], transport_timeout_s)

    data = os.urandom(600_000)
    with DirectTransport("narrow", "tcp", lambda: Narrow("127.0.0.1", double.port)) as transport:
        push(transport, data, str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == data


def test_nobody_there_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(DeviceGone, match=f"127.0.0.1:{port}"):
        open_tcp("127.0.0.1", port)


def test_silent_listener_is_gone() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(DeviceGone, match=r"did not answer within 0\.2 s"),
    ):
        open_tcp("127.0.0.1", silent.getsockname()[1], timeout_s=0.2)


def test_device_without_shell_v2_is_refused(tmp_path: Path) -> None:
    with (
        AdbDouble(tmp_path, features="cmd").running() as old,
        pytest.raises(DeviceError, match="Android 7"),
    ):
        opened(old)


def test_reconnect_waits_for_a_restart(tmp_path: Path) -> None:
    first = AdbDouble(tmp_path)
    with first.running():
        transport = opened(first)
    with pytest.raises(DeviceGone, match="did not come back"):
        transport.reconnect(0.2)
    second = AdbDouble(tmp_path, port=first.port)

    def come_back() -> None:
        with second.running():
            ended.wait(20)

    ended = threading.Event()
    returning = threading.Timer(0.5, come_back)
    returning.start()
    transport.reconnect(20)
    assert transport.shell("echo back").stdout == b"back\n"
    ended.set()
    returning.join()
    transport.close()


def test_reconnect_refuses_another_device_at_the_same_address(tmp_path: Path) -> None:
    with AdbDouble(tmp_path, model="One").running() as first:
        transport = opened(first)
    with (
        AdbDouble(tmp_path, model="Two", port=first.port).running(),
        pytest.raises(DeviceGone, match=r"another device answers.*Two.*before One"),
    ):
        transport.reconnect(0.5)


def test_closed_transport_says_so(device: Device) -> None:
    transport = device.transport
    transport.close()
    for call in (lambda: transport.shell("echo"), lambda: transport.reconnect(1)):
        with pytest.raises(DeviceError, match="closed"):
            call()
    with pytest.raises(DeviceError, match="closed"), transport.forward("tcp:1"):
        pass


def test_interrupted_call_leaves_the_transport_usable(device: Device) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        device.transport.push(
            io.BytesIO(bytes(MIB)), f"{device.folder}/file", MIB, progress=interrupt
        )
    assert device.transport.shell("echo on").stdout == b"on\n"


def test_adbd_restarted_is_found_again(make_local_device: MakeLocalDevice) -> None:
    local = make_local_device()
    with open_tcp("127.0.0.1", local.port) as transport:
        push(transport, b"kept", "/data/local/tmp/file")
        local.restart()
        with pytest.raises(DeviceGone):
            transport.shell("echo")
        transport.reconnect(20)
        assert pull(transport, "/data/local/tmp/file") == b"kept"


# --- keys ---


def key_of(folder: Path) -> bytes:
    return (folder / "adbkey.pub").read_bytes().split()[0]


def test_device_that_asks_nothing_gets_no_key(device: Device, tmp_path: Path) -> None:
    port = int(device.transport.serial.rpartition(":")[2])
    open_tcp("127.0.0.1", port, key_folder=tmp_path / "keys").close()
    assert not (tmp_path / "keys").exists()


def test_known_key_needs_no_person(tmp_path: Path) -> None:
    load_key(tmp_path / "keys")
    known = {key_of(tmp_path / "keys")}
    with AdbDouble(tmp_path, "known", known).running() as double:
        asked: list[str] = []
        with opened(
            double, key_folder=tmp_path / "keys", on_authorisation_needed=asked.append
        ) as transport:
            assert transport.shell("echo in").stdout == b"in\n"
        assert not asked and not double.asked


def test_person_is_told_what_to_do_once(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    with AdbDouble(tmp_path, "ask").running() as double:
        asked: list[str] = []
        for _ in range(2):
            with opened(double, key_folder=keys, on_authorisation_needed=asked.append) as transport:
                assert transport.shell("echo in").stdout == b"in\n"
        assert len(asked) == 1 and "Allow" in asked[0] and transport.serial in asked[0]
        assert double.asked == [key_of(keys)]
    assert stat.S_IMODE((keys / "adbkey").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "authentication, answer", [("refuse", "closed the connection"), ("silent", "gave no answer")]
)
def test_refusal_says_what_to_do(
    tmp_path: Path, authentication: Authentication, answer: str
) -> None:
    with (
        AdbDouble(tmp_path, authentication).running() as double,
        pytest.raises(DeviceUnauthorized, match=rf"{answer}.*Allow"),
    ):
        opened(double, key_folder=tmp_path / "keys", authorisation_timeout_s=0.3)


def test_key_of_adb_is_used_as_it_is(tmp_path: Path) -> None:
    """Only the private half is there: the public one is written from it, as adb does."""
    load_key(tmp_path)
    private, public = (tmp_path / "adbkey").read_bytes(), key_of(tmp_path)
    (tmp_path / "adbkey.pub").unlink()
    load_key(tmp_path)
    assert (tmp_path / "adbkey").read_bytes() == private and key_of(tmp_path) == public


def test_broken_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "adbkey").write_text("no key")
    with pytest.raises(DeviceUnauthorized, match="adbkey"):
        load_key(tmp_path)


def test_wireless_debugging_is_named(tmp_path: Path) -> None:
    packet = adb_link._HEADER.pack(adb_link._STLS, 0x01000000, 0, 0, 0, adb_link._STLS ^ 0xFFFFFFFF)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            client, _ = server.accept()
            with client:
                client.recv(1000)
                client.sendall(packet)
                client.recv(1000)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(DeviceUnauthorized, match="wireless debugging"):
            open_tcp("127.0.0.1", server.getsockname()[1])
        thread.join(5)


# --- USB, its library replaced by one whose cable ends at the double ---


class Cable(TcpTransport):
    """Behaves like adb-shell's USB transport: errors of libusb, wrapped or not."""

    claim_error: Exception | None = None
    read_error: Exception | None = None

    def __init__(self, port: int, serial: str) -> None:
        super().__init__("127.0.0.1", port)
        self.serial_number = serial

    def connect(self, transport_timeout_s: float | None = None) -> None:
        if self.claim_error is not None:
            raise self.claim_error
        super().connect(transport_timeout_s)

    def bulk_read(self, numbytes: int, transport_timeout_s: float | None = None) -> bytes:
        if self.read_error is not None:
            raise UsbReadFailedError("Could not receive data", self.read_error)
        return super().bulk_read(numbytes, transport_timeout_s)


@pytest.fixture
def plugged(double: AdbDouble, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Cable]]:
    """Replace what is on USB."""

    def plug(*serials: str) -> list[Cable]:
        cables = [Cable(double.port, serial) for serial in serials]
        module = types.ModuleType("usb_transport")
        module.UsbTransport = types.SimpleNamespace(find_all_adb_devices=lambda: iter(cables))
        monkeypatch.setitem(sys.modules, "adb_shell.transport.usb_transport", module)
        return cables

    return plug


def test_usb_device_is_used_like_any_other(plugged: Callable, tmp_path: Path) -> None:
    plugged("B2", "A1")
    assert list_usb() == ["A1", "B2"]
    with open_usb("B2") as transport:
        assert (transport.serial, transport.kind) == ("B2", "usb")
        push(transport, b"over usb", str(tmp_path / "file"))
        assert transport.shell(f"cat {shlex.quote(str(tmp_path))}/file").stdout == b"over usb"


def test_only_usb_device_is_taken_and_of_two_none(plugged: Callable) -> None:
    plugged("A1")
    assert open_usb().serial == "A1"
    plugged("A1", "B2")
    with pytest.raises(DeviceNotFound, match=r"2 \(A1, B2\)"):
        open_usb()
    plugged()
    with pytest.raises(DeviceNotFound, match="none found"):
        open_usb()


def test_usb_held_by_the_adb_server_is_named(plugged: Callable) -> None:
    plugged("A1")[0].claim_error = usb1.USBErrorBusy(-6)
    with pytest.raises(DeviceError, match="adb server"):
        open_usb("A1")


def test_usb_without_permission_is_named(plugged: Callable) -> None:
    plugged("A1")[0].claim_error = usb1.USBErrorAccess(-3)
    with pytest.raises(DeviceError, match="udev"):
        open_usb("A1")


def test_usb_unplugged_is_gone_and_comes_back(plugged: Callable) -> None:
    (cable,) = plugged("A1")
    with open_usb("A1") as transport:
        cable.read_error = usb1.USBErrorNoDevice(-4)
        with pytest.raises(DeviceGone, match="connection to A1 is broken"):
            transport.shell("echo")
        plugged()
        with pytest.raises(DeviceGone, match="did not come back"):
            transport.reconnect(0.2)
        plugged("A1")
        transport.reconnect(10)
        assert transport.shell("echo back").stdout == b"back\n"


def test_usb_timeout_is_silence_not_an_error(plugged: Callable) -> None:
    (cable,) = plugged("A1")
    with open_usb("A1") as transport:
        cable.read_error = usb1.USBErrorTimeout(-7)
        with pytest.raises(DeviceGone, match="did not begin"):
            transport.shell("echo", timeout_s=0.2)
        cable.read_error = None
        assert transport.shell("echo on").stdout == b"on\n"


def test_usb_leftovers_of_an_earlier_connection_are_passed_over(
    plugged: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libusb: the rest of a packet is longer than the header that was asked for."""
    (cable,) = plugged("A1")
    cable.read_error = usb1.USBErrorOverflow(-8)
    connect, attempts = Cable.connect, []

    def connect_again(self: Cable, timeout_s: float | None = None) -> None:
        attempts.append(timeout_s)
        if len(attempts) == 3:
            self.read_error = None
        connect(self, timeout_s)

    monkeypatch.setattr(Cable, "connect", connect_again)
    with open_usb("A1") as transport:
        assert transport.shell("echo in").stdout == b"in\n"
    assert len(attempts) == 3


def test_usb_cannot_forward_and_says_what_can(plugged: Callable) -> None:
    plugged("A1")
    with (
        open_usb("A1") as transport,
        pytest.raises(DeviceError, match="adb server"),
        transport.forward("tcp:1"),
    ):
        pass


def test_missing_libusb_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adb_shell.transport.usb_transport", None)
    with pytest.raises(DeviceError, match=r"libusb-1\.0.* install it .*adb server"):
        list_usb()
