"""Which device is meant, and by which way it is spoken to.

The ways themselves are `server` (through an adb server) and `direct` (TCP and USB).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from device_tests.adb import server as adb_server
from device_tests.adb.server import DeviceEntry
from device_tests.adb.transport import Transport
from device_tests.errors import DeviceNotFound, DeviceUnauthorized
from quantize.errors import DeviceError

Via = Literal["auto", "server", "direct"]

Say = Callable[[str], None]
"""Takes a sentence for the person while something waits for them."""


def list_devices(*, say: Say | None = None) -> list[DeviceEntry]:
    """What the running adb server knows, or, where none runs, what is on USB. Starts no server.

    `say` gets the reason if USB cannot be looked at.
    """
    if adb_server.server_version() is not None:
        return adb_server.server_devices()
    from device_tests.adb.direct import list_usb

    try:
        return [DeviceEntry(serial, "attached", "usb") for serial in list_usb()]
    except DeviceError as error:
        if say is not None:
            say(str(error))
        return []


def open_device(
    serial: str | None,
    *,
    via: Via = "auto",
    key_folder: Path | None = None,
    say: Say | None = None,
) -> Transport:
    """Connect to `serial`, else to ANDROID_SERIAL, else to the only device there is.

    auto: through the server if one runs and knows the device, else directly; HOST:PORT is reached
    directly unless the server has it already. server: a server is started where none runs.
    `key_folder` and `say` are for direct connections, which may need the person's consent.

    Raises DeviceNotFound (none, or several), DeviceUnauthorized, DeviceGone, DeviceError.
    """
    serial = serial or os.environ.get("ANDROID_SERIAL") or None
    if via == "server":
        adb_server.start_server()
    if serial is None and via != "direct":
        serial = _only_one(say)
    if via == "server" or (via == "auto" and serial is not None and _server_has(serial)):
        return adb_server.open_server(serial or _only_one(say))
    return _open_direct(serial, key_folder, say)


def _only_one(say: Say | None) -> str:
    reasons: list[str] = []
    found = list_devices(say=reasons.append)
    if not found:
        why = f" ({reasons[0]})" if reasons else ""
        raise DeviceNotFound(
            f"no device answers adb{why}; plug one in and switch USB debugging on, or name a "
            "HOST:PORT"
        )
    if len(found) > 1:
        names = ", ".join(f"{entry.serial} ({entry.state})" for entry in found)
        raise DeviceNotFound(
            f"{len(found)} devices answer adb: {names}; choose one by its serial, or set "
            "ANDROID_SERIAL"
        )
    return found[0].serial


def _server_has(serial: str) -> bool:
    """Whether it goes through the server: a device on a cable always if one runs, since the
    server holds the USB interface."""
    if not adb_server.is_network_serial(serial):
        return adb_server.server_version() is not None
    return any(
        device.serial == serial and device.state == "device"
        for device in adb_server.server_devices()
    )


def _open_direct(serial: str | None, key_folder: Path | None, say: Say | None) -> Transport:
    from device_tests.adb.direct import open_tcp, open_usb
    from device_tests.adb.link import Authorisation

    authorisation = Authorisation(key_folder, on_needed=say)
    if serial is not None and adb_server.is_network_serial(serial):
        host, _, port = serial.rpartition(":")
        address = host.removeprefix("[").removesuffix("]")
        return open_tcp(address, int(port), authorisation=authorisation)
    try:
        return open_usb(serial, authorisation=authorisation)
    except DeviceUnauthorized:
        raise
    except DeviceError as error:
        if adb_server.server_version() is None:
            raise
        raise DeviceNotFound(
            f"{serial or 'a device'} cannot be reached over USB directly while an adb server runs "
            f"at {adb_server.server_address()}, which holds the USB interface; go through the "
            f"server, or end it with `adb kill-server` ({error})"
        ) from error
