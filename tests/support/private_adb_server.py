"""An adb server for tests alone: on a free port, with keys of its own, gone with the test."""

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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerAddress]:
    """The environment names a free port; a server that the test starts there is ended after it."""
    address = ServerAddress("127.0.0.1", _free_port())
    for name in ("ADB_SERVER_SOCKET", "ANDROID_ADB_SERVER_ADDRESS", "ANDROID_SERIAL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(address.port))
    monkeypatch.setenv(CACHE_VARIABLE, str(cache_folder()))  # not that of the home below
    # Keys go to $HOME/.android; USB and mDNS of this machine are none of the tests' business.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ADB_USB", "0")
    monkeypatch.setenv("ADB_MDNS", "0")
    yield address
    if adb_server.server_version(address) is not None:
        kill = [adbutils.adb_path(), "-L", f"tcp:{address.port}", "kill-server"]
        subprocess.run(kill, check=False, capture_output=True, timeout=20)


@pytest.fixture
def private_server(no_server: ServerAddress) -> ServerAddress:
    """A running server that knows no device."""
    adb_server.start_server()
    return no_server
