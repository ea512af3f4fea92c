"""The device that a verb was asked to use: chosen, connected, warned about, deployed to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal

from quantize.errors import InputError
from scripts.console import reporting, say

if TYPE_CHECKING:
    from device_tests.adb.transport import Transport
    from device_tests.bench.deploy import Deployment
    from export.contract.bundle import Bundle


@contextmanager
def connected_device(
    serial: str | None, via: Literal["auto", "server", "direct"], local: bool
) -> Iterator[Transport]:
    """The chosen device, connected; a local one lives as long as the block."""
    from device_tests.adb.selection import open_device

    if local and serial is not None:
        raise InputError(f"--local and --serial {serial} were both given; choose one")
    if local and via == "server":
        raise InputError("--local speaks to its own device directly; leave out --via server")
    with _local_device() if local else nullcontext(serial) as chosen:
        transport = open_device(chosen, via="direct" if local else via, say=warn)
        try:
            yield transport
        finally:
            transport.close()


@contextmanager
def _local_device() -> Iterator[str]:
    """The serial of the local device: the one that runs already, or one for the block."""
    from device_tests.local.adbd import cache_folder
    from device_tests.local.device import LocalDevice, kept

    folder = cache_folder() / "device"
    running = kept(folder)
    if running is not None:
        yield running.serial
        return
    with reporting("starting the local device"):
        device = LocalDevice(folder).start()
    try:
        yield device.serial
    finally:
        device.stop()


def warn(sentence: str) -> None:
    """Print on stderr what a device said, without anything that a terminal would obey."""
    from device_tests.results.plain_text import plain

    say(plain(sentence), on_stderr=True)


def check_memory(transport: Transport, bundle: Bundle) -> dict[str, object] | None:
    """Warn before a run that cannot be expected to fit; its budget, None where it is not known."""
    from device_tests.bench.memory_budget import run_budget

    found = run_budget(transport, bundle)
    if found is not None and found.warning is not None:
        warn(f"warning: {found.warning}")
    return None if found is None else found.to_json()


def check_unlocked(transport: Transport) -> None:
    """Raise DeviceBusy while a measurement has the device: a push would spoil it."""
    from device_tests.bench import device_lock
    from device_tests.errors import DeviceBusy

    if (holder := device_lock.holder(transport)) is not None:
        raise DeviceBusy(
            f"the device {transport.serial} is taken by {holder}; wait for its end, or choose "
            "another device"
        )


def deploy_bundle(transport: Transport, bundle: Bundle) -> Deployment:
    """Push what the device lacks of the bundle. Raises DeviceBusy, DeviceError."""
    from device_tests.bench.deploy import deploy

    check_unlocked(transport)
    with reporting("deploying") as progress:
        return deploy(transport, bundle, progress=progress)
