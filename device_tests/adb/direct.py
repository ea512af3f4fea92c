"""Speaks to a device's adbd itself, over TCP or USB, without an adb server between.

Connections, keys and the shape of packets come from the library adb-shell. Its own device class
stays aside: it knows only the services of adb version 1 (no exit code, stderr merged, sizes of
32 bits, checksums summed up in Python), stores whatever a device sends, and takes a half written
packet for a whole one. Everything here runs over one service, `shell,v2,raw:` (Android 7 and
later): files are moved by `dd` on the device, so an offset costs nothing and errors have a code.
"""

from __future__ import annotations

import contextlib
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from adb_shell.transport.base_transport import BaseTransport

from device_tests.adb.cable import Tcp, find_usb, list_usb
from device_tests.adb.forward import Forwarder
from device_tests.adb.link import (
    CLOSE_S,
    Deadline,
    Link,
    NotOpened,
    OnAuthorisation,
    Outlasted,
    Stream,
    TimedOut,
    shortened,
)
from device_tests.adb.shell_reply import (
    CLOSE_STDIN,
    FRAME,
    STDERR,
    STDIN,
    STDOUT,
    ShellReply,
    parse_stat,
)
from device_tests.adb.transport import Kind, Progress, RemoteStat, ShellResult
from device_tests.errors import (
    CommandFailed,
    CommandTimeout,
    DeviceGone,
    DeviceNotFound,
    DeviceUnauthorized,
    ProtocolError,
    StorageFull,
)
from quantize.errors import DeviceError

__all__ = ["DirectTransport", "ShellReply", "list_usb", "open_tcp", "open_usb", "parse_stat"]

MAX_OUTPUT_BYTES = 64 * 1024 * 1024
"""What `shell` takes of a command's output; more belongs into a file and through `pull`."""
BLOCK_BYTES = 1024 * 1024
"""Block of `dd` where the offset allows it."""
MIN_BLOCK_BYTES = 4096
STALL_S = 30.0
"""A push or pull that moves no byte for so long is given up as DeviceGone."""
CONNECT_TIMEOUT_S = 10.0
AUTHORISATION_TIMEOUT_S = 120.0
"""How long a person may take to press "Allow" on the device."""
_RETRY_EVERY_S = 0.3
_USB_ATTEMPTS = 3
_NOTHING_THERE = 66


def open_tcp(
    host: str,
    port: int,
    *,
    key_folder: Path | None = None,
    timeout_s: float = CONNECT_TIMEOUT_S,
    authorisation_timeout_s: float = AUTHORISATION_TIMEOUT_S,
    on_authorisation_needed: OnAuthorisation | None = None,
) -> DirectTransport:
    """Connect to the adbd that listens at `host`:`port`.

    `key_folder` holds `adbkey`, the user's `~/.android` if None; it is touched only if the device
    asks for a key. Raises DeviceGone, DeviceUnauthorized, ProtocolError.
    """
    serial = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return DirectTransport(
        serial,
        "tcp",
        lambda: Tcp(host, port),
        key_folder=key_folder,
        timeout_s=timeout_s,
        authorisation_timeout_s=authorisation_timeout_s,
        on_authorisation_needed=on_authorisation_needed,
    )


def open_usb(
    serial: str | None = None,
    *,
    key_folder: Path | None = None,
    timeout_s: float = CONNECT_TIMEOUT_S,
    authorisation_timeout_s: float = AUTHORISATION_TIMEOUT_S,
    on_authorisation_needed: OnAuthorisation | None = None,
) -> DirectTransport:
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
    return DirectTransport(
        chosen,
        "usb",
        lambda: find_usb(chosen),
        key_folder=key_folder,
        timeout_s=timeout_s,
        authorisation_timeout_s=authorisation_timeout_s,
        on_authorisation_needed=on_authorisation_needed,
    )


