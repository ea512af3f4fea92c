"""Files to and from a device, by both ways, on the double and on the real adbd."""

from __future__ import annotations

import hashlib
import io
import os
import random
import shlex
import stat
from pathlib import Path

import pytest

from device_tests.errors import CommandFailed, StorageFull
from device_tests.local.fixture import MakeLocalDevice
from quantize.errors import DeviceError
from tests.support.adb_ways import Device, Way, pull, push

MIB = 1024 * 1024


def test_file_makes_the_round_trip(device: Device) -> None:
    data, moved = os.urandom(3 * MIB + 17), []
    remote = f"{device.folder}/a 'file' $HOME"
    device.transport.push(io.BytesIO(data), remote, len(data), progress=moved.append)
    assert moved == sorted(moved) and moved[-1] == len(data)
    assert pull(device.transport, remote) == data


def test_ranges_are_written_and_read_like_a_file(device: Device) -> None:
    """Against a model in memory: offsets around block borders, beyond the end, of no bytes."""
    numbers = random.Random(3)
    remote, model = f"{device.folder}/file", bytearray()
    borders = [0, 1, 4095, 4096, 4097, 65536, MIB - 1, MIB, MIB + 4096, 2 * MIB]
    for _ in range(40):
        offset = numbers.choice([*borders, numbers.randrange(2 * MIB)])
        data = numbers.randbytes(numbers.choice([0, 1, 100, 4096, 70_000]))
        push(device.transport, data, remote, offset)
        if data:
            model.extend(bytes(max(0, offset + len(data) - len(model))))
            model[offset : offset + len(data)] = data
        start, length = numbers.choice(borders), numbers.choice([0, 1, 5000, 3 * MIB])
        part = pull(device.transport, remote, offset=start, length=length)
        assert part == model[start : start + length]
    assert pull(device.transport, remote) == model


@pytest.mark.parametrize("plain_file", [True, False], ids=["file", "stream"])
def test_pieces_at_any_offset_make_the_file(
    device: Device, tmp_path: Path, plain_file: bool
) -> None:
    """In another order, with unround lengths, over what is there; large enough for two streams."""
    data = random.Random(5).randbytes(20 * MIB + 12345)
    local, remote = tmp_path / "data", f"{device.folder}/pieces of 'file'"
    local.write_bytes(data)
    pieces = [(11 * MIB + 3, len(data)), (0, 4097), (4000, 5 * MIB)]
    pieces += [(5 * MIB - 65536, 10 * MIB), (10 * MIB, 11 * MIB + 3)]
    for begin, end in pieces:
        moved: list[int] = []
        with local.open("rb") if plain_file else io.BytesIO(data) as source:
            source.seek(begin)
            device.transport.push(source, remote, end - begin, offset=begin, progress=moved.append)
            assert source.tell() == end
        assert moved == sorted(moved) and moved[-1] == end - begin
    found = device.transport.stat(remote)
    assert found is not None and found.size_bytes == len(data)
    there = device.transport.shell(f"sha256sum < {shlex.quote(remote)}").text.split()[0]
    assert there == hashlib.sha256(data).hexdigest()

    assert pull(device.transport, remote) == data
    for length in (777, 1000):
        part = pull(device.transport, remote, offset=12345, length=length)
        assert part == data[12345 : 12345 + length]
    assert len(pull(device.transport, remote, offset=len(data) - 700, length=1500)) == 700
    assert pull(device.transport, remote, offset=len(data)) == b""


def test_push_never_shortens(device: Device) -> None:
    remote = f"{device.folder}/long"
    for data in (b"0123456789", b"ab", b""):
        push(device.transport, data, remote)
    assert device.transport.shell(f"cat {remote}").stdout == b"ab23456789"


def test_sizes_beyond_4_gib_are_exact(device: Device) -> None:
    remote, beyond = f"{device.folder}/sparse", 5 * 2**30 + 77
    push(device.transport, b"tail", remote, beyond)
    found = device.transport.stat(remote)
    assert found is not None and found.size_bytes == beyond + 4
    assert pull(device.transport, remote, offset=beyond - 2) == b"\0\0tail"
    device.transport.shell(f"rm {remote}")


