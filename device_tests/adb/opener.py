"""A device's services as streams of bytes: all that the ways to a device differ in.

Shell, files and ports are written once above it (`shell`, `transfer`, `forward`).
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Literal, Protocol

from device_tests.errors import CommandFailed

Kind = Literal["server", "tcp", "usb"]


class TimedOut(Exception):
    """Nothing came, or nothing went out, until the deadline; callers say what that means."""


class NotOpened(TimedOut):
    """Not even the opening of a stream was answered: it is the device that is silent."""


class Deadline:
    """A point in time, `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds until then, negative afterwards."""
        return self._at - time.monotonic()

    def wait_s(self) -> float:
        """Seconds for one wait, never 0, which libusb takes for without end; TimedOut if over."""
        left = self.left_s()
        if left <= 0:
            raise TimedOut
        return max(left, 0.001)


class ByteStream(Protocol):
    """One open service. Errors are a DeviceError or TimedOut."""

    best_write_bytes: int
    """The largest `data` of `write`, and the quickest."""

    def write(self, data: memoryview | bytes, deadline: Deadline) -> bool:
        """Send `data`; False if the device takes no more, and why is to be read."""

    def read(self, deadline: Deadline) -> bytes:
        """The bytes that came next; none if the device ended the stream in order."""

    def has_input(self) -> bool:
        """Whether something is to be read already."""

    def close(self) -> None:
        """End the stream; wakes another thread that reads."""


class Opener(Protocol):
    """One way to one device. Errors are a DeviceError or TimedOut."""

    serial: str
    kind: Kind
    parallel_streams: int
    """How many streams may be open side by side and carry more than one does."""

    def features(self) -> frozenset[str]:
        """What the device's adbd offers, such as `shell_v2`."""

    def open(self, service: bytes, deadline: Deadline) -> AbstractContextManager[ByteStream]:
        """A stream of `service`, such as `shell,v2,raw:ls`, for the block; raises NotOpened."""

    def open_apart(self, service: bytes, deadline: Deadline) -> ByteStream:
        """A stream that lasts until its `close`; one thread may read while another writes."""

    def reconnect(self, timeout_s: float) -> None:
        """Try once to reach the same device anew."""

    def close(self) -> None:
        """Release what is held; `open` would connect again."""


def check_length(service: bytes, maximum_bytes: int, serial: str) -> None:
    """Raise CommandFailed for a service that no request can hold."""
    if len(service) > maximum_bytes:
        raise CommandFailed(
            f"a command of {len(service)} bytes is longer than the {maximum_bytes} that {serial} "
            "takes: push it as a file and run that"
        )
