"""How a run is started on a kind of device."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from device_tests.remote.shell import quote
from quantize.errors import DeviceError


class RunnerMissing(DeviceError):
    """There is no runner for this kind of device."""


class Runner(Protocol):
    """A program on a device that does what a request says; no more than that is promised."""

    def command(self, request: str) -> str:
        """The shell command that does what the file `request` on the device asks for."""


@dataclass(frozen=True)
class LinuxRunner:
    """`export.host.runner` by a Python that the device has; paths are the device's."""

    python: str = sys.executable
    root: str = str(Path(__file__).parents[2])

    def command(self, request: str) -> str:
        """As Runner."""
        return self.module_command("export.host.runner", request)

    def module_command(self, module: str, *arguments: str) -> str:
        """The shell command that runs a Python module of this project on the device."""
        # -P: the folder it is started in is no place to import from.
        words = quote(self.python, "-P", "-m", module, *arguments)
        return f"PYTHONPATH={quote(self.root)} {words}"


def choose_runner(android_sdk: int | None) -> LinuxRunner:
    """The runner for a device. Raises RunnerMissing for Android, whose runner is the app's."""
    if android_sdk is not None:
        raise RunnerMissing(
            f"the device runs Android (SDK {android_sdk}), and the app with the runner for Android "
            "is not there yet; give a device with Linux, or --local"
        )
    return LinuxRunner()
