"""The way to a device through an adb server that is already running, or was asked for by name.

Which device to open is decided in `selection`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass
from typing import Literal

import adbutils

from device_tests.adb import faults
from device_tests.adb.cable import Cable, Tcp
from device_tests.adb.faults import excerpt
from device_tests.adb.opener import ByteStream, Deadline, Kind, NotOpened, TimedOut, check_length
from device_tests.adb.transport import Transport, opened
from device_tests.errors import CommandTimeout, DeviceGone, DeviceNotFound, ProtocolError
from quantize.errors import DeviceError

DEFAULT_PORT = 5037
_REQUEST_BYTES = 0xFFFF  # the length of a request is 4 hexadecimal digits
_PIECE_BYTES = 256 * 1024
_ANSWER_S = 30.0
_PROBE_S = 3.0
_SERVER = "the adb server"


@dataclass(frozen=True)
class ServerAddress:
    """Where the adb server listens, or would."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class DeviceEntry:
    """A device that could be chosen: a line of `adb devices -l`, usable in the state `device`
    only; or what is on USB, with the state `attached`."""

    serial: str
    state: str
    via: Literal["server", "usb"]
    model: str = ""


def server_address() -> ServerAddress:
    """Where adb itself would look, from ADB_SERVER_SOCKET and ANDROID_ADB_SERVER_ADDRESS, _PORT.

    Raises ProtocolError for a value that is not an address over TCP.
    """
    host = os.environ.get("ANDROID_ADB_SERVER_ADDRESS") or "127.0.0.1"
    port = os.environ.get("ANDROID_ADB_SERVER_PORT") or str(DEFAULT_PORT)
    if chosen := os.environ.get("ADB_SERVER_SOCKET"):
        found = re.fullmatch(r"tcp:(?:(?P<host>.*):)?(?P<port>\d+)", chosen)
        if found is None:
            raise ProtocolError(
                f"ADB_SERVER_SOCKET is {chosen!r}; only tcp:PORT and tcp:HOST:PORT are understood"
            )
        host, port = found["host"] or "127.0.0.1", found["port"]
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ProtocolError(
            f"the port of the adb server is {port!r}; set it to a number up to 65535"
        )
    return ServerAddress("127.0.0.1" if host == "localhost" else host, int(port))


class _ServerStream:
    """A connection to the server: requests, then the bytes of the service that one opened."""

    best_write_bytes = _PIECE_BYTES

    def __init__(self, address: ServerAddress, serial: str, deadline: Deadline) -> None:
        self._address = address
        self._serial = serial
        self._socket = Tcp(address.host, address.port)
        self._cable = Cable(self._socket, serial)
        try:
            self._cable.connect(deadline)
        except (DeviceGone, TimedOut) as error:
            raise DeviceGone(
                f"the adb server at {address} does not answer any more ({error}); start it again"
            ) from error

    def request(self, request: bytes, deadline: Deadline) -> None:
        """Ask; raises what the server's refusal means."""
        check_length(request, _REQUEST_BYTES, self._serial)
        self._cable.write(b"%04x%s" % (len(request), request), deadline)
        answer = self._exactly(4, deadline)
        if answer == b"FAIL":
            said = self.answer(deadline)
            raise faults.refused_by_server(said, self._serial, str(self._address))
        if answer != b"OKAY":
            raise self._not_understood(answer)

    def answer(self, deadline: Deadline) -> str:
        """The text that follows the reply to a request."""
        digits = self._exactly(4, deadline)
        if not re.fullmatch(rb"[0-9a-fA-F]{4}", digits):
            raise self._not_understood(digits)
        return self._exactly(int(digits, 16), deadline).decode("utf-8", "replace")

    def write(self, data: memoryview | bytes, deadline: Deadline) -> bool:
        try:
            self._cable.write(data, deadline)
        except DeviceGone:
            return False  # what came before the end is still to be read
        return True

    def read(self, deadline: Deadline) -> bytes:
        return self._cable.read(_PIECE_BYTES, deadline)

    def has_input(self) -> bool:
        return self._socket.has_input()

    def close(self) -> None:
        self._cable.close()

    def _exactly(self, count: int, deadline: Deadline) -> bytes:
        data = b""
        while len(data) < count:
            data += self._cable.read(count - len(data), deadline)
        return data

    def _not_understood(self, answer: bytes) -> ProtocolError:
        return ProtocolError(
            f"the adb server at {self._address} answered {answer!r} for {self._serial}, which is "
            "not understood; update adb"
        )


def _ask(address: ServerAddress, request: str, serial: str, timeout_s: float = _ANSWER_S) -> str:
    """The server's answer to one request."""
    deadline = Deadline(timeout_s)
    stream = _ServerStream(address, serial, deadline)
    try:
        stream.request(request.encode(), deadline)
        return stream.answer(deadline)
    except TimedOut as error:
        raise CommandTimeout(
            f"the adb server at {address} did not answer for {serial} in time; look at "
            "`adb devices` and try again"
        ) from error
    finally:
        stream.close()


def server_version(address: ServerAddress | None = None) -> int | None:
    """The protocol version of the running server (41 since 2018), None if none runs.

    Starts nothing. Raises ProtocolError if something else listens there.
    """
    address = address or server_address()
    try:
        _ServerStream(address, _SERVER, Deadline(_PROBE_S)).close()
    except DeviceGone:
        return None
    try:
        return int(_ask(address, "host:version", _SERVER, _PROBE_S), 16)
    except (DeviceError, ValueError):
        raise ProtocolError(
            f"what listens at {address} does not answer as an adb server; set "
            "ANDROID_ADB_SERVER_PORT to the port of yours"
        ) from None


