"""One connection to an adbd: greeting and keys, packets out and in, streams over them.

Keys and the shape of packets come from the library adb-shell; what a stream is for is not known
here. Everything that comes in is bounded, and every error is a `DeviceError` or `TimedOut`.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from adb_shell import constants
from adb_shell.adb_message import AdbMessage
from adb_shell.auth.keygen import keygen, write_public_keyfile
from adb_shell.auth.sign_cryptography import CryptographySigner
from adb_shell.transport.base_transport import BaseTransport

from device_tests.adb import faults
from device_tests.adb.cable import Cable
from device_tests.adb.opener import Deadline, NotOpened, TimedOut
from device_tests.errors import DeviceGone, DeviceUnauthorized, ProtocolError
from quantize.errors import DeviceError

VERSION_WITHOUT_CHECKSUM = 0x01000001
"""From this protocol version on no side computes or checks a checksum (adb's protocol.txt)."""
MAX_PACKET_BYTES = 1024 * 1024
"""What we announce and accept as one packet's data, as adb does."""
MIN_PACKET_BYTES = 4096
"""The least a device may announce (adb's first versions)."""
MAX_HELD_BYTES = 4 * MAX_PACKET_BYTES
"""What a device may send while we write."""
CLOSE_S = 1.0
"""For the rest of a packet that has begun, and to close a stream."""
_STLS = int.from_bytes(b"STLS", "little")
_HEADER = struct.Struct("<6I")


@dataclass(frozen=True)
class Authorisation:
    """What a device gets that asks who we are."""

    key_folder: Path | None = None
    """Holds `adbkey`; the user's `~/.android` if None. Touched only if the device asks."""
    timeout_s: float = 120.0
    """How long the person may take to press "Allow" on the device."""
    on_needed: Callable[[str], None] | None = None
    """Called with a sentence for the person before we wait for them."""


def _checksum(data: bytes | memoryview) -> int:
    """The sum of the bytes, which adbd checked up to Android 8; numpy is 50 times sum()."""
    return int(np.frombuffer(data, np.uint8).sum(dtype=np.uint64)) & 0xFFFFFFFF


@dataclass(frozen=True)
class Packet:
    command: bytes
    arg0: int
    arg1: int
    data: bytes


class Link:
    """One connection to an adbd: whole packets out and in."""

    def __init__(self, transport: BaseTransport, serial: str) -> None:
        self.serial = serial
        self.max_packet_bytes = MIN_PACKET_BYTES
        self._cable = Cable(transport, serial)
        # Until versions are known ours carry a checksum, as adb's do, and those of the device are
        # not checked: today's adbd leaves it out of its very first packet.
        self._checksums_out, self._checksums_in = True, False
        self.is_whole = True
        """False while a packet is under way, and for good if it broke off there."""
        self._last_id = 0
        self._send_lock = threading.Lock()

    def connect(self, timeout_s: float, authorisation: Authorisation) -> bytes:
        """Connect, greet, prove who we are; returns the device's banner."""
        deadline = Deadline(timeout_s)
        self._cable.connect(deadline)
        banner = b"host::features=shell_v2,cmd\0"
        self.send(constants.CNXN, VERSION_WITHOUT_CHECKSUM, MAX_PACKET_BYTES, banner, deadline)
        packet = self._greeting(deadline)
        if packet.command == constants.AUTH:
            packet = self._authorise(packet, deadline, authorisation)
        if packet.arg1 < MIN_PACKET_BYTES:
            raise ProtocolError(
                f"{self.serial} announces packets of {packet.arg1} bytes, at least "
                f"{MIN_PACKET_BYTES} are possible: what answers is not an adbd"
            )
        self._checksums_out = self._checksums_in = packet.arg0 < VERSION_WITHOUT_CHECKSUM
        self.max_packet_bytes = min(packet.arg1, MAX_PACKET_BYTES)
        return packet.data

    def close(self) -> None:
        self._cable.close()

    def next_id(self) -> int:
        self._last_id = self._last_id % 0xFFFFFFFF + 1
        return self._last_id

    def send(
        self, command: bytes, arg0: int, arg1: int, data: bytes | memoryview, deadline: Deadline
    ) -> None:
        message = AdbMessage(command, arg0, arg1)
        total = _checksum(data) if self._checksums_out else 0
        header = _HEADER.pack(message.command, arg0, arg1, len(data), total, message.magic)
        with self._send_lock:  # header and data are two writes, as USB wants it
            deadline.wait_s()
            self.is_whole = False
            self._cable.write(header, deadline)
            if data:
                self._cable.write(data, _with_grace(deadline))
            self.is_whole = True

    def receive(self, deadline: Deadline) -> Packet:
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
        data = self._read(length, _with_grace(deadline)) if length else b""
        self.is_whole = True
        if self._checksums_in and _checksum(data) != total:
            raise ProtocolError(
                f"{self.serial} sent a packet with a wrong checksum: the connection is damaged, "
                "repeat the call"
            )
        return Packet(command, arg0, arg1, data)

    def _greeting(self, deadline: Deadline) -> Packet:
        """The next CNXN or AUTH; leftovers of an earlier connection (USB) are passed over."""
        while True:
            packet = self.receive(deadline)
            if packet.command in (constants.CNXN, constants.AUTH):
                return packet

    def _authorise(
        self, packet: Packet, deadline: Deadline, authorisation: Authorisation
    ) -> Packet:
        folder = authorisation.key_folder or Path.home() / ".android"
        key = load_key(folder)
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
        detail = f" (the key is {folder / 'adbkey'})"
        if authorisation.on_needed is not None:
            authorisation.on_needed(
                f"{faults.unauthorized(self.serial, detail)}; waiting up to "
                f"{authorisation.timeout_s:g} s"
            )
        public = key.GetPublicKey() + b"\0"
        self.send(constants.AUTH, constants.AUTH_RSAPUBLICKEY, 0, public, deadline)
        try:
            packet = self._greeting(Deadline(authorisation.timeout_s))
            if packet.command == constants.CNXN:
                return packet
            answer = "refused the key"
        except TimedOut:
            answer = f"did not answer within {authorisation.timeout_s:g} s"
        except DeviceGone:
            answer = "closed the connection"
        raise faults.unauthorized(self.serial, f" and {answer}{detail}")

    def _read(self, count: int, deadline: Deadline) -> bytes:
        pieces = []
        while count:
            piece = self._cable.read(count, deadline)
            self.is_whole = False
            pieces.append(piece)
            count -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _with_grace(deadline: Deadline) -> Deadline:
    """For the rest of a packet that has begun: breaking off there costs the connection."""
    return deadline if deadline.left_s() > CLOSE_S else Deadline(CLOSE_S)


class Stream:
    """One service of a device over a link; packets of other, earlier streams are passed over.

    What comes while we write is held until it is read. By the protocol that is one packet; adbd
    sends some more without waiting when the command stopped reading, so there is a bound in bytes.
    """

    def __init__(self, link: Link, service: bytes, deadline: Deadline) -> None:
        self.best_write_bytes = link.max_packet_bytes
        self._link = link
        self._local = link.next_id()
        self._remote = 0
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._closed = False
        try:
            link.send(constants.OPEN, self._local, 0, service + b"\0", deadline)
            packet = self._next(deadline)
        except TimedOut as error:
            raise NotOpened from error
        if packet.command == constants.CLSE:
            name = service[:60].decode("utf-8", "replace")
            raise faults.gone(link.serial, f"{name!r} was closed at once")
        if packet.command != constants.OKAY or not packet.arg0:
            raise ProtocolError(
                f"{link.serial} answered {packet.command.decode()} where a stream was to be "
                "opened: the connection is damaged, repeat the call"
            )
        self._remote = packet.arg0

    def write(self, data: memoryview | bytes, deadline: Deadline) -> bool:
        """Send one packet and wait until it was taken; False if the device closed the stream."""
        if not self._closed:
            self._send(constants.WRTE, data, deadline)
            while (packet := self._next(deadline)).command != constants.OKAY:
                if packet.command == constants.CLSE:
                    break
                self._hold(packet)
        return not self._closed

    def read(self, deadline: Deadline) -> bytes:
        data = b""
        while not data:
            while not self._held and not self._closed:
                self._hold(self._next(deadline))
            if not self._held:
                return b""
            data = self._held.popleft()
            self._held_bytes -= len(data) + _HEADER.size
            if not self._closed:
                self._send(constants.OKAY, b"", deadline)
        return data

    def has_input(self) -> bool:
        return bool(self._held) or self._closed

    def close(self) -> None:
        """Say that we are done; the device's answer to it is passed over by the next stream."""
        self._closed = True
        self._send(constants.CLSE, b"", Deadline(CLOSE_S))

    def closes_in_order(self) -> bool:
        """Close a stream that took too long; whether the device answers and the link is whole."""
        if not self._link.is_whole:
            return False
        deadline = Deadline(CLOSE_S)
        try:
            self._send(constants.CLSE, b"", deadline)
            while not self._closed:
                self._next(deadline)
        except (TimedOut, DeviceError):
            return False
        return True

    def _send(self, command: bytes, data: memoryview | bytes, deadline: Deadline) -> None:
        self._link.send(command, self._local, self._remote, data, deadline)

    def _hold(self, packet: Packet) -> None:
        """Keep what is to be read; an OKAY that nobody waits for is dropped."""
        if packet.command == constants.WRTE:
            self._held.append(packet.data)
            self._held_bytes += len(packet.data) + _HEADER.size
        if self._held_bytes > MAX_HELD_BYTES:
            raise ProtocolError(
                f"{self._link.serial} sends on without waiting for us ({self._held_bytes} bytes): "
                "the connection is damaged, repeat the call"
            )

    def _next(self, deadline: Deadline) -> Packet:
        """The next packet for this stream: OKAY, WRTE or CLSE."""
        while True:
            deadline.wait_s()
            packet = self._link.receive(deadline)
            if packet.command in (constants.CNXN, constants.AUTH):
                raise DeviceGone(
                    f"{self._link.serial} began the connection anew: it was restarted, go on"
                )
            if packet.command not in (constants.OKAY, constants.WRTE, constants.CLSE):
                continue
            if packet.arg1 == self._local and (
                packet.arg0 == self._remote
                or not self._remote
                or (packet.command == constants.CLSE and not packet.arg0)
            ):
                self._closed = self._closed or packet.command == constants.CLSE
                return packet


class DuplexStream(Stream):
    """A stream with a link of its own, of which one thread reads while another writes."""

    def __init__(self, link: Link, service: bytes, deadline: Deadline) -> None:
        super().__init__(link, service, deadline)
        self._taken = threading.Semaphore(0)

    def write(self, data: memoryview | bytes, deadline: Deadline) -> bool:
        self._send(constants.WRTE, data, deadline)
        self._taken.acquire()  # released by the reader, at the latest when it ends
        return not self._closed

    def read(self, deadline: Deadline) -> bytes:
        try:
            while (packet := self._next(deadline)).command != constants.CLSE:
                if packet.command == constants.OKAY:
                    self._taken.release()
                elif packet.data:
                    self._send(constants.OKAY, b"", deadline)
                    return packet.data
        except BaseException:
            self._closed = True
            self._taken.release()
            raise
        self._taken.release()
        return b""

    def close(self) -> None:
        with contextlib.suppress(DeviceError, TimedOut):
            super().close()
        self._taken.release()
        self._link.close()


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
