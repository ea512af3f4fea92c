"""The two ways to a device at a port of loopback, for tests that run over both."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass

import adbutils

from device_tests.adb.direct import open_tcp
from device_tests.adb.link import Authorisation
from device_tests.adb.server import ServerAddress, open_server
from device_tests.adb.transport import STALL_S, Transport


@dataclass(frozen=True)
class Way:
    """Direct, or through the adb server at an address."""

    server: ServerAddress | None = None

    @contextlib.contextmanager
    def open(
        self, port: int, *, stall_s: float = STALL_S, authorisation: Authorisation | None = None
    ) -> Iterator[Transport]:
        """A transport to the device that listens at `port`."""
        if self.server is None:
            known = authorisation or Authorisation()
            with open_tcp("127.0.0.1", port, authorisation=known) as transport:
                transport._stall_s = stall_s
                yield transport
            return
        serial = f"127.0.0.1:{port}"
        try:
            with open_server(serial, self.server) as transport:
                transport._stall_s = stall_s
                yield transport
        finally:
            adbutils.AdbClient(self.server.host, self.server.port).disconnect(serial)


@dataclass
class Device:
    """A connected device and a folder on it that may be written."""

    transport: Transport
    folder: str
    port: int


def push(transport: Transport, data: bytes, remote: str, offset: int = 0) -> None:
    transport.push(io.BytesIO(data), remote, len(data), offset=offset)


def pull(transport: Transport, remote: str, **range_: int) -> bytes:
    taken = io.BytesIO()
    assert transport.pull(remote, taken, **range_) == len(taken.getvalue())
    return taken.getvalue()