class DirectTransport:
    """A device by a connection of our own; see `device_tests.adb.transport.Transport`.

    One call at a time: calls of other threads wait. A progress callback must not use the
    transport. A call that breaks off closes the connection, the next call opens it again.
    """

    def __init__(
        self,
        serial: str,
        kind: Kind,
        connector: Callable[[], BaseTransport],
        *,
        key_folder: Path | None = None,
        timeout_s: float = CONNECT_TIMEOUT_S,
        authorisation_timeout_s: float = AUTHORISATION_TIMEOUT_S,
        stall_s: float = STALL_S,
        on_authorisation_needed: OnAuthorisation | None = None,
    ) -> None:
        self.serial = serial
        self.kind: Kind = kind
        self._connector = connector
        self._key_folder = key_folder if key_folder is not None else Path.home() / ".android"
        self._timeout_s = timeout_s
        self._authorisation_timeout_s = authorisation_timeout_s
        self._stall_s = stall_s
        self._on_authorisation_needed = on_authorisation_needed
        self._lock = threading.Lock()
        self._closed = False
        self._identity: dict[str, str] | None = None
        self._link: Link | None = None
        with self._lock:
            self._link = self._connected(timeout_s)

    def shell(self, command: str, *, timeout_s: float = 30.0) -> ShellResult:
        """Run `command` by the device's shell and wait for its end, with no input."""
        deadline = Deadline(timeout_s)
        try:
            with self._call() as link:
                return _run(link, command, deadline)
        except NotOpened as error:
            raise DeviceGone(
                f"{self.serial} did not begin a command within {timeout_s:g} s: check the cable or "
                "the network and that the device is on"
            ) from error
        except TimedOut as error:
            raise CommandTimeout(
                f"{shortened(command)} did not end within {timeout_s:g} s on {self.serial}: it "
                "may still be running there; allow more time or look at the device"
            ) from error

    def push(
        self,
        source: BinaryIO,
        remote: str,
        length: int,
        *,
        offset: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """Write the next `length` bytes of `source` into the file `remote` at `offset`."""
        moved = 0
        with self._moving(f"pushing {remote}") as link:
            while True:
                start = offset + moved
                block = _block_bytes(start)
                part = length - moved
                if block < MIN_BLOCK_BYTES:  # the few bytes up to where larger blocks fit
                    part = min(part, MIN_BLOCK_BYTES - start % MIN_BLOCK_BYTES)
                self._push_range(link, source, remote, start, part, block, moved, progress)
                moved += part
                if moved >= length:
                    return

    def pull(
        self,
        remote: str,
        destination: BinaryIO,
        *,
        offset: int = 0,
        length: int | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Append the bytes of `remote` from `offset` (at most `length`) to `destination`."""
        skip, unwanted = divmod(offset, BLOCK_BYTES)
        command = f"LC_ALL=C dd {shlex.quote('if=' + remote)} bs={BLOCK_BYTES} skip={skip}"
        if length is not None:
            command += f" count={-(-(unwanted + length) // BLOCK_BYTES)}"
        moved = 0
        with self._moving(f"pulling {remote}") as link:
            reply = ShellReply()
            errors = bytearray()
            stream = Stream(link, _service(link, command), Deadline(self._stall_s))
            stream.write(CLOSE_STDIN, Deadline(self._stall_s))
            for channel, data in _pieces(stream, reply, lambda: Deadline(self._stall_s)):
                if channel == STDERR:
                    _collect(errors, data)
                    continue
                if unwanted:
                    data, unwanted = data[unwanted:], max(0, unwanted - len(data))
                if length is not None:
                    data = data[: length - moved]
                if not data:
                    continue
                try:
                    destination.write(data)
                except OSError as error:
                    raise DeviceError(
                        f"what was pulled from {remote} cannot be written here ({error}): make "
                        "room or choose another place"
                    ) from error
                moved += len(data)
                if progress is not None:
                    progress(moved)
            stream.close(Deadline(self._stall_s))
        _check_dd(reply.exit_code, bytes(errors), f"{remote} cannot be read", self.serial)
        return moved

    def stat(self, remote: str) -> RemoteStat | None:
        """Size, mode and time of `remote`, symbolic links followed; None if there is nothing."""
        path = shlex.quote(remote)
        result = self.shell(
            f"[ -e {path} ] || exit {_NOTHING_THERE}; LC_ALL=C stat -L -c '%s %f %Y' -- {path}"
        )
        if result.exit_code == _NOTHING_THERE:
            return None
        if result.exit_code != 0:
            raise CommandFailed(
                f"{remote} cannot be looked at on {self.serial} ({_reason(result.stderr)}): "
                "check the path and its permissions"
            )
        return parse_stat(result.stdout)

    @contextmanager
    def forward(self, remote: str) -> Iterator[int]:
        """A local TCP port on loopback that leads to `remote` on the device.

        Every connection to the port is carried by an adb connection of its own, so this needs TCP.
        """
        if self.kind != "tcp":
            raise DeviceError(
                f"a port of {self.serial} cannot be forwarded over direct USB, which allows one "
                "connection only: start the adb server and use the device through it"
            )
        self._refuse_closed()
        with Forwarder(lambda: self._connected(self._timeout_s), remote) as forwarder:
            yield forwarder.port

    def reconnect(self, timeout_s: float) -> None:
        """Wait until the same device answers again."""
        deadline = Deadline(timeout_s)
        with self._lock:
            self._refuse_closed()
            self._drop()
            while True:
                try:
                    left_s = max(0.1, deadline.left_s())
                    self._link = self._connected(min(left_s, self._timeout_s))
                    return
                except DeviceUnauthorized:
                    raise
                except DeviceError as error:
                    if deadline.left_s() <= _RETRY_EVERY_S or self._closed:
                        raise DeviceGone(
                            f"{self.serial} did not come back within {timeout_s:g} s ({error}): "
                            "check the cable or the network and that the device is on"
                        ) from error
                time.sleep(_RETRY_EVERY_S)

    def close(self) -> None:
        """Give the connection back; calls after it are errors."""
        self._closed = True
        with self._lock:
            self._drop()

    def __enter__(self) -> DirectTransport:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _push_range(
        self,
        link: Link,
        source: BinaryIO,
        remote: str,
        start: int,
        part: int,
        block: int,
        moved: int,
        progress: Progress | None,
    ) -> None:
        """One `dd`, from an offset that is a multiple of its block."""
        stall_s = self._stall_s
        command = (
            f"LC_ALL=C dd {shlex.quote('of=' + remote)} bs={block} seek={start // block} "
            "conv=notrunc"
        )
        reply = ShellReply()
        stream = Stream(link, _service(link, command), Deadline(stall_s))
        left = part
        while left:
            data = _read_source(source, min(left, link.max_packet_bytes - FRAME.size), left)
            frame = FRAME.pack(STDIN, len(data)) + data
            if not stream.write(frame, Deadline(stall_s)):
                break  # dd ended early; it says why below
            left -= len(data)
            if progress is not None:
                progress(moved + part - left)
        stream.write(CLOSE_STDIN, Deadline(stall_s))
        said = bytearray()
        for _, data in _pieces(stream, reply, lambda: Deadline(stall_s)):
            _collect(said, data)
        stream.close(Deadline(stall_s))
        _check_dd(reply.exit_code, bytes(said), f"{remote} cannot be written", self.serial)
        if left:
            raise ProtocolError(
                f"{self.serial} says {remote} is written but took {part - left} of {part} bytes: "
                "push it again"
            )

    @contextmanager
    def _call(self) -> Iterator[Link]:
        """The connection for one call; one that breaks off in it is closed."""
        with self._lock:
            self._refuse_closed()
            if self._link is None:
                self._link = self._connected(self._timeout_s)
            try:
                yield self._link
            except (CommandFailed, StorageFull, Outlasted):
                raise  # the device answered in order
            except BaseException:
                self._drop()
                raise

    @contextmanager
    def _moving(self, what: str) -> Iterator[Link]:
        try:
            with self._call() as link:
                yield link
        except TimedOut as error:
            raise DeviceGone(
                f"{self.serial} moved nothing for {self._stall_s:g} s while {what}: check the "
                "cable or the network and go on"
            ) from error

    def _refuse_closed(self) -> None:
        if self._closed:
            raise DeviceError(f"the connection to {self.serial} was closed: open it again")

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
            banner = link.connect(
                timeout_s,
                self._key_folder,
                self._authorisation_timeout_s,
                self._on_authorisation_needed,
            )
            properties, features = parse_banner(banner)
            if "shell_v2" not in features:
                raise DeviceError(
                    f"{self.serial} has no shell with exit codes (feature shell_v2): Android 7 or "
                    "newer is needed"
                )
            if self._identity is None:
                self._identity = properties
            elif self._identity != properties:
                raise DeviceGone(
                    f"another device answers as {self.serial} ({_identity_text(properties)}, "
                    f"before {_identity_text(self._identity)}): connect the first one again"
                )
        except TimedOut as error:
            link.close()
            raise DeviceGone(
                f"{self.serial} did not answer within {timeout_s:g} s: check that adb debugging is "
                "on and that no other program holds the device"
            ) from error
        except BaseException:
            link.close()
            raise
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


def _service(link: Link, command: str) -> bytes:
    try:
        service = b"shell,v2,raw:" + command.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise CommandFailed(f"{shortened(command)} cannot be written as UTF-8") from error
    if b"\0" in service:
        raise CommandFailed(f"{shortened(command)} has a null character: no shell can run it")
    if len(service) >= link.max_packet_bytes:
        raise CommandFailed(
            f"a command of {len(service)} bytes is longer than the {link.max_packet_bytes} that "
            f"{link.serial} takes: push it as a file and run that"
        )
    return service


def _run(link: Link, command: str, deadline: Deadline) -> ShellResult:
    reply = ShellReply()
    outputs = {STDOUT: bytearray(), STDERR: bytearray()}
    stream = Stream(link, _service(link, command), deadline)
    try:
        stream.write(CLOSE_STDIN, deadline)
        for channel, data in _pieces(stream, reply, lambda: deadline):
            _collect(outputs[channel], data)
    except TimedOut as error:
        if not link.is_whole:
            raise
        stream.close(Deadline(CLOSE_S))
        raise Outlasted from error
    stream.close(Deadline(CLOSE_S))
    assert reply.exit_code is not None  # _pieces ends with it or raises
    return ShellResult(reply.exit_code, bytes(outputs[STDOUT]), bytes(outputs[STDERR]))


def _pieces(
    stream: Stream, reply: ShellReply, deadline: Callable[[], Deadline]
) -> Iterator[tuple[int, memoryview]]:
    """Pieces of the reply up to the exit code; a new deadline after each that held something."""
    until = deadline()
    while reply.exit_code is None:
        data = stream.read(until)
        if data is None:
            raise ProtocolError(
                f"{stream.link.serial} closed the shell without an exit code: repeat the call, and "
                "restart the device's adbd if it happens again"
            )
        yield from reply.feed(data)
        if data:
            until = deadline()


def _collect(output: bytearray, data: memoryview) -> None:
    if len(output) + len(data) > MAX_OUTPUT_BYTES:
        raise ProtocolError(
            f"a command printed more than {MAX_OUTPUT_BYTES} bytes: let it write a file and pull "
            "that"
        )
    output += data


def _read_source(source: BinaryIO, count: int, left: int) -> bytes:
    try:
        data = source.read(count)
    except OSError as error:
        raise DeviceError(
            f"what is to be pushed cannot be read ({error}): check the file here"
        ) from error
    if not data:
        raise DeviceError(
            f"what is to be pushed ended {left} bytes early: it was shortened meanwhile, or its "
            "length is wrong"
        )
    return data


def _block_bytes(offset: int) -> int:
    """The largest power of two up to BLOCK_BYTES that divides `offset`, else 1.

    Blocks under MIN_BLOCK_BYTES cost too many system calls to be used for more than a few bytes.
    """
    block = min(offset & -offset, BLOCK_BYTES) if offset else BLOCK_BYTES
    return block if block >= MIN_BLOCK_BYTES else 1


def _check_dd(exit_code: int | None, said: bytes, what: str, serial: str) -> None:
    if exit_code == 0:
        return
    reason = _reason(said)
    if any(word in said for word in (b"No space left", b"quota exceeded", b"ENOSPC")):
        raise StorageFull(
            f"{what} on {serial} ({reason}): make room there, for instance with pocketdiff clean"
        )
    raise CommandFailed(f"{what} on {serial} ({reason}): check the path and its permissions")


def _reason(stderr: bytes) -> str:
    """The line of a failed command's stderr that says why, without dd's statistics."""
    lines = [
        line
        for line in stderr.decode("utf-8", "replace").splitlines()
        if line.strip() and "records " not in line and " copied" not in line
    ]
    return shortened(lines[0].strip()) if lines else "no reason given"


def _identity_text(properties: dict[str, str]) -> str:
    return shortened(properties.get("ro.product.model", str(properties)))
