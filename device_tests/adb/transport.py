"""The interface to a device: shell, files, ports. How the bytes travel is known to its variants.

Everything a device answers is untrusted. Each call stands alone: it opens what it needs and may be
repeated after `DeviceGone`, when `reconnect` has found the device again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO, Literal, Protocol

Kind = Literal["server", "tcp", "usb"]

Progress = Callable[[int], None]
"""Called with the bytes moved so far by this call."""


@dataclass(frozen=True)
class ShellResult:
    """What a command on the device said and how it ended; 128 + n: killed by signal n."""

    exit_code: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Standard output as text, what is not UTF-8 replaced."""
        return self.stdout.decode("utf-8", errors="replace")

    @property
    def error_text(self) -> str:
        """Standard error as text, what is not UTF-8 replaced."""
        return self.stderr.decode("utf-8", errors="replace")


@dataclass(frozen=True)
class RemoteStat:
    """A file or folder on the device; `size_bytes` is exact beyond 4 GiB, `mode` as in stat(2)."""

    size_bytes: int
    mode: int
    modified_s: int


class Transport(Protocol):
    """A device that can be spoken to. Every method raises a `DeviceError` and nothing else."""

    serial: str
    """As `adb devices` prints it."""
    kind: Kind

    def shell(self, command: str, *, timeout_s: float = 30.0) -> ShellResult:
        """Run `command` by the device's shell and wait for its end, with no input.

        Raises CommandTimeout after `timeout_s` (the command may go on), DeviceGone, ProtocolError.
        """

    def push(
        self,
        source: BinaryIO,
        remote: str,
        length: int,
        *,
        offset: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """Write the next `length` bytes of `source` into the file `remote` at `offset`.

        The file is made if it is not there and never shortened; what else is in it stays. The
        folder must exist. Raises StorageFull, CommandFailed, DeviceGone, ProtocolError; then any
        part of the range may have been written.
        """

    def pull(
        self,
        remote: str,
        destination: BinaryIO,
        *,
        offset: int = 0,
        length: int | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Append the bytes of `remote` from `offset` (at most `length`) to `destination`.

        Returns how many there were. Raises CommandFailed if the file cannot be read.
        """

    def stat(self, remote: str) -> RemoteStat | None:
        """Size, mode and time of `remote`, symbolic links followed; None if there is nothing."""

    def forward(self, remote: str) -> AbstractContextManager[int]:
        """A local TCP port on loopback that leads to `remote` (`tcp:8000`, `localabstract:name`)
        on the device, as long as the block lasts."""

    def reconnect(self, timeout_s: float) -> None:
        """Wait until the same device answers again. Raises DeviceGone if it does not."""

    def close(self) -> None:
        """Give the connection back; calls after it are errors."""
