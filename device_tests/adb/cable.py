"""What carries the bytes to an adbd or an adb server: TCP, and adb-shell's USB.

Neither packets nor requests are known here.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from adb_shell.transport.base_transport import BaseTransport

from device_tests.adb import faults
from device_tests.adb.faults import excerpt
from device_tests.adb.opener import Deadline, TimedOut
from device_tests.errors import DeviceGone, ProtocolError
from quantize.errors import DeviceError


class Tcp(BaseTransport):
    """A socket; what is sent goes out at once."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._socket: socket.socket | None = None

    def connect(self, transport_timeout_s: float | None) -> None:
        self._socket = socket.create_connection(self._address, transport_timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that reads
            self._socket.close()

    def bulk_read(self, numbytes: int, transport_timeout_s: float | None) -> bytes:
        data = self._ready(transport_timeout_s).recv(numbytes)
        if not data:
            raise ConnectionResetError("the other side closed it")
        return data

    def bulk_write(self, data: memoryview | bytes, transport_timeout_s: float | None) -> int:
        return self._ready(transport_timeout_s).send(data)

    def has_input(self) -> bool:
        """Whether a read would return at once."""
        return bool(select.select([self._ready(None)], [], [], 0)[0])

    def _ready(self, timeout_s: float | None) -> socket.socket:
        if self._socket is None:
            raise ConnectionError("not connected")
        self._socket.settimeout(timeout_s)
        return self._socket


class Cable:
    """A connection by a transport of adb-shell's shape, its errors translated."""

    def __init__(self, transport: BaseTransport, serial: str) -> None:
        self.serial = serial
        self._transport = transport

    def connect(self, deadline: Deadline) -> None:
        with translated(self.serial):
            self._transport.connect(deadline.wait_s())

    def read(self, most_bytes: int, deadline: Deadline) -> bytes:
        """What came, at least one byte and at most `most_bytes`."""
        with translated(self.serial):
            data = self._transport.bulk_read(most_bytes, deadline.wait_s())
        if len(data) > most_bytes:
            raise ProtocolError(f"{self.serial} sent more than was asked for: connect again")
        return data

    def write(self, data: memoryview | bytes, deadline: Deadline) -> None:
        """All of `data`."""
        view = memoryview(data)
        with translated(self.serial):
            while len(view):
                # What fits is sent, and its length returned.
                view = view[self._transport.bulk_write(view, deadline.wait_s()) :]

    def close(self) -> None:
        with contextlib.suppress(Exception):  # a broken connection may refuse even that
            self._transport.close()


@contextmanager
def translated(serial: str) -> Iterator[None]:
    """Every error of sockets, adb-shell and libusb as a DeviceError or TimedOut."""
    try:
        yield
    except (DeviceError, TimedOut):
        raise
    except Exception as error:
        raise faults.broken(error, serial) from error


def list_usb() -> list[str]:
    """The serial numbers of devices with USB debugging on this machine's USB.

    Raises DeviceError if libusb is missing or this user may not open a device.
    """
    with translated("USB"):
        return sorted({device.serial_number for device in _usb_devices()})


def find_usb(serial: str) -> BaseTransport:
    """The device with this serial number; raises DeviceGone if it is not there."""
    with translated(serial):
        for device in list(_usb_devices()):
            if device.serial_number == serial:
                return device
    raise DeviceGone(
        f"{serial} is not on USB with debugging on: check the cable, unlock it and switch USB "
        "debugging on"
    )


def _usb_devices() -> Iterator[Any]:
    """adb-shell's USB transports; importing them loads libusb."""
    try:
        from adb_shell.transport.usb_transport import UsbTransport
    except Exception as error:  # ImportError, OSError, or libusb's own when it cannot start
        raise DeviceError(
            "direct USB needs the library libusb-1.0, which cannot be loaded here: install it "
            "(Debian: libusb-1.0-0) or use the device through the adb server "
            f"({excerpt(str(error))})"
        ) from error
    return UsbTransport.find_all_adb_devices()
