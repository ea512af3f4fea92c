"""Direct USB, its library replaced by one whose cable ends at the double."""

from __future__ import annotations

import shlex
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import usb1
from adb_shell.exceptions import UsbReadFailedError

from device_tests.adb.cable import Tcp
from device_tests.adb.direct import list_usb, open_usb
from device_tests.errors import DeviceGone, DeviceNotFound
from quantize.errors import DeviceError
from tests.support.adb_double import AdbDouble
from tests.support.adb_ways import push


class Cable(Tcp):
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
