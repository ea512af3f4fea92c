"""The way without an adb server: packets, the greeting, another device, keys."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from device_tests.adb import link as adb_link
from device_tests.adb.cable import Tcp
from device_tests.adb.direct import DirectOpener, open_tcp
from device_tests.adb.link import Authorisation, load_key
from device_tests.adb.transport import Transport
from device_tests.errors import DeviceGone, DeviceUnauthorized, ProtocolError
from device_tests.local.device import LocalDevice
from tests.support.adb_double import AdbDouble, Authentication
from tests.support.adb_ways import pull, push


def opened(double: AdbDouble, authorisation: Authorisation | None = None) -> Transport:
    return open_tcp("127.0.0.1", double.port, authorisation=authorisation or Authorisation())


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
    """A socket sends what fits; adb-shell's own device class takes that for all."""

    class Narrow(Tcp):
        def bulk_write(self, data: bytes, transport_timeout_s: float | None) -> int:
            return super().bulk_write(data[:1000], transport_timeout_s)

    data = os.urandom(600_000)
    opener = DirectOpener("narrow", "tcp", lambda: Narrow("127.0.0.1", double.port))
    with Transport(opener) as transport:
        push(transport, data, str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == data


def test_silent_listener_is_gone() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(DeviceGone, match=r"did not answer within 0\.2 s"),
    ):
        open_tcp("127.0.0.1", silent.getsockname()[1], timeout_s=0.2)


def test_reconnect_refuses_another_device_at_the_same_address(tmp_path: Path) -> None:
    with AdbDouble(tmp_path, model="One").running() as first:
        transport = opened(first)
    with (
        AdbDouble(tmp_path, model="Two", port=first.port).running(),
        pytest.raises(DeviceGone, match=r"another device answers.*Two.*before One"),
    ):
        transport.reconnect(0.5)


def key_of(folder: Path) -> bytes:
    return (folder / "adbkey.pub").read_bytes().split()[0]


def test_device_that_asks_nothing_gets_no_key(
    double: AdbDouble, shared_device: LocalDevice, tmp_path: Path
) -> None:
    for port in (double.port, shared_device.port):
        open_tcp("127.0.0.1", port, authorisation=Authorisation(tmp_path / "keys")).close()
    assert not (tmp_path / "keys").exists()


def test_known_key_needs_no_person(tmp_path: Path) -> None:
    load_key(tmp_path / "keys")
    known = {key_of(tmp_path / "keys")}
    with AdbDouble(tmp_path, "known", known).running() as double:
        asked: list[str] = []
        with opened(double, Authorisation(tmp_path / "keys", on_needed=asked.append)) as transport:
            assert transport.shell("echo in").stdout == b"in\n"
        assert not asked and not double.asked


def test_person_is_told_what_to_do_once(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    with AdbDouble(tmp_path, "ask").running() as double:
        asked: list[str] = []
        for _ in range(2):
            with opened(double, Authorisation(keys, on_needed=asked.append)) as transport:
                assert transport.shell("echo in").stdout == b"in\n"
        assert len(asked) == 1 and "Allow" in asked[0] and transport.serial in asked[0]
        assert double.asked == [key_of(keys)]
    assert stat.S_IMODE((keys / "adbkey").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "authentication, answer", [("refuse", "closed the connection"), ("silent", "did not answer")]
)
def test_refusal_says_what_to_do(
    tmp_path: Path, authentication: Authentication, answer: str
) -> None:
    with (
        AdbDouble(tmp_path, authentication).running() as double,
        pytest.raises(DeviceUnauthorized, match=rf"{answer}.*Allow"),
    ):
        opened(double, Authorisation(tmp_path / "keys", timeout_s=0.3))


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
