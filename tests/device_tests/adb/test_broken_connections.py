"""Connections that break and come back, by both ways."""

from __future__ import annotations

import io
import os
import subprocess
import threading
from pathlib import Path

import adbutils
import pytest

from device_tests.adb import server as adb_server
from device_tests.adb.server import ServerAddress, open_server
from device_tests.errors import DeviceGone
from device_tests.local.device import LocalDevice
from device_tests.local.fixture import MakeLocalDevice
from quantize.errors import DeviceError
from tests.support.adb_double import AdbDouble
from tests.support.adb_ways import Device, Way, pull, push
from tests.support.bench_tools import wait_for

MIB = 1024 * 1024


def test_cut_in_a_push_is_gone_then_goes_on(double: AdbDouble, tmp_path: Path, way: Way) -> None:
    data, remote = os.urandom(4 * MIB), str(tmp_path / "file")
    with way.open(double.port) as transport:
        double.faults.cut_after = 2 * MIB
        with pytest.raises(DeviceGone, match="connection"):
            push(transport, data, remote)
        assert double.faults.fired == ["cut_after"]
        transport.reconnect(10)
        written = (tmp_path / "file").stat().st_size
        assert 0 < written < len(data)
        push(transport, data[written:], remote, written)
    assert (tmp_path / "file").read_bytes() == data


def test_cut_in_a_pull_is_gone(double: AdbDouble, tmp_path: Path, way: Way) -> None:
    (tmp_path / "file").write_bytes(bytes(4 * MIB))
    with way.open(double.port) as transport:
        double.faults.cut_after = 2 * MIB
        with pytest.raises(DeviceGone, match="connection"):
            pull(transport, str(tmp_path / "file"))
        transport.reconnect(10)
        assert len(pull(transport, str(tmp_path / "file"))) == 4 * MIB


def test_direct_transport_connects_again_by_itself(double: AdbDouble, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4 * MIB))
    with Way().open(double.port) as transport:
        double.faults.cut_after = 2 * MIB
        with pytest.raises(DeviceGone):
            pull(transport, str(tmp_path / "file"))
        assert len(pull(transport, str(tmp_path / "file"))) == 4 * MIB


def test_cut_at_every_packet_of_a_command_is_gone(double: AdbDouble, way: Way) -> None:
    for cut in range(120, 600, 24 if way.server is None else 96):
        with way.open(double.port) as transport:
            double.faults.cut_after, double.faults.fired = cut, []
            try:
                transport.shell("echo out; echo err >&2")
            except DeviceGone:
                assert double.faults.fired == ["cut_after"]
            double.faults.cut_after = None
            transport.reconnect(10)  # the cut may have come after the reply
            assert transport.shell("echo on").stdout == b"on\n"


def test_silent_device_is_gone(double: AdbDouble, way: Way) -> None:
    with way.open(double.port) as transport:
        double.faults.stall_after = 0
        with pytest.raises(DeviceGone, match="did not begin"):
            transport.shell("echo", timeout_s=0.3)
        assert double.faults.fired == ["stall_after"]


def test_device_that_stalls_in_a_push_is_gone(double: AdbDouble, tmp_path: Path, way: Way) -> None:
    with way.open(double.port, stall_s=0.3) as transport:
        double.faults.stall_after = MIB
        with pytest.raises(DeviceGone, match="moved nothing"):
            push(transport, bytes(4 * MIB), str(tmp_path / "file"))
        assert double.faults.fired == ["stall_after"]
        if way.server is None:
            assert transport.shell("echo on").stdout == b"on\n"


def test_corrupted_chunk_arrives_and_differs_by_a_bit(
    double: AdbDouble, tmp_path: Path, way: Way
) -> None:
    """Nothing in adb's protocol sees it: what is pushed must be verified by its hash."""
    data = bytes(2 * MIB)
    with way.open(double.port) as transport:
        double.faults.corrupt_after = MIB
        push(transport, data, str(tmp_path / "file"))
        written = (tmp_path / "file").read_bytes()
        assert len(written) == len(data) and sum(written) == 0x10
        push(transport, data, str(tmp_path / "file"))
        assert (tmp_path / "file").read_bytes() == data