def test_push_takes_only_its_length_of_the_source(device: Device) -> None:
    source = io.BytesIO(b"headbodytail")
    source.seek(4)
    device.transport.push(source, f"{device.folder}/body", 4)
    assert source.read() == b"tail"
    assert pull(device.transport, f"{device.folder}/body") == b"body"


def test_empty_push_makes_the_file(device: Device) -> None:
    push(device.transport, b"", f"{device.folder}/empty")
    found = device.transport.stat(f"{device.folder}/empty")
    assert found is not None and found.size_bytes == 0


def test_stat_follows_links_and_tells_what_is_there(device: Device) -> None:
    device.transport.shell(
        f"cd {device.folder} && printf 12345 > '-f l' && chmod 640 -- '-f l' && "
        "ln -s -- '-f l' link && ln -s no dead"
    )
    found = device.transport.stat(f"{device.folder}/link")
    assert found is not None and (found.size_bytes, found.mode) == (5, 0o100640)
    assert abs(found.modified_s - int(device.transport.shell("date +%s").text)) < 60
    folder = device.transport.stat(device.folder)
    assert folder is not None and stat.S_ISDIR(folder.mode)
    assert device.transport.stat(f"{device.folder}/dead") is None
    assert device.transport.stat(f"{device.folder}/nothing") is None


@pytest.mark.parametrize("length", [10, 5 * MIB, 30 * MIB], ids=["small", "large", "two streams"])
def test_what_cannot_be_written_or_read_is_said(
    device: Device, tmp_path: Path, length: int
) -> None:
    transport = device.transport
    (tmp_path / "data").write_bytes(bytes(length))
    with (tmp_path / "data").open("rb") as source:
        with pytest.raises(CommandFailed, match=r"no/such/folder/file.*No such file"):
            transport.push(source, f"{device.folder}/no/such/folder/file", length)
        source.seek(0)
        with pytest.raises(DeviceError, match="ended 1 bytes early") as early:
            transport.push(source, f"{device.folder}/short", length + 1)
        assert early.type is DeviceError
    with pytest.raises(CommandFailed, match="No such file"):
        pull(transport, f"{device.folder}/nothing")
    with pytest.raises(CommandFailed, match="directory"):
        pull(transport, device.folder)
    assert transport.shell("echo on").stdout == b"on\n"


def test_fault_here_is_not_taken_for_the_devices(device: Device) -> None:
    class Broken(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise OSError(5, "Input/output error")

        def write(self, *_: object) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(DeviceError, match="cannot be read") as refused:
        device.transport.push(Broken(), f"{device.folder}/broken", 10)
    assert refused.type is DeviceError
    with pytest.raises(DeviceError, match="cannot be written here") as refused:
        device.transport.pull("/proc/version", Broken())
    assert refused.type is DeviceError
    assert device.transport.shell("echo on").stdout == b"on\n"


def test_full_storage_is_said(device: Device) -> None:
    with pytest.raises(StorageFull, match="No space left"):
        push(device.transport, bytes(5 * MIB), "/dev/full")
    assert device.transport.shell("echo on").stdout == b"on\n"


def test_full_file_system_of_a_device_is_said(
    make_local_device: MakeLocalDevice, way: Way, tmp_path: Path
) -> None:
    (tmp_path / "data").write_bytes(bytes(40 * MIB))
    with way.open(make_local_device(data_bytes=4 * MIB).port) as transport:
        remote = "/data/local/tmp/file"
        with (tmp_path / "data").open("rb") as source, pytest.raises(StorageFull, match="No space"):
            transport.push(source, remote, 40 * MIB)
        with pytest.raises(StorageFull, match="No space"):
            push(transport, bytes(8 * MIB), remote)
        push(transport, b"small", remote)  # over what is there
