"""Push to a real adbd through real breaks: a cut stream, a restart, a kill, a full file system.

CPU only, no model; the local device, by both transports.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from device_tests.adb.direct import open_tcp
from device_tests.adb.server import open_server
from device_tests.adb.transport import Transport
from device_tests.bench.deploy import Deployment, deploy
from device_tests.bench.inventory import clean, deployed
from device_tests.errors import StorageFull
from device_tests.local.device import LocalDevice
from device_tests.local.fixture import MakeLocalDevice
from device_tests.remote.shell import DEVICE_ROOT, run_checked
from export.contract.bundle import Bundle, open_bundle
from tests.support.push_tools import make_bundle, random_bytes

CHUNK = 1 << 20
HEAD_BYTES = 6 * CHUNK + 123
REPOSITORY = Path(__file__).parents[3]

PUSH = """
import os, signal, sys
from device_tests.adb.direct import open_tcp
from device_tests.bench.deploy import deploy
from export.contract.bundle import open_bundle

def report(done, total, what):
    if what.startswith("sending") and done >= {after}:
        os.kill(os.getpid(), signal.SIGKILL)

deploy(open_tcp("127.0.0.1", {port}), open_bundle({folder!r}), chunk_bytes={chunk}, progress=report)
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    files = {"head.pte": random_bytes(HEAD_BYTES, 1), "sub/it's.bin": random_bytes(CHUNK, 2)}
    return make_bundle(tmp_path / "bundle", files)


def whole_bytes(bundle: Bundle) -> int:
    return bundle.total_bytes + (bundle.folder / "bundle.json").stat().st_size


@pytest.fixture(params=["tcp", "server"])
def kind(request: pytest.FixtureRequest) -> str:
    """A connection of our own, or an adb server of the test's own."""
    if request.param == "server":
        request.getfixturevalue("private_server")
    return request.param


@contextmanager
def connected(port: int, kind: str = "tcp") -> Iterator[Transport]:
    serial = f"127.0.0.1:{port}"
    transport = open_server(serial) if kind == "server" else open_tcp("127.0.0.1", port)
    try:
        yield transport
    finally:
        transport.close()


@pytest.fixture
def transport(local_device: LocalDevice, kind: str) -> Iterator[Transport]:
    """The session's device, with nothing of ours on it."""
    with connected(local_device.port, kind) as transport:
        run_checked(transport, f"rm -rf {DEVICE_ROOT}")
        yield transport


def push(transport: Transport, bundle: Bundle, **options: object) -> Deployment:
    return deploy(transport, bundle, chunk_bytes=CHUNK, retry_s=20.0, **options)


def assert_whole(device: LocalDevice, bundle: Bundle, done: Deployment) -> None:
    assert open_bundle(device.path(done.remote_folder), verify=True).files == bundle.files
    assert list(device.path(f"{DEVICE_ROOT}/staging").iterdir()) == []
    assert list(device.path(f"{DEVICE_ROOT}/bundles").iterdir()) == [
        device.path(done.remote_folder)
    ]


def once(at_bytes: int, action: Callable[[], None]) -> Callable[[int, int, str], None]:
    """A progress callback that acts once when so much has been sent."""
    acted: list[int] = []

    def report(done: int, total: int, what: str) -> None:
        if what.startswith("sending") and done >= at_bytes and not acted:
            acted.append(done)
            action()

    return report


