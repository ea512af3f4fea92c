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
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from adb_shell import constants
from adb_shell.adb_message import AdbMessage
from adb_shell.auth.keygen import keygen, write_public_keyfile
from adb_shell.auth.sign_cryptography import CryptographySigner
from adb_shell.exceptions import TcpTimeoutException
from adb_shell.transport.base_transport import BaseTransport

from device_tests.adb.cable import is_usb_timeout, usb_sentence
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
"""For the rest of a packet that has begun, and to close a stream whose time is over."""
_STLS = int.from_bytes(b"STLS", "little")
_HEADER = struct.Struct("<6I")

OnAuthorisation = Callable[[str], None]
"""Called with a sentence for the person before we wait for the person at the device."""


def _checksum(data: bytes) -> int:
    """The sum of the bytes, which adbd checked up to Android 8; numpy is 50 times sum()."""
    return int(np.frombuffer(data, np.uint8).sum(dtype=np.uint64)) & 0xFFFFFFFF


class TimedOut(Exception):
    """Nothing came, or nothing went out, until the deadline; callers say what that means."""


class NotOpened(TimedOut):
    """Not even the opening of a stream was answered: it is the device that is silent."""


class Outlasted(TimedOut):
    """Only the command went on too long; its stream was closed and the connection is whole."""


class Deadline:
    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    def left_s(self) -> float:
        return self._at - time.monotonic()

    def with_grace(self) -> Deadline:
        """For the rest of a packet that has begun: breaking off there costs the connection."""
        return self if self.left_s() > CLOSE_S else Deadline(CLOSE_S)

    def wait_s(self) -> float:
        """What is left for one wait; never 0, which libusb takes for without end."""
        left = self.left_s()
        if left <= 0:
            raise TimedOut
        return max(left, 0.001)


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
        deadline = Deadline(timeout_s)
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

    def send(self, command: bytes, arg0: int, arg1: int, data: bytes, deadline: Deadline) -> None:
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
        data = self._read(length, deadline.with_grace()) if length else b""
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
        self,
        packet: Packet,
        deadline: Deadline,
        key_folder: Path,
        authorisation_timeout_s: float,
        on_authorisation_needed: OnAuthorisation | None,
    ) -> Packet:
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
            packet = self._greeting(Deadline(authorisation_timeout_s))
            if packet.command == constants.CNXN:
                return packet
            answer = "refused the key"
        except TimedOut:
            answer = f"gave no answer within {authorisation_timeout_s:g} s"
        except DeviceGone:
            answer = "closed the connection"
        raise DeviceUnauthorized(
            f"{self.serial} does not trust this machine and {answer}: connect again, then "
            f"{what_to_do}"
        )

    def _read(self, count: int, deadline: Deadline) -> bytes:
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

    def _write(self, data: bytes, deadline: Deadline) -> None:
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
        except (DeviceError, TimedOut):
            raise
        except (TcpTimeoutException, TimeoutError) as error:
            raise TimedOut from error
        except Exception as error:
            if is_usb_timeout(error):
                raise TimedOut from error
            busy = usb_sentence(error, self.serial)
            if busy is not None:
                raise DeviceError(busy) from error
            raise DeviceGone(
                f"the connection to {self.serial} is broken ({type(error).__name__}: "
                f"{shortened(str(error))}): check the cable or the network and that the device "
                "is on"
            ) from error


class Stream:
    """One service of a device over a link; packets of other, earlier streams are passed over.

    What comes while we write is held until it is read. By the protocol that is one packet; adbd
    sends some more without waiting when the command stopped reading, so there is a bound in bytes.
    """

    def __init__(self, link: Link, service: bytes, deadline: Deadline) -> None:
        self.link = link
        self._local = link.next_id()
        self._remote = 0
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._closed = False
        link.send(constants.OPEN, self._local, 0, service + b"\0", deadline)
        try:
            packet = self._next(deadline)
        except TimedOut as error:
            raise NotOpened from error
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

    def write(self, data: bytes, deadline: Deadline) -> bool:
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

    def read(self, deadline: Deadline) -> bytes | None:
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

    def close(self, deadline: Deadline) -> None:
        """Say that we are done; the device's answer to it is passed over by the next stream."""
        self._closed = True
        self.link.send(constants.CLSE, self._local, self._remote, b"", deadline)

    def _hold(self, packet: Packet) -> None:
        self._held.append(packet.data)
        self._held_bytes += len(packet.data) + _HEADER.size
        if self._held_bytes > MAX_HELD_BYTES:
            raise ProtocolError(
                f"{self.link.serial} sends on without waiting for us ({self._held_bytes} bytes): "
                "the connection is damaged, repeat the call"
            )

    def _next(self, deadline: Deadline) -> Packet:
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


def shortened(text: str, limit: int = 200) -> str:
    """Text that a device or a library gave, short enough for a sentence."""
    return text if len(text) <= limit else f"{text[:limit]}…"
