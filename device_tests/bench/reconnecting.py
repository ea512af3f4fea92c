"""A device's shell that outlives broken connections and notices restarts of the device."""

from __future__ import annotations

from collections.abc import Callable

from device_tests.adb.transport import ShellResult, Transport
from device_tests.errors import DeviceError, DeviceGone
from device_tests.remote.retry import Answer
from device_tests.remote.shell import run_checked

_RECONNECTIONS_IN_VAIN = 5
_BOOT_ID = "cat /proc/sys/kernel/random/boot_id 2>/dev/null"


class ReconnectingShell:
    """Commands that may be repeated, sent again whenever the connection breaks and comes back.

    retry_s: how long a lost device is waited for, each time. on_wait: called before that.
    `restarted` is set when the device was found with another boot id; the caller clears it.
    """

    def __init__(
        self, transport: Transport, retry_s: float, on_wait: Callable[[], None] = lambda: None
    ) -> None:
        self.transport = transport
        self.reconnections = 0
        self.restarted = False
        self._retry_s = retry_s
        self._on_wait = on_wait
        self._boot_id = ""
        self._boot_id = self.again(lambda: transport.shell(_BOOT_ID)).text

    def run(self, command: str, timeout_s: float = 30.0) -> ShellResult:
        """The result of a command that ended with 0. Raises as `run_checked`, or `reconnect`."""
        return self.again(lambda: run_checked(self.transport, command, timeout_s))

    def again(self, action: Callable[[], Answer]) -> Answer:
        """What `action` returns when the connection holds. Raises as `reconnect`."""
        in_vain = 0
        while True:
            try:
                return action()
            except DeviceGone as error:
                in_vain += 1
                self.reconnect(error, in_vain)

    def reconnect(self, error: DeviceGone, in_vain: int) -> None:
        """Wait for the device, lost by `error` for the `in_vain`th time in a row.

        Raises DeviceGone if it stays away or breaks off every time.
        """
        if in_vain > _RECONNECTIONS_IN_VAIN:
            raise DeviceGone(
                f"the connection to {self.transport.serial} broke {in_vain} times in a row "
                f"({error}); try another cable or port, then push again: what arrived is kept"
            ) from error
        self._on_wait()
        try:
            self.transport.reconnect(self._retry_s)
        except DeviceGone as gone:
            raise DeviceGone(f"{gone}; push again when it is back: what arrived is kept") from gone
        self.reconnections += 1
        try:
            # What cannot be read counts as a restart: it costs a verification, no more.
            boot_id = self.transport.shell(_BOOT_ID).text
        except DeviceError:
            boot_id = ""
        if not boot_id or boot_id != self._boot_id:
            self._boot_id, self.restarted = boot_id, True
