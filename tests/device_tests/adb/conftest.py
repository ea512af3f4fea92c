"""What the tests of the transports share: both ways, to the double and to the real adbd."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_tests.local.device import LocalDevice
from tests.support.adb_double import AdbDouble
from tests.support.adb_ways import Device, Way


@pytest.fixture(scope="session")
def shared_device(
    local_adbd: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalDevice]:
    """One running device for all; a test that restarts or fills one makes its own."""
    with LocalDevice(tmp_path_factory.mktemp("shared_device")) as local:
        yield local


@pytest.fixture
def double(tmp_path: Path) -> Iterator[AdbDouble]:
    with AdbDouble(tmp_path).running() as running:
        yield running


@pytest.fixture(params=["direct", "server"])
def way(request: pytest.FixtureRequest) -> Way:
    """Every test that takes this runs directly and through an adb server."""
    return Way(None if request.param == "direct" else request.getfixturevalue("shared_server"))


@pytest.fixture(params=["double", "adbd"])
def device(request: pytest.FixtureRequest, way: Way, tmp_path: Path) -> Iterator[Device]:
    """Every test that takes this runs by both ways on the double and on the real adbd."""
    if request.param == "double":
        port = request.getfixturevalue("double").port
        with way.open(port) as transport:
            yield Device(transport, str(tmp_path), port)
        return
    port = request.getfixturevalue("shared_device").port
    folder = f"/data/local/tmp/{os.urandom(4).hex()}"
    with way.open(port) as transport:
        assert transport.shell(f"mkdir -p {folder}").exit_code == 0
        yield Device(transport, folder, port)
    with way.open(port) as transport:
        transport.shell(f"rm -rf {folder}")
