"""Speaks to a device's adbd itself, over TCP or USB, without an adb server between.

Connections, keys and the shape of packets come from the library adb-shell. Its own device class
stays aside: it knows only the services of adb version 1 (no exit code, stderr merged, sizes of
32 bits, checksums summed up in Python), stores whatever a device sends, and takes a half written
packet for a whole one. Everything here runs over one service, `shell,v2,raw:` (Android 7 and
later): files are moved by `dd` on the device, so an offset costs nothing and errors have a code.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import struct
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from adb_shell import constants
from adb_shell.adb_message import AdbMessage
from adb_shell.auth.keygen import keygen, write_public_keyfile
from adb_shell.auth.sign_cryptography import CryptographySigner
from adb_shell.exceptions import TcpTimeoutException
from adb_shell.transport.base_transport import BaseTransport
from adb_shell.transport.tcp_transport import TcpTransport

from device_tests.errors import (
    CommandFailed,
    CommandTimeout,
    DeviceGone,
    DeviceNotFound,
    DeviceUnauthorized,
    ProtocolError,
    StorageFull,
)
from device_tests.transport import Kind, Progress, RemoteStat, ShellResult
from quantize.errors import DeviceError

VERSION_WITHOUT_CHECKSUM = 0x01000001
"""From this protocol version on no side computes or checks a checksum (adb's protocol.txt)."""
MAX_PACKET_BYTES = 1024 * 1024
"""What we announce and accept as one packet's data, as adb does."""
MIN_PACKET_BYTES = 4096
"""The least a device may announce (adb's first versions)."""
MAX_OUTPUT_BYTES = 64 * 1024 * 1024
"""What `shell` takes of a command's output; more belongs into a file and through `pull`."""
BLOCK_BYTES = 1024 * 1024
"""Block of `dd` where the offset allows it."""
MIN_BLOCK_BYTES = 4096
MAX_HELD_BYTES = 4 * MAX_PACKET_BYTES
"""What a device may send while we write."""
STALL_S = 30.0
"""A push or pull that moves no byte for so long is given up as DeviceGone."""
CONNECT_TIMEOUT_S = 10.0
AUTHORISATION_TIMEOUT_S = 120.0
"""How long a person may take to press "Allow" on the device."""
_RETRY_EVERY_S = 0.3
_CLOSE_S = 1.0
_USB_ATTEMPTS = 3
_NOTHING_THERE = 66
_STAT = re.compile(rb"(\d{1,19}) ([0-9a-f]{1,8}) (-?\d{1,19})")
_STLS = int.from_bytes(b"STLS", "little")

OnAuthorisation = Callable[[str], None]
"""Called with a sentence for the person before we wait for the person at the device."""


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
        lambda: _Tcp(host, port),
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
        lambda: _find_usb(chosen),
        key_folder=key_folder,
        timeout_s=timeout_s,
        authorisation_timeout_s=authorisation_timeout_s,
        on_authorisation_needed=on_authorisation_needed,
    )


def list_usb() -> list[str]:
    """The serial numbers of devices with USB debugging on this machine's USB.

    Raises DeviceError if libusb is missing or this user may not open a device.
    """
    usb = _usb_transport()
    with _usb_errors("USB"):
        return sorted({device.serial_number for device in usb.find_all_adb_devices()})


