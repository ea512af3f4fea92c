"""A device that can be spoken to: shell, files, ports, the same by every way to it (`Opener`).

Everything a device answers is untrusted. Each call stands alone: it opens what it needs and may be
repeated after `DeviceGone`, when `reconnect` has found the device again.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from device_tests.adb import faults
from device_tests.adb.faults import excerpt
from device_tests.adb.forward import Forwarder
from device_tests.adb.opener import Deadline, Kind, NotOpened, Opener, TimedOut
from device_tests.adb.shell_reply import STDERR, STDOUT, RemoteStat, ShellResult, parse_stat
from device_tests.adb.shell_stream import running
from device_tests.adb.transfer import Progress, Transfer
from device_tests.errors import CommandTimeout, DeviceGone, DeviceUnauthorized
from quantize.errors import DeviceError

STALL_S = 60.0
"""A push or pull that moves no byte for so long is given up as DeviceGone."""
_RETRY_EVERY_S = 0.2
_NOTHING_THERE = 66


class Transport:
    """A device by one opener. Every method raises a `DeviceError` and nothing else; a progress
    callback must not use the transport."""

    def __init__(self, opener: Opener, *, stall_s: float = STALL_S) -> None:
        self.serial = opener.serial
        """As `adb devices` prints it."""
        self.kind: Kind = opener.kind
        self._opener = opener
        self._stall_s = stall_s
        self._closed = False

    def shell(self, command: str, *, timeout_s: float = 30.0) -> ShellResult:
        """Run `command` by the device's shell and wait for its end, with no input.

        Raises CommandTimeout after `timeout_s` (the command may go on), DeviceGone, ProtocolError.
        """
        deadline = Deadline(timeout_s)
        self._refuse_closed()
        try:
            with running(self._opener, command, deadline) as shell:
                shell.end_input(deadline)
                output = shell.collect(lambda: deadline)
        except NotOpened as error:
            raise faults.not_begun(self.serial, timeout_s) from error
        except TimedOut as error:
            raise CommandTimeout(
                f"{excerpt(command)} did not end within {timeout_s:g} s on {self.serial}: it may "
                "still be running there; allow more time or look at the device"
            ) from error
        assert shell.exit_code is not None  # else collect would have raised
        return ShellResult(shell.exit_code, bytes(output[STDOUT]), bytes(output[STDERR]))

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
        self._refuse_closed()
        Transfer(self._opener, remote, self._stall_s).push(source, length, offset, progress)

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
        self._refuse_closed()
        return Transfer(self._opener, remote, self._stall_s).pull(
            destination, offset, length, progress
        )

    def stat(self, remote: str) -> RemoteStat | None:
        """Size, mode and time of `remote`, symbolic links followed; None if there is nothing."""
        path = shlex.quote(remote)
        result = self.shell(
            f"[ -e {path} ] || exit {_NOTHING_THERE}; LC_ALL=C stat -L -c '%s %f %Y' -- {path}"
        )
        if result.exit_code == _NOTHING_THERE:
            return None
        if result.exit_code != 0:
            what = f"{remote} cannot be looked at"
            raise faults.failed_command(what, result.stderr, self.serial)
        return parse_stat(result.stdout)

    @contextmanager
    def forward(self, remote: str) -> Iterator[int]:
        """A local TCP port on loopback that leads to `remote` (`tcp:8000`, `localabstract:name`)
        on the device, as long as the block lasts."""
        self._refuse_closed()
        if self.kind == "usb":
            raise DeviceError(
                f"a port of {self.serial} cannot be forwarded over direct USB, which allows one "
                "connection only: start the adb server and use the device through it"
            )
        with Forwarder(self._opener, remote) as forwarder:
            yield forwarder.port

    def reconnect(self, timeout_s: float) -> None:
        """Wait until the same device answers again. Raises DeviceGone if it does not."""
        deadline = Deadline(timeout_s)
        while True:
            self._refuse_closed()
            left_s = max(1.0, deadline.left_s())
            try:
                self._opener.reconnect(left_s)
                if self.shell("true", timeout_s=min(left_s, 10.0)).exit_code == 0:
                    return
                reason = "its shell cannot run `true`"
            except DeviceUnauthorized:
                raise
            except DeviceError as error:
                reason = str(error)
            if deadline.left_s() <= _RETRY_EVERY_S:
                raise DeviceGone(
                    f"{self.serial} did not come back within {timeout_s:g} s ({reason})"
                )
            time.sleep(_RETRY_EVERY_S)

    def close(self) -> None:
        """Give the connection back; calls after it are errors."""
        self._closed = True
        self._opener.close()

    def __enter__(self) -> Transport:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise DeviceError(f"the connection to {self.serial} was closed: open it again")


def opened(opener: Opener) -> Transport:
    """The transport of a device that can be used; raises DeviceError if it is too old."""
    if "shell_v2" not in opener.features():
        opener.close()
        raise DeviceError(
            f"{opener.serial} has no shell with exit codes (feature shell_v2): Android 7 or newer "
            "is needed"
        )
    return Transport(opener)
