"""pytest fixtures: a local device for a file of tests, and the means to make further ones.

A conftest imports them by name. Where this machine cannot run the local device a
test skips with the reason, or fails if POCKETDIFF_REQUIRE_DEVICE=1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from device_tests.local.adbd import LocalDeviceUnavailable, adbd
from device_tests.local.device import LocalDevice

REQUIRE_VARIABLE = "POCKETDIFF_REQUIRE_DEVICE"
MakeLocalDevice = Callable[..., LocalDevice]


@pytest.fixture(scope="session")
def local_adbd() -> None:
    """The program of the local device is there, fetched if need be."""
    try:
        adbd()
    except LocalDeviceUnavailable as error:
        if os.environ.get(REQUIRE_VARIABLE) == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def local_device(
    local_adbd: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalDevice]:
    """One running device for a file of tests; a test that restarts or fills one makes its own."""
    with LocalDevice(tmp_path_factory.mktemp("device")) as device:
        yield device


@pytest.fixture
def make_local_device(local_adbd: None, tmp_path: Path) -> Iterator[MakeLocalDevice]:
    """Start devices with options of `LocalDevice`; they end with the test."""
    devices: list[LocalDevice] = []

    def make(**options: object) -> LocalDevice:
        folder = tmp_path / f"device{len(devices)}"
        devices.append(LocalDevice(folder, **options))  # type: ignore[arg-type]
        return devices[-1].start()

    yield make
    for device in devices:
        device.stop()