class DirectTransport:
    """A device by a connection of our own; see `device_tests.transport.Transport`.

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
        self._link: _Link | None = None
        with self._lock:
            self._link = self._connected(timeout_s)

    def shell(self, command: str, *, timeout_s: float = 30.0) -> ShellResult:
        """Run `command` by the device's shell and wait for its end, with no input."""
        deadline = _Deadline(timeout_s)
        try:
            with self._call() as link:
                return _run(link, command, deadline)
        except _NotOpened as error:
            raise DeviceGone(
                f"{self.serial} did not begin a command within {timeout_s:g} s: check the cable or "
                "the network and that the device is on"
            ) from error
        except _TimedOut as error:
            raise CommandTimeout(
                f"{_shortened(command)} did not end within {timeout_s:g} s on {self.serial}: it "
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
            stream = _Stream(link, _service(link, command), _Deadline(self._stall_s))
            stream.write(_CLOSE_STDIN, _Deadline(self._stall_s))
            for channel, data in _pieces(stream, reply, lambda: _Deadline(self._stall_s)):
                if channel == _STDERR:
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
            stream.close(_Deadline(self._stall_s))
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
        with _Forwarder(lambda: self._connected(self._timeout_s), remote) as forwarder:
            yield forwarder.port

    def reconnect(self, timeout_s: float) -> None:
        """Wait until the same device answers again."""
        deadline = _Deadline(timeout_s)
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
        link: _Link,
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
        stream = _Stream(link, _service(link, command), _Deadline(stall_s))
        left = part
        while left:
            data = _read_source(source, min(left, link.max_packet_bytes - _FRAME.size), left)
            frame = _FRAME.pack(_STDIN, len(data)) + data
            if not stream.write(frame, _Deadline(stall_s)):
                break  # dd ended early; it says why below
            left -= len(data)
            if progress is not None:
                progress(moved + part - left)
        stream.write(_CLOSE_STDIN, _Deadline(stall_s))
        said = bytearray()
        for _, data in _pieces(stream, reply, lambda: _Deadline(stall_s)):
            _collect(said, data)
        stream.close(_Deadline(stall_s))
        _check_dd(reply.exit_code, bytes(said), f"{remote} cannot be written", self.serial)
        if left:
            raise ProtocolError(
                f"{self.serial} says {remote} is written but took {part - left} of {part} bytes: "
                "push it again"
            )

    @contextmanager
    def _call(self) -> Iterator[_Link]:
        """The connection for one call; one that breaks off in it is closed."""
        with self._lock:
            self._refuse_closed()
            if self._link is None:
                self._link = self._connected(self._timeout_s)
            try:
                yield self._link
            except (CommandFailed, StorageFull, _Outlasted):
                raise  # the device answered in order
            except BaseException:
                self._drop()
                raise

    @contextmanager
    def _moving(self, what: str) -> Iterator[_Link]:
        try:
            with self._call() as link:
                yield link
        except _TimedOut as error:
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

    def _connected(self, timeout_s: float) -> _Link:
        for _ in range(_USB_ATTEMPTS - 1 if self.kind == "usb" else 0):
            # Over USB the rest of a packet of an earlier connection may still come first.
            with contextlib.suppress(ProtocolError, DeviceGone):
                return self._connect_once(timeout_s)
        return self._connect_once(timeout_s)

    def _connect_once(self, timeout_s: float) -> _Link:
        link = _Link(self._connector(), self.serial)
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
        except _TimedOut as error:
            link.close()
            raise DeviceGone(
                f"{self.serial} did not answer within {timeout_s:g} s: check that adb debugging is "
                "on and that no other program holds the device"
            ) from error
        except BaseException:
            link.close()
            raise
        return link


# --- the shell's reply -------------------------------------------------------------------------

_STDIN, _STDOUT, _STDERR, _EXIT, _CLOSE = range(5)
_FRAME = struct.Struct("<BI")
_CLOSE_STDIN = _FRAME.pack(_CLOSE, 0)


class ShellReply:
    """Takes a `shell,v2` reply apart: frames of channel, length (32 bits), data.

    Data is handed on as it comes, so a frame's announced length costs no memory.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._header = bytearray()
        self._channel = -1
        self._left = 0

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
        """Yield (1 stdout or 2 stderr, piece); raises ProtocolError. Read it to its end."""
        view = memoryview(data)
        while len(view):
            if self.exit_code is not None:
                raise ProtocolError(
                    f"the shell's reply goes on ({len(view)} bytes) after the exit code: the "
                    "device's adbd is not understood"
                )
            if not self._left:
                missing = _FRAME.size - len(self._header)
                self._header += view[:missing]
                view = view[missing:]
                if len(self._header) < _FRAME.size:
                    return
                self._channel, self._left = _FRAME.unpack(self._header)
                self._header.clear()
                if self._channel not in (_STDOUT, _STDERR, _EXIT) or (
                    self._channel == _EXIT and self._left != 1
                ):
                    raise ProtocolError(
                        f"the shell's reply has a frame {self._channel} of {self._left} bytes, "
                        "which no adbd sends: the connection is damaged, repeat the call"
                    )
                continue
            piece = view[: self._left]
            view = view[self._left :]
            self._left -= len(piece)
            if self._channel == _EXIT:
                self.exit_code = piece[0]
            else:
                yield self._channel, piece


def parse_stat(stdout: bytes) -> RemoteStat:
    """Read what `stat -c '%s %f %Y'` printed; raises ProtocolError."""
    found = _STAT.fullmatch(stdout.strip())
    if found is None:
        raise ProtocolError(
            f"stat on the device printed {stdout[:80]!r}, not a size, a mode and a time: its stat "
            "command is not understood"
        )
    size, mode, modified = found.groups()
    return RemoteStat(int(size), int(mode, 16), int(modified))


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


def _service(link: _Link, command: str) -> bytes:
    try:
        service = b"shell,v2,raw:" + command.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise CommandFailed(f"{_shortened(command)} cannot be written as UTF-8") from error
    if b"\0" in service:
        raise CommandFailed(f"{_shortened(command)} has a null character: no shell can run it")
    if len(service) >= link.max_packet_bytes:
        raise CommandFailed(
            f"a command of {len(service)} bytes is longer than the {link.max_packet_bytes} that "
            f"{link.serial} takes: push it as a file and run that"
        )
    return service


def _run(link: _Link, command: str, deadline: _Deadline) -> ShellResult:
    reply = ShellReply()
    outputs = {_STDOUT: bytearray(), _STDERR: bytearray()}
    stream = _Stream(link, _service(link, command), deadline)
    try:
        stream.write(_CLOSE_STDIN, deadline)
        for channel, data in _pieces(stream, reply, lambda: deadline):
            _collect(outputs[channel], data)
    except _TimedOut as error:
        if not link.is_whole:
            raise
        stream.close(_Deadline(_CLOSE_S))
        raise _Outlasted from error
    stream.close(_Deadline(_CLOSE_S))
    assert reply.exit_code is not None  # _pieces ends with it or raises
    return ShellResult(reply.exit_code, bytes(outputs[_STDOUT]), bytes(outputs[_STDERR]))


def _pieces(
    stream: _Stream, reply: ShellReply, deadline: Callable[[], _Deadline]
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
    return _shortened(lines[0].strip()) if lines else "no reason given"


def _shortened(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"


def _identity_text(properties: dict[str, str]) -> str:
    return _shortened(properties.get("ro.product.model", str(properties)))


# --- packets and streams -----------------------------------------------------------------------

_HEADER = struct.Struct("<6I")


def _checksum(data: bytes) -> int:
    """The sum of the bytes, which adbd checked up to Android 8; numpy is 50 times sum()."""
    return int(np.frombuffer(data, np.uint8).sum(dtype=np.uint64)) & 0xFFFFFFFF


class _TimedOut(Exception):
    """Nothing came, or nothing went out, until the deadline; callers say what that means."""


class _NotOpened(_TimedOut):
    """Not even the opening of a stream was answered: it is the device that is silent."""


class _Outlasted(_TimedOut):
    """Only the command went on too long; its stream was closed and the connection is whole."""


class _Deadline:
    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    def left_s(self) -> float:
        return self._at - time.monotonic()

    def with_grace(self) -> _Deadline:
        """For the rest of a packet that has begun: breaking off there costs the connection."""
        return self if self.left_s() > _CLOSE_S else _Deadline(_CLOSE_S)

    def wait_s(self) -> float:
        """What is left for one wait; never 0, which libusb takes for without end."""
        left = self.left_s()
        if left <= 0:
            raise _TimedOut
        return max(left, 0.001)


@dataclass(frozen=True)
class _Packet:
    command: bytes
    arg0: int
    arg1: int
    data: bytes


class _Link:
    """One connection to an adbd: whole packets out and in."""

    def __init__(self, transport: BaseTransport, serial: str) -> None:
        self.serial = serial
        self.max_packet_bytes = MIN_PACKET_BYTES
        self._transport = transport
        # Until versions are known ours carry a checksum, as adb's do, and those of the device are
        # not checked: today's adbd leaves it out of its very first packet.
        self._checksums_out, self._checksums_in = True, False
        self.is_whole = True
        """False while a packet is under way, and for good if it broke off there."""
        self._last_id = 0
        self._send_lock = threading.Lock()

    def connect(
        self,
        timeout_s: float,
        key_folder: Path,
        authorisation_timeout_s: float,
        on_authorisation_needed: OnAuthorisation | None,
    ) -> bytes:
        """Connect, greet, prove who we are; returns the device's banner."""
        deadline = _Deadline(timeout_s)
        with self._translated():
            self._transport.connect(deadline.wait_s())
        banner = b"host::features=shell_v2,cmd\0"
        self.send(constants.CNXN, VERSION_WITHOUT_CHECKSUM, MAX_PACKET_BYTES, banner, deadline)
        packet = self._greeting(deadline)
        if packet.command == constants.AUTH:
            packet = self._authorise(
                packet, deadline, key_folder, authorisation_timeout_s, on_authorisation_needed
            )
        if packet.arg1 < MIN_PACKET_BYTES:
            raise ProtocolError(
                f"{self.serial} announces packets of {packet.arg1} bytes, at least "
                f"{MIN_PACKET_BYTES} are possible: what answers is not an adbd"
            )
        self._checksums_out = self._checksums_in = packet.arg0 < VERSION_WITHOUT_CHECKSUM
        self.max_packet_bytes = min(packet.arg1, MAX_PACKET_BYTES)
        return packet.data

    def close(self) -> None:
        with contextlib.suppress(Exception):  # a broken connection may refuse even that
            self._transport.close()

    def next_id(self) -> int:
        self._last_id = self._last_id % 0xFFFFFFFF + 1
        return self._last_id

    def send(self, command: bytes, arg0: int, arg1: int, data: bytes, deadline: _Deadline) -> None:
        message = AdbMessage(command, arg0, arg1)
        total = _checksum(data) if self._checksums_out else 0
        header = _HEADER.pack(message.command, arg0, arg1, len(data), total, message.magic)
        with self._send_lock:  # header and data are two writes, as USB wants it
            deadline.wait_s()
            self.is_whole = False
            self._write(header, deadline)
            if data:
                self._write(data, deadline.with_grace())
            self.is_whole = True

    def receive(self, deadline: _Deadline) -> _Packet:
        header = self._read(_HEADER.size, deadline)
        number, arg0, arg1, length, total, magic = _HEADER.unpack(header)
        if number == _STLS:
            raise DeviceUnauthorized(
                f"{self.serial} wants an encrypted connection (wireless debugging): pair it with "
                "adb pair, adb connect and use it through the adb server, or use USB"
            )
        command = constants.WIRE_TO_ID.get(number)
        if command is None or number ^ 0xFFFFFFFF != magic or length > MAX_PACKET_BYTES:
            raise ProtocolError(
                f"{self.serial} sent a packet that adb does not know (header {header.hex()}): "
                "what answers is no adbd, or the connection is damaged"
            )
        data = self._read(length, deadline.with_grace()) if length else b""
        self.is_whole = True
        if self._checksums_in and _checksum(data) != total:
            raise ProtocolError(
                f"{self.serial} sent a packet with a wrong checksum: the connection is damaged, "
                "repeat the call"
            )
        return _Packet(command, arg0, arg1, data)

    def _greeting(self, deadline: _Deadline) -> _Packet:
        """The next CNXN or AUTH; leftovers of an earlier connection (USB) are passed over."""
        while True:
            packet = self.receive(deadline)
            if packet.command in (constants.CNXN, constants.AUTH):
                return packet

    def _authorise(
        self,
        packet: _Packet,
        deadline: _Deadline,
        key_folder: Path,
        authorisation_timeout_s: float,
        on_authorisation_needed: OnAuthorisation | None,
    ) -> _Packet:
        key = load_key(key_folder)
        if packet.arg0 != constants.AUTH_TOKEN or len(packet.data) != 20:
            raise ProtocolError(
                f"{self.serial} asks for authorisation in a way that adb does not know (kind "
                f"{packet.arg0}, {len(packet.data)} bytes): what answers is no adbd"
            )
        signature = key.Sign(packet.data)
        self.send(constants.AUTH, constants.AUTH_SIGNATURE, 0, signature, deadline)
        packet = self._greeting(deadline)
        if packet.command == constants.CNXN:
            return packet
        what_to_do = (
            'look at the device\'s screen and press "Allow" under "Allow USB debugging?" (the key '
            f"is {key_folder / 'adbkey'})"
        )
        if on_authorisation_needed is not None:
            on_authorisation_needed(
                f"{self.serial} does not know this machine yet: {what_to_do}; waiting up to "
                f"{authorisation_timeout_s:g} s"
            )
        public = key.GetPublicKey() + b"\0"
        self.send(constants.AUTH, constants.AUTH_RSAPUBLICKEY, 0, public, deadline)
        try:
            packet = self._greeting(_Deadline(authorisation_timeout_s))
            if packet.command == constants.CNXN:
                return packet
            answer = "refused the key"
        except _TimedOut:
            answer = f"gave no answer within {authorisation_timeout_s:g} s"
        except DeviceGone:
            answer = "closed the connection"
        raise DeviceUnauthorized(
            f"{self.serial} does not trust this machine and {answer}: connect again, then "
            f"{what_to_do}"
        )

    def _read(self, count: int, deadline: _Deadline) -> bytes:
        pieces = []
        while count:
            with self._translated():
                piece = self._transport.bulk_read(count, deadline.wait_s())
            if len(piece) > count:
                raise ProtocolError(f"{self.serial} sent more than was asked for: connect again")
            self.is_whole = False
            pieces.append(piece)
            count -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _write(self, data: bytes, deadline: _Deadline) -> None:
        view = memoryview(data)
        while len(view):
            with self._translated():
                # adb-shell sends what fits and says how much that was
                sent = self._transport.bulk_write(view, deadline.wait_s())
            view = view[sent:]

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Every error of sockets, adb-shell and libusb as one of ours."""
        try:
            yield
        except (DeviceError, _TimedOut):
            raise
        except (TcpTimeoutException, TimeoutError) as error:
            raise _TimedOut from error
        except Exception as error:
            if _is_usb_timeout(error):
                raise _TimedOut from error
            busy = _usb_sentence(error, self.serial)
            if busy is not None:
                raise DeviceError(busy) from error
            raise DeviceGone(
                f"the connection to {self.serial} is broken ({type(error).__name__}: "
                f"{_shortened(str(error))}): check the cable or the network and that the device "
                "is on"
            ) from error


class _Stream:
    """One service of a device over a link; packets of other, earlier streams are passed over.

    What comes while we write is held until it is read. By the protocol that is one packet; adbd
    sends some more without waiting when the command stopped reading, so there is a bound in bytes.
    """

    def __init__(self, link: _Link, service: bytes, deadline: _Deadline) -> None:
        self.link = link
        self._local = link.next_id()
        self._remote = 0
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._closed = False
        link.send(constants.OPEN, self._local, 0, service + b"\0", deadline)
        try:
            packet = self._next(deadline)
        except _TimedOut as error:
            raise _NotOpened from error
        if packet.command == constants.CLSE:
            self._closed = True
            raise ServiceRefused(
                f"{link.serial} does not offer {service[:60].decode('utf-8', 'replace')!r}: check "
                "that it is there on the device"
            )
        if packet.command != constants.OKAY or not packet.arg0:
            raise ProtocolError(
                f"{link.serial} answered {packet.command.decode()} where a stream was to be "
                "opened: the connection is damaged, repeat the call"
            )
        self._remote = packet.arg0

    def write(self, data: bytes, deadline: _Deadline) -> bool:
        """Send one packet and wait until it was taken; False if the device closed the stream."""
        if self._closed:
            return False
        self.link.send(constants.WRTE, self._local, self._remote, data, deadline)
        while True:
            packet = self._next(deadline)
            if packet.command == constants.OKAY:
                return True
            if packet.command == constants.CLSE:
                self._closed = True
                return False
            self._hold(packet)

    def read(self, deadline: _Deadline) -> bytes | None:
        """The next packet's data, or None if the device closed the stream."""
        while not self._held and not self._closed:
            packet = self._next(deadline)
            if packet.command == constants.CLSE:
                self._closed = True
            elif packet.command == constants.WRTE:
                self._hold(packet)
        if not self._held:
            return None
        data = self._held.popleft()
        self._held_bytes -= len(data) + _HEADER.size
        if not self._closed:
            self.link.send(constants.OKAY, self._local, self._remote, b"", deadline)
        return data

    def close(self, deadline: _Deadline) -> None:
        """Say that we are done; the device's answer to it is passed over by the next stream."""
        self._closed = True
        self.link.send(constants.CLSE, self._local, self._remote, b"", deadline)

    def _hold(self, packet: _Packet) -> None:
        self._held.append(packet.data)
        self._held_bytes += len(packet.data) + _HEADER.size
        if self._held_bytes > MAX_HELD_BYTES:
            raise ProtocolError(
                f"{self.link.serial} sends on without waiting for us ({self._held_bytes} bytes): "
                "the connection is damaged, repeat the call"
            )

    def _next(self, deadline: _Deadline) -> _Packet:
        """The next packet for this stream: OKAY, WRTE or CLSE."""
        while True:
            deadline.wait_s()
            packet = self.link.receive(deadline)
            if packet.command in (constants.CNXN, constants.AUTH):
                raise DeviceGone(
                    f"{self.link.serial} began the connection anew: it was restarted, go on"
                )
            if packet.command not in (constants.OKAY, constants.WRTE, constants.CLSE):
                continue
            if packet.arg1 == self._local and (
                packet.arg0 == self._remote
                or not self._remote
                or (packet.command == constants.CLSE and not packet.arg0)
            ):
                return packet


class ServiceRefused(DeviceError):
    """The device does not offer a service, such as a port nobody listens on."""


# --- ports -------------------------------------------------------------------------------------


class _Forwarder(AbstractContextManager["_Forwarder"]):
    """A listener on loopback; each connection gets a link and a stream of its own."""

    def __init__(self, connected: Callable[[], _Link], remote: str) -> None:
        self._connected = connected
        self._service = remote.encode("utf-8", "replace")
        self._open: set[socket.socket | _Link] = set()
        self._lock = threading.Lock()
        self._ended = False
        try:
            self._listener = socket.create_server(("127.0.0.1", 0))
        except OSError as error:
            raise DeviceError(f"no local port is to be had ({error}): close other programs") from (
                error
            )
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ended = True
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
            self._listener.close()
            for end in list(self._open):
                _shut(end)
        self._thread.join(timeout=5)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _keep(self, end: socket.socket | _Link) -> bool:
        with self._lock:
            if self._ended:
                _shut(end)
                return False
            self._open.add(end)
            return True

    def _carry(self, client: socket.socket) -> None:
        """Both directions of one connection. An error can only be told by closing it."""
        ends: list[socket.socket | _Link] = [client]
        try:
            if not self._keep(client):
                return
            link = self._connected()
            ends.append(link)
            if not self._keep(link):
                return
            stream = _DuplexStream(link, self._service)
            sender = threading.Thread(target=stream.send_all, args=(client,), daemon=True)
            sender.start()
            stream.receive_all(client)
        except (DeviceError, _TimedOut, OSError):
            return
        finally:
            for end in ends:
                _shut(end)
            with self._lock:
                self._open.difference_update(ends)


class _DuplexStream(_Stream):
    """A stream of which one thread reads while another writes."""

    _FOREVER_S = 7 * 24 * 3600.0

    def __init__(self, link: _Link, service: bytes) -> None:
        super().__init__(link, service, _Deadline(CONNECT_TIMEOUT_S))
        self._taken = threading.Semaphore(0)
        self._stop = False

    def send_all(self, client: socket.socket) -> None:
        """Local to device, until the local end closes; then the stream is closed as adb does."""
        deadline = _Deadline(self._FOREVER_S)
        with contextlib.suppress(DeviceError, _TimedOut, OSError):
            while data := client.recv(min(65536, self.link.max_packet_bytes)):
                self.link.send(constants.WRTE, self._local, self._remote, data, deadline)
                self._taken.acquire()
                if self._stop:
                    return
            self.close(deadline)
        _shut(client)

    def receive_all(self, client: socket.socket) -> None:
        """Device to local, until the device closes."""
        deadline = _Deadline(self._FOREVER_S)
        try:
            while True:
                packet = self._next(deadline)
                if packet.command == constants.CLSE:
                    return
                if packet.command == constants.OKAY:
                    self._taken.release()
                    continue
                client.sendall(packet.data)
                self.link.send(constants.OKAY, self._local, self._remote, b"", deadline)
        finally:
            self._stop = True
            self._taken.release()


def _shut(end: socket.socket | _Link) -> None:
    if isinstance(end, _Link):
        end.close()
        return
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


# --- TCP, USB, keys ----------------------------------------------------------------------------


class _Tcp(TcpTransport):
    """adb-shell's TCP, which tells the end of the connection from silence and never batches."""

    def connect(self, transport_timeout_s: float | None) -> None:
        super().connect(transport_timeout_s)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def bulk_read(self, numbytes: int, transport_timeout_s: float | None) -> bytes:
        data = super().bulk_read(numbytes, transport_timeout_s)
        if not data:
            raise ConnectionResetError("the other side closed it")
        return data


def load_key(folder: Path) -> CryptographySigner:
    """The user's adb key from `folder`, made (mode 600) if there is none; DeviceUnauthorized."""
    private = folder / "adbkey"
    try:
        if not private.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Made aside, then linked: of two programs that do it at once one key stays.
            with tempfile.TemporaryDirectory(prefix=".adbkey-", dir=folder) as aside:
                new = Path(aside, "adbkey")
                keygen(str(new))
                new.chmod(0o600)
                with contextlib.suppress(FileExistsError):
                    os.link(new, private)
        if not private.with_suffix(".pub").exists():
            write_public_keyfile(str(private), str(private.with_suffix(".pub")))
        return CryptographySigner(str(private))
    except (OSError, ValueError, TypeError, AssertionError) as error:
        raise DeviceUnauthorized(
            f"the adb key {private} cannot be used ({error}): repair or remove it; adb makes a "
            "new one"
        ) from error


def _usb_transport() -> type:
    """adb-shell's USB transport; importing it loads libusb."""
    try:
        from adb_shell.transport.usb_transport import UsbTransport
    except Exception as error:  # ImportError, OSError, or libusb's own when it cannot start
        raise DeviceError(
            f"direct USB needs the library libusb-1.0, which is not to be had here ({error}): "
            "install it (Debian: libusb-1.0-0) or use the device through the adb server"
        ) from error
    return UsbTransport


def _find_usb(serial: str) -> BaseTransport:
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


@contextmanager
def _usb_errors(serial: str) -> Iterator[None]:
    try:
        yield
    except DeviceError:
        raise
    except Exception as error:
        raise DeviceError(
            _usb_sentence(error, serial)
            or f"{serial} cannot be looked at ({type(error).__name__}: {error}): plug it in again"
        ) from error


def _is_usb_timeout(error: Exception) -> bool:
    return any(type(cause).__name__ == "USBErrorTimeout" for cause in (error, *error.args))


def _usb_sentence(error: Exception, serial: str) -> str | None:
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
