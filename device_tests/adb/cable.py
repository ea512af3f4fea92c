"""What carries the bytes to an adbd: adb-shell's TCP and USB, with libusb's errors explained.

Packets are not known here.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from adb_shell.transport.base_transport import BaseTransport
from adb_shell.transport.tcp_transport import TcpTransport

from device_tests.adb.faults import excerpt
from device_tests.errors import DeviceGone
from quantize.errors import DeviceError


class Tcp(TcpTransport):
    """adb-shell's TCP, which tells the end of the connection from silence and never batches."""

    def connect(self, transport_timeout_s: float | None) -> None:
        super().connect(transport_timeout_s)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def bulk_read(self, numbytes: int, transport_timeout_s: float | None) -> bytes:
        data = super().bulk_read(numbytes, transport_timeout_s)
        if not data:
            raise ConnectionResetError("the other side closed it")
        return data


def list_usb() -> list[str]:
    """The serial numbers of devices with USB debugging on this machine's USB.

    Raises DeviceError if libusb is missing or this user may not open a device.
    """
    usb = _usb_transport()
    with _usb_errors("USB"):
        return sorted({device.serial_number for device in usb.find_all_adb_devices()})


def find_usb(serial: str) -> BaseTransport:
    usb = _usb_transport()
    with _usb_errors(serial):
        devices = list(usb.find_all_adb_devices())
        for device in devices:
            if device.serial_number == serial:
                return device
    raise DeviceGone(
        f"{serial} is not on USB with debugging on: check the cable, unlock it and switch USB "
        "debugging on"
    )


def is_usb_timeout(error: Exception) -> bool:
    return any(type(cause).__name__ == "USBErrorTimeout" for cause in (error, *error.args))


def usb_sentence(error: Exception, serial: str) -> str | None:
    """What a person can do about an error of libusb; None if it says only that it broke."""
    names = {type(cause).__name__ for cause in (error, *error.args)}
    if "USBErrorBusy" in names:
        return (
            f"the USB interface of {serial} is held by another program, most likely the adb "
            "server: stop it with adb kill-server, or use the device through it"
        )
    if "USBErrorAccess" in names:
        return (
            f"this user may not open {serial} on USB: install the udev rules for Android devices "
            "(Debian: android-sdk-platform-tools-common) and plug it in again"
        )
    return None


def _usb_transport() -> type:
    """adb-shell's USB transport; importing it loads libusb."""
    try:
        from adb_shell.transport.usb_transport import UsbTransport
    except Exception as error:  # ImportError, OSError, or libusb's own when it cannot start
        raise DeviceError(
            "direct USB needs the library libusb-1.0, which cannot be loaded here: install it "
            "(Debian: libusb-1.0-0) or use the device through the adb server "
            f"({excerpt(str(error))})"
        ) from error
    return UsbTransport


@contextmanager
def _usb_errors(serial: str) -> Iterator[None]:
    try:
        yield
    except DeviceError:
        raise
    except Exception as error:
        raise DeviceError(
            usb_sentence(error, serial)
            or f"{serial} cannot be looked at ({type(error).__name__}: {error}): plug it in again"
        ) from error
