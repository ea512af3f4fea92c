"""adb servers for tests alone: on a free port, with keys of their own, gone with the tests."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import adbutils
import pytest

from device_tests.adb import server as adb_server
from device_tests.adb.server import ServerAddress
from device_tests.local.adbd import CACHE_VARIABLE, cache_folder


def _free_address() -> ServerAddress:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return ServerAddress("127.0.0.1", probe.getsockname()[1])


def _name_in_environment(address: ServerAddress, home: Path, patch: pytest.MonkeyPatch) -> None:
    for name in ("ADB_SERVER_SOCKET", "ANDROID_ADB_SERVER_ADDRESS", "ANDROID_SERIAL"):
        patch.delenv(name, raising=False)
    patch.setenv("ANDROID_ADB_SERVER_PORT", str(address.port))
    patch.setenv(CACHE_VARIABLE, str(cache_folder()))  # not that of the home below
    # Keys go to $HOME/.android; USB and mDNS of this machine are none of the tests' business.
    patch.setenv("HOME", str(home))
    patch.setenv("ADB_USB", "0")
    patch.setenv("ADB_MDNS", "0")


def _end(address: ServerAddress) -> None:
    if adb_server.server_version(address) is not None:
        kill = [adbutils.adb_path(), "-L", f"tcp:{address.port}", "kill-server"]
        subprocess.run(kill, check=False, capture_output=True, timeout=20)


@pytest.fixture
def no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerAddress]:
    """The environment names a free port; a server that the test starts there is ended after it."""
    address = _free_address()
    _name_in_environment(address, tmp_path, monkeypatch)
    yield address
    _end(address)


@pytest.fixture
def private_server(no_server: ServerAddress) -> ServerAddress:
    """A running server that knows no device."""
    adb_server.start_server()
    return no_server


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerAddress]:
    """A running server that the environment does not name; tests disconnect what they connect."""
    address = _free_address()
    with pytest.MonkeyPatch.context() as patch:
        _name_in_environment(address, tmp_path_factory.mktemp("home"), patch)
        adb_server.start_server()
    yield address
    _end(address)
