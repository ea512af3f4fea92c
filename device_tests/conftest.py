"""Which device the suite runs on, and the bundle that it runs there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_tests.adb.transport import Transport
from device_tests.bench.deploy import Deployment, deploy
from device_tests.bench.runner import Runner, choose_runner
from device_tests.local.device import LocalDevice
from device_tests.local.fixture import local_adbd  # noqa: F401
from export.contract.bundle import Bundle, open_bundle
from quantize.sizes import parse_bytes
from tests.support.browser import chromium  # noqa: F401
from tests.support.made_once import made_once

REPOSITORY = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("device", "the device under test")
    group.addoption(
        "--device",
        metavar="SERIAL",
        help="serial as `pocketdiff devices` shows it (default: a local device of its own)",
    )
    group.addoption("--bundle", metavar="FOLDER", help="bundle to run (default: the demo model)")
    group.addoption(
        "--memory-budget",
        metavar="SIZE",
        type=parse_bytes,
        help="peak RSS that a run of the bundle may reach (default: 512M; on the local device 256M "
        "and what Python with PyTorch takes, which depends on PyTorch's build)",
    )


@pytest.fixture(scope="session")
def transport(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Transport]:
    """The device under test, connected."""
    from device_tests.adb.selection import open_device

    serial = request.config.getoption("--device")
    local: LocalDevice | None = None
    if serial is None:
        request.getfixturevalue("local_adbd")
        local = LocalDevice(tmp_path_factory.mktemp("device")).start()
        serial = local.serial
    try:
        connected = open_device(serial, via="direct" if local else "auto")
        yield connected
        connected.close()
    finally:
        if local is not None:
            local.stop()


@pytest.fixture(scope="session")
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle under test; the demo model takes a minute of lowering, once a session."""
    given = request.config.getoption("--bundle")
    if given is not None:
        return open_bundle(given)
    int4 = made_once(  # the host's tests share both
        tmp_path_factory,
        "demo/int4",
        lambda folder: pocketdiff("quantize", REPOSITORY / "scripts" / "demo_model", folder),
    )
    return open_bundle(
        made_once(tmp_path_factory, "demo/bundle", lambda f: pocketdiff("export", int4, f))
    )


@pytest.fixture(scope="session")
def deployment(transport: Transport, bundle: Bundle) -> Deployment:
    """The bundle, whole on the device."""
    return deploy(transport, bundle)


@pytest.fixture(scope="session")
def runner(transport: Transport) -> Runner:
    """How runs are started on the device."""
    from device_tests.remote import conditions

    return choose_runner(conditions.read_device(transport).android_sdk)


def pocketdiff(*arguments: object) -> str:
    """Run the command line apart, since this package imports no torch; returns its stdout."""
    command = [sys.executable, "-m", "scripts.pocketdiff", *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"pocketdiff {arguments[0]} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout
