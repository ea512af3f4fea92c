"""The way to a device's adbd itself, over TCP or USB, without an adb server between.

USB, keys and the shape of packets come from the library adb-shell. Its own device class stays
aside: it knows only the services of adb version 1 (no exit code, stderr merged, sizes of 32 bits,
checksums summed up in Python), stores whatever a device sends, and takes a half written packet for
a whole one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from adb_shell.transport.base_transport import BaseTransport

from device_tests.adb.cable import Tcp, find_usb, list_usb
from device_tests.adb.faults import excerpt
from device_tests.adb.link import Authorisation, DuplexStream, Link, Stream
from device_tests.adb.opener import ByteStream, Deadline, Kind, TimedOut, check_length
from device_tests.adb.transport import Transport, opened
from device_tests.errors import DeviceGone, DeviceNotFound, ProtocolError
from quantize.errors import DeviceError

__all__ = ["DirectOpener", "list_usb", "open_tcp", "open_usb"]

CONNECT_TIMEOUT_S = 10.0
_USB_ATTEMPTS = 3
_NO_KEY = Authorisation()


def open_tcp(
    host: str,
    port: int,
    *,
    timeout_s: float = CONNECT_TIMEOUT_S,
    authorisation: Authorisation = _NO_KEY,
) -> Transport:
    """Connect to the adbd that listens at `host`:`port`.

    Raises DeviceGone, DeviceUnauthorized, ProtocolError.
    """
    serial = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return opened(DirectOpener(serial, "tcp", lambda: Tcp(host, port), timeout_s, authorisation))


def open_usb(
    serial: str | None = None,
    *,
    timeout_s: float = CONNECT_TIMEOUT_S,
    authorisation: Authorisation = _NO_KEY,
) -> Transport:
    """Connect to the device with this serial number, or to the only one, over USB.

    Raises DeviceNotFound (none, or several and no serial), DeviceUnauthorized, DeviceError if the
    interface is not to be had (libusb, permission, an adb server that holds it).
    """
    if serial is None:
        serials = list_usb()
        if len(serials) != 1:
            found = f"{len(serials)} ({', '.join(serials)})" if serials else "none"
            raise DeviceNotFound(
                f"one device with USB debugging was expected on USB and {found} found: plug one "
                "in and switch USB debugging on, or name its serial number"
            )
        serial = serials[0]
    chosen = serial
    return opened(DirectOpener(chosen, "usb", lambda: find_usb(chosen), timeout_s, authorisation))


class DirectOpener:
    """A device by a connection of our own, which carries one stream at a time.

    Other threads wait for it. A stream that breaks off closes the connection, the next one opens
    it again.
    """

    parallel_streams = 1

    def __init__(
        self,
        serial: str,
        kind: Kind,
        connector: Callable[[], BaseTransport],
        timeout_s: float = CONNECT_TIMEOUT_S,
        authorisation: Authorisation = _NO_KEY,
    ) -> None:
        self.serial = serial
        self.kind = kind
        self._connector = connector
        self._timeout_s = timeout_s
        self._authorisation = authorisation
        self._lock = threading.Lock()
        self._identity: dict[str, str] | None = None
        self._features: frozenset[str] = frozenset()
        self._link: Link | None = None

    def features(self) -> frozenset[str]:
        with self._lock:
            self._linked()
            return self._features

    @contextmanager
    def open(self, service: bytes, deadline: Deadline) -> Iterator[ByteStream]:
        with self._lock:
            link = self._linked()
            check_length(service, link.max_packet_bytes - 1, self.serial)
            keep = False
            try:
                stream = Stream(link, service, deadline)
                try:
                    yield stream
                    stream.close()
                    keep = True
                except TimedOut:
                    # Opening another connection would end what else goes on over USB.
                    keep = stream.closes_in_order()
                    raise
            finally:
                if not keep:
                    self._drop()

    def open_apart(self, service: bytes, deadline: Deadline) -> ByteStream:
        link = self._connected(min(self._timeout_s, deadline.left_s()))
        try:
            return DuplexStream(link, service, deadline)
        except BaseException:
            link.close()
            raise

    def reconnect(self, timeout_s: float) -> None:
        with self._lock:
            self._drop()
            self._link = self._connected(min(timeout_s, self._timeout_s))

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _linked(self) -> Link:
        if self._link is None:
            self._link = self._connected(self._timeout_s)
        return self._link

    def _drop(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def _connected(self, timeout_s: float) -> Link:
        for _ in range(_USB_ATTEMPTS - 1 if self.kind == "usb" else 0):
            # Over USB the rest of a packet of an earlier connection may still come first.
            with contextlib.suppress(ProtocolError, DeviceGone):
                return self._connect_once(timeout_s)
        return self._connect_once(timeout_s)

    def _connect_once(self, timeout_s: float) -> Link:
        link = Link(self._connector(), self.serial)
        try:
            properties, self._features = parse_banner(link.connect(timeout_s, self._authorisation))
            if self._identity is None:
                self._identity = properties
            elif self._identity != properties:
                raise DeviceGone(
                    f"another device answers as {self.serial} ({_identity_text(properties)}, "
                    f"before {_identity_text(self._identity)}): connect the first one again"
                )
        except BaseException as error:
            link.close()
            if not isinstance(error, TimedOut):
                raise
            raise DeviceGone(
                f"{self.serial} did not answer within {timeout_s:g} s: check that adb debugging is "
                "on and that no other program holds the device"
            ) from error
        return link


def parse_banner(banner: bytes) -> tuple[dict[str, str], frozenset[str]]:
    """Split a device's greeting, `device::key=value;…;features=a,b`, into properties, features.

    Raises ProtocolError if it is no device's; DeviceError if it is in a state without a shell.
    """
    state, separator, rest = banner.rstrip(b"\0").decode("utf-8", "replace").partition("::")
    if not separator:
        raise ProtocolError(
            f"what answered introduced itself as {banner[:80]!r}, not as an adb device: check "
            "host and port"
        )
    if state != "device":
        raise DeviceError(
            f"the device is in the state {state[:40]!r}, in which nothing can be run: start it "
            "normally"
        )
    properties = {}
    for pair in rest.split(";"):
        key, equals, value = pair.partition("=")
        if equals:
            properties[key] = value
    features = frozenset(properties.pop("features", "").split(","))
    return properties, features


def _identity_text(properties: dict[str, str]) -> str:
    return excerpt(properties.get("ro.product.model", str(properties)))