def test_reconnect_waits_for_a_restart(tmp_path: Path, way: Way) -> None:
    first = AdbDouble(tmp_path)
    ended = threading.Event()
    with first.running() as running, way.open(running.port) as transport:
        first.stop()
        with pytest.raises(DeviceGone, match="did not come back"):
            transport.reconnect(0.2)
        second = AdbDouble(tmp_path, port=first.port)

        def come_back() -> None:
            with second.running():
                ended.wait(20)

        returning = threading.Thread(target=come_back)
        returning.start()
        transport.reconnect(20)
        assert transport.shell("echo back").stdout == b"back\n"
        ended.set()
        returning.join()


def test_closed_transport_says_so(device: Device) -> None:
    transport = device.transport
    transport.close()
    for call in (
        lambda: transport.shell("echo"),
        lambda: transport.reconnect(1),
        lambda: transport.stat("/file"),
        lambda: push(transport, b"data", "/file"),
        lambda: transport.pull("/file", io.BytesIO()),
    ):
        with pytest.raises(DeviceError, match="closed"):
            call()
    with pytest.raises(DeviceError, match="closed"), transport.forward("tcp:1"):
        pass


@pytest.mark.parametrize("size", [MIB, 16 * MIB], ids=["one stream", "two streams"])
def test_interrupted_call_leaves_the_transport_usable(
    device: Device, tmp_path: Path, size: int
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "data").write_bytes(bytes(size))
    with (tmp_path / "data").open("rb") as source, pytest.raises(KeyboardInterrupt):
        device.transport.push(source, f"{device.folder}/file", size, progress=interrupt)
    assert device.transport.shell("echo on").stdout == b"on\n"


def test_adbd_restarted_is_found_again(make_local_device: MakeLocalDevice) -> None:
    local = make_local_device()
    with Way().open(local.port) as transport:
        push(transport, b"kept", "/data/local/tmp/file")
        local.restart()
        with pytest.raises(DeviceGone):
            transport.shell("echo")
        transport.reconnect(20)
        assert pull(transport, "/data/local/tmp/file") == b"kept"


def test_device_that_restarts_in_a_push_is_gone_and_comes_back(
    make_local_device: MakeLocalDevice, way: Way, tmp_path: Path
) -> None:
    device = make_local_device()
    size, remote = 64 * MIB, "/data/local/tmp/file"
    (tmp_path / "data").write_bytes(bytes(size))
    stopped: list[int] = []

    def stop(moved: int) -> None:
        if not stopped and moved > size // 4:
            stopped.append(moved)
            device.stop()

    with way.open(device.port) as transport, (tmp_path / "data").open("rb") as source:
        with pytest.raises(DeviceGone):
            transport.push(source, remote, size, progress=stop)
        with pytest.raises(DeviceGone):
            transport.shell("true")
        with pytest.raises(DeviceGone, match=r"did not come back within 0\.1 s"):
            transport.reconnect(0.1)
        device.start()
        transport.reconnect(20)
        source.seek(0)
        transport.push(source, remote, size)
        found = transport.stat(remote)
        assert found is not None and found.size_bytes == size


def test_device_that_goes_during_a_command(make_local_device: MakeLocalDevice, way: Way) -> None:
    device = make_local_device()
    begun = device.path("/data/local/tmp/begun")

    def stop() -> None:
        wait_for(begun.exists)
        device.stop()

    stopper = threading.Thread(target=stop)
    with way.open(device.port) as transport:
        stopper.start()
        with pytest.raises(DeviceGone, match=f"connection to {transport.serial} is broken"):
            transport.shell("touch /data/local/tmp/begun; sleep 30", timeout_s=25)
        stopper.join()


def test_server_that_goes_during_a_command(
    shared_device: LocalDevice, no_server: ServerAddress
) -> None:
    adb_server.start_server()
    transport = open_server(shared_device.serial)
    begun = shared_device.path("/data/local/tmp/begun")

    def kill() -> None:
        wait_for(begun.exists)
        subprocess.run([adbutils.adb_path(), "kill-server"], check=False)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(DeviceGone):
        transport.shell("touch /data/local/tmp/begun; sleep 30", timeout_s=25)
    killer.join()
    with pytest.raises(DeviceGone, match="did not come back"):
        transport.reconnect(0.3)
