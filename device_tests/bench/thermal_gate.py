"""The wait for a cool device before a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from device_tests.adb.transport import Transport
from device_tests.bench.failures import Failure
from device_tests.errors import DeviceError
from device_tests.remote import conditions, sensors
from device_tests.remote.retry import retry_while_gone
from device_tests.remote.shell import run_checked


@dataclass
class ThermalGate:
    """The wait for a cool device, and what was read when it ended (`read_s`: monotonic time)."""

    threshold_c: float
    sensor: str | None = None
    begin_c: float | None = None
    waited_s: float = 0.0
    timed_out: bool = False
    reading: sensors.Reading | None = None
    clocks: conditions.Clocks = field(default_factory=conditions.Clocks)
    read_s: float = 0.0

    def wait(
        self,
        transport: Transport,
        *,
        timeout_s: float,
        poll_s: float,
        gone_s: float,
        beat: Callable[[], None],
        on_break: Callable[[DeviceError], None],
        on_wait: Callable[[str, float, float], None],
    ) -> None:
        """Read the hottest sensor until it is under the threshold, or `timeout_s` is over.

        Without a sensor there is no wait. beat: called before each reading. on_wait: called with
        sensor, temperature in °C and seconds waited so far.
        """
        began_s = time.monotonic()
        command = sensors.COMMAND + conditions.CLOCKS_COMMAND
        while True:
            beat()
            answer = retry_while_gone(
                transport, lambda: run_checked(transport, command), gone_s, on_break
            )
            self.read_s = time.monotonic()
            self.reading = sensors.parse(answer.text)
            self.clocks = conditions.parse_clocks(answer.text)
            self.waited_s = self.read_s - began_s
            if self.reading.hottest is None:
                return
            self.sensor, self.begin_c = self.reading.hottest
            if self.begin_c < self.threshold_c:
                return
            if self.waited_s >= timeout_s:
                self.timed_out = True
                return
            on_wait(self.sensor, self.begin_c, self.waited_s)
            time.sleep(min(poll_s, timeout_s - self.waited_s))

    @property
    def failure(self) -> Failure | None:
        """That of a run which the heat prevented."""
        if not self.timed_out:
            return None
        return Failure(
            "thermal_timeout",
            f"{self.sensor} was still at {self.begin_c:.1f} °C after {self.waited_s:.0f} s, the "
            f"run begins under {self.threshold_c:g} °C; cool the device or raise the threshold",
            {"temperature_c": self.begin_c, "waited_s": round(self.waited_s, 1)},
        )

    def to_json(self) -> dict[str, Any]:
        """For a record."""
        return {
            "threshold_c": self.threshold_c,
            "sensor": self.sensor,
            "begin_c": self.begin_c,
            "waited_s": round(self.waited_s, 3),
            "timed_out": self.timed_out,
        }
