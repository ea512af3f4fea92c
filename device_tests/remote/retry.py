"""Calls that are repeated while the device is away."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from device_tests.adb.transport import Transport
from device_tests.errors import CommandTimeout, DeviceError, DeviceGone, ProtocolError

Answer = TypeVar("Answer")


def retry_while_gone(
    transport: Transport,
    call: Callable[[], Answer],
    gone_s: float,
    on_break: Callable[[DeviceError], None] | None = None,
) -> Answer:
    """Return what `call` returns; it is called again after a lost device was found, so it must be
    safe to repeat.

    on_break: called with each error. Raises the last DeviceGone, CommandTimeout or ProtocolError
    when `call` has failed for `gone_s` seconds.
    """
    give_up: float | None = None
    while True:
        try:
            return call()
        except (DeviceGone, CommandTimeout, ProtocolError) as error:
            now = time.monotonic()
            if give_up is None:
                give_up = now + gone_s
            elif now >= give_up:
                raise
            if on_break is not None:
                on_break(error)
            transport.reconnect(max(0.1, give_up - now))
            time.sleep(0.05)  # a device that answers but keeps failing is not asked without pause