class Cable:
    """A TCP relay to a port of loopback that can be cut, and then carries new connections."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        ends, self._ends = self._ends, []
        for end in ends:
            with suppress(OSError):  # the other side may have gone already
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._listener.accept()
            except OSError:
                return
            there = socket.create_connection(("127.0.0.1", self._target))
            self._ends += [here, there]
            for source, sink in ((here, there), (there, here)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


@pytest.fixture
def cable(local_device: LocalDevice) -> Iterator[Cable]:
    cable = Cable(local_device.port)
    yield cable
    cable.close()


def test_push_again_list_and_clean(
    local_device: LocalDevice,
    transport: Transport,
    bundle: Bundle,
) -> None:
    done = push(transport, bundle)
    assert_whole(local_device, bundle, done)
    assert done.bytes_sent == done.bytes_total == whole_bytes(bundle)
    assert push(transport, bundle).bytes_sent == 0
    (found,) = deployed(transport)
    assert found.complete and found.bundle_id == done.bundle_id
    assert clean(transport).bundles == 1
    assert transport.stat(DEVICE_ROOT) is None


@pytest.mark.parametrize("after", [1, 2 * CHUNK + CHUNK // 2, HEAD_BYTES])
def test_a_cut_stream_costs_at_most_a_chunk(
    local_device: LocalDevice,
    transport: Transport,
    cable: Cable,
    bundle: Bundle,
    after: int,
    kind: str,
) -> None:
    with connected(cable.port, kind) as through:
        done = push(through, bundle, progress=once(after, cable.cut))
    assert done.reconnections == 1
    assert done.bytes_sent <= whole_bytes(bundle) + CHUNK
    assert_whole(local_device, bundle, done)


def test_a_killed_push_goes_on_in_the_next_process(
    local_device: LocalDevice,
    transport: Transport,
    bundle: Bundle,
) -> None:
    after = 3 * CHUNK + CHUNK // 2
    script = PUSH.format(
        after=after, port=local_device.port, folder=str(bundle.folder), chunk=CHUNK
    )
    killed = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        timeout=60,
    )
    assert killed.returncode == -signal.SIGKILL
    assert [found.complete for found in deployed(transport)] == [False]
    done = push(transport, bundle)
    assert_whole(local_device, bundle, done)
    assert done.bytes_sent <= whole_bytes(bundle) - after + CHUNK
    assert done.bytes_present >= after - CHUNK


def test_a_restarted_device_is_waited_for(
    make_local_device: MakeLocalDevice,
    bundle: Bundle,
    kind: str,
) -> None:
    device = make_local_device()
    with connected(device.port, kind) as transport:
        done = push(transport, bundle, progress=once(2 * CHUNK + 5, device.restart))
    assert done.reconnections >= 1
    assert done.bytes_sent <= whole_bytes(bundle) + CHUNK
    assert_whole(device, bundle, done)


def test_bytes_that_change_on_the_storage_are_sent_again(
    local_device: LocalDevice,
    transport: Transport,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part = local_device.path(f"{DEVICE_ROOT}/staging/{bundle.files['head.pte'].sha256}.part")

    plain = transport.push

    def push_and_damage(source: BinaryIO, remote: str, length: int, **options: Any) -> None:
        plain(source, remote, length, **options)
        if options["offset"] == 4 * CHUNK and not damaged:
            with part.open("r+b") as file:
                file.seek(4 * CHUNK)
                first = file.read(1)
                file.seek(4 * CHUNK)
                file.write(bytes([first[0] ^ 1]))
            damaged.append(part)

    damaged: list[Path] = []
    monkeypatch.setattr(transport, "push", push_and_damage)
    done = push(transport, bundle)
    assert damaged
    assert_whole(local_device, bundle, done)
    assert done.bytes_sent == whole_bytes(bundle) + CHUNK


def test_a_small_file_system(
    make_local_device: MakeLocalDevice,
    bundle: Bundle,
    tmp_path: Path,
    kind: str,
) -> None:
    """Refused before anything is sent; filled by somebody else on the way; then with room."""
    device = make_local_device(data_bytes=40 * CHUNK)
    large = make_bundle(tmp_path / "large", {"head.pte": bytes(48 * CHUNK)})
    with connected(device.port, kind) as transport, connected(device.port) as somebody:
        with pytest.raises(StorageFull, match="MiB free, this bundle needs"):
            push(transport, large)
        assert clean(transport).bytes < CHUNK, "something was sent"

        def fill() -> None:
            somebody.shell("dd if=/dev/zero of=/data/filler bs=1048576")

        with pytest.raises(StorageFull):
            push(transport, bundle, progress=once(3 * CHUNK, fill))
        assert [found.complete for found in deployed(transport)] == [False]
        run_checked(transport, "rm /data/filler")
        done = push(transport, bundle)
        assert done.bytes_present >= 2 * CHUNK
        (found,) = deployed(transport)
        assert found.complete and found.bytes == whole_bytes(bundle)


def test_two_pushes_at_once(
    local_device: LocalDevice,
    transport: Transport,
    bundle: Bundle,
    kind: str,
) -> None:
    done: list[Deployment] = []

    def one() -> None:
        with connected(local_device.port, kind) as own:
            done.append(push(own, bundle))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 2
    assert_whole(local_device, bundle, done[0])