def start_server(address: ServerAddress | None = None) -> None:
    """Start a server where none runs; one of whatever version that runs is left alone.

    Takes the `adb` of the PATH, else the one that comes with adbutils. Raises DeviceNotFound.
    """
    address = address or server_address()
    if server_version(address) is not None:
        return
    program = shutil.which("adb") or adbutils.adb_path()
    with tempfile.TemporaryFile() as said:
        try:
            code = subprocess.run(
                [program, "-L", f"tcp:{address.port}", "start-server"],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                timeout=_ANSWER_S,
                check=False,
            ).returncode
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DeviceNotFound(f"an adb server could not be started: {error}") from error
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
    if code != 0 or server_version(address) is None:
        reason = lines[-1] if lines else f"exit code {code}"
        raise DeviceNotFound(f"an adb server could not be started at {address}: {reason}")


def server_devices(address: ServerAddress | None = None) -> list[DeviceEntry]:
    """What the running server knows, in its order; nothing if none runs."""
    address = address or server_address()
    if server_version(address) is None:
        return []
    lines = _ask(address, "host:devices-l", _SERVER).splitlines()
    return [found for line in lines if (found := _parse_device(line)) is not None]


def _parse_device(line: str) -> DeviceEntry | None:
    """`serial  state key:value …`; a state may have several words (`no permissions …`)."""
    found = re.fullmatch(r"(\S+)\s+(.+?)((?:\s+[a-z_]+:\S*)*)\s*", line)
    if found is None:
        return None
    model = re.search(r"\smodel:(\S+)", found[3])
    return DeviceEntry(found[1], found[2], "server", model[1] if model else "")


def is_network_serial(serial: str) -> bool:
    """Whether a serial is an address, HOST:PORT, and not that of a device on a cable."""
    host, colon, port = serial.rpartition(":")
    return bool(colon and host) and port.isascii() and port.isdigit()


def open_server(serial: str, address: ServerAddress | None = None) -> Transport:
    """The device `serial` through the running server, which is told to connect to a HOST:PORT.

    Raises DeviceNotFound (no server, or it does not know the device), DeviceUnauthorized,
    DeviceGone (offline).
    """
    address = address or server_address()
    if server_version(address) is None:
        raise DeviceNotFound(
            f"no adb server runs at {address}; start one with `adb start-server`, or leave it out "
            "and use the device directly"
        )
    opener = ServerOpener(serial, address)
    opener.reconnect(_ANSWER_S)
    return opened(opener)


class ServerOpener:
    """One device through one server; each stream has a connection of its own."""

    kind: Kind = "server"
    parallel_streams = 2

    def __init__(self, serial: str, address: ServerAddress) -> None:
        self.serial = serial
        self.address = address

    def features(self) -> frozenset[str]:
        request = f"host-serial:{self.serial}:features"
        return frozenset(_ask(self.address, request, self.serial).split(","))

    def open(self, service: bytes, deadline: Deadline) -> AbstractContextManager[ByteStream]:
        return closing(self.open_apart(service, deadline))

    def open_apart(self, service: bytes, deadline: Deadline) -> ByteStream:
        stream = _ServerStream(self.address, self.serial, deadline)
        try:
            stream.request(b"host:transport:" + self.serial.encode(), deadline)
            stream.request(service, deadline)
        except BaseException as error:
            stream.close()
            if isinstance(error, TimedOut):
                raise NotOpened from error
            raise
        return stream

    def reconnect(self, timeout_s: float) -> None:
        if self.state() != "device" and is_network_serial(self.serial):
            self._network_connect(timeout_s)
        self.check(self.state())

    def close(self) -> None:
        """Nothing is held between streams."""

    def state(self) -> str | None:
        """`device`, `offline`, `unauthorized`, …; None if the server does not know the device."""
        states = {device.serial: device.state for device in server_devices(self.address)}
        return states.get(self.serial)

    def check(self, state: str | None) -> None:
        """Raise what a state other than `device` means."""
        if state is None:
            known = ", ".join(device.serial for device in server_devices(self.address)) or "none"
            raise DeviceNotFound(
                f"the adb server at {self.address} knows no device {self.serial!r} (it knows: "
                f"{known}); check the cable and that USB debugging is on"
            )
        if state in ("unauthorized", "authorizing"):
            raise faults.unauthorized(self.serial)
        if state != "device":
            raise DeviceGone(
                f"{self.serial} is {state} for the adb server at {self.address}; pull the cable "
                "and put it back"
            )

    def _network_connect(self, timeout_s: float) -> None:
        """Let the server connect to a HOST:PORT anew."""
        with suppress(DeviceError):  # it may not know the device
            _ask(self.address, f"host:disconnect:{self.serial}", self.serial, timeout_s)
        said = _ask(self.address, f"host:connect:{self.serial}", self.serial, timeout_s)
        if "authenticat" in said:
            raise faults.unauthorized(self.serial)
        if not said.startswith(("connected to", "already connected")):
            raise faults.gone(self.serial, f"the adb server {excerpt(said)}")
