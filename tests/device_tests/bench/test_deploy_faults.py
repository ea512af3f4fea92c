"""Push: broken connections, damage, and no room. CPU only, no model.

The device is a folder, whose transport injects faults at a byte or a command. What a real adbd
adds is in `test_deploy_adbd.py`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device_tests.bench.deploy import deploy
from device_tests.bench.inventory import bundle_id, deployed
from device_tests.bench.transfer import TransferDamaged
from device_tests.errors import CommandFailed, DeviceGone, ProtocolError, StorageFull
from device_tests.remote.shell import run_checked
from export.contract.bundle import Bundle, open_bundle
from export.contract.manifest import FileEntry
from quantize.errors import BundleError
from tests.support.folder_transport import FolderTransport
from tests.support.push_tools import (
    CHUNK,
    assert_nothing_to_run,
    assert_whole,
    make_bundle,
    push,
    random_bytes,
    whole_bytes,
)

# Interruptions


@pytest.mark.parametrize("after", [0, 1, CHUNK - 1, CHUNK, 3 * CHUNK + 17, 5 * CHUNK + 1000])
def test_a_broken_connection_costs_at_most_a_chunk(
    bundle: Bundle, device: FolderTransport, root: str, after: int
) -> None:
    device.cut_after_bytes = after
    done = push(device, bundle, root)
    assert_whole(bundle, root)
    assert done.reconnections == 1
    assert whole_bytes(bundle) <= device.bytes_pushed <= whole_bytes(bundle) + CHUNK
    assert done.bytes_sent == device.bytes_pushed


@pytest.mark.parametrize("after", [1, 2 * CHUNK + 5, 6 * CHUNK])
def test_the_next_process_goes_on_where_the_device_went_away(
    bundle: Bundle, device: FolderTransport, root: str, after: int
) -> None:
    device.cut_after_bytes = after
    device.comes_back = False
    with pytest.raises(DeviceGone, match=r"did not come back .* what arrived is kept"):
        push(device, bundle, root)
    assert_nothing_to_run(root)
    (left,) = deployed(device := FolderTransport(), root=root)
    assert not left.complete
    done = push(device, bundle, root)
    assert_whole(bundle, root)
    assert done.bytes_sent <= whole_bytes(bundle) - after + CHUNK
    assert done.bytes_sent + done.bytes_present == whole_bytes(bundle)


@pytest.mark.parametrize(
    "command",
    ["mkdir -p", "ls -a", "stat -f", "sha256", "h=$(", "mv -f", "sync;", "rm -rf", "boot_id"],
)
def test_a_lost_answer_is_asked_for_again(
    bundle: Bundle, device: FolderTransport, root: str, command: str
) -> None:
    device.cut_commands = [command]
    done = push(device, bundle, root)
    assert done.reconnections == 1
    assert_whole(bundle, root)
    assert done.bytes_sent == whole_bytes(bundle), "a lost answer made something be sent again"


def test_a_connection_that_always_breaks_ends_the_push(
    bundle: Bundle, device: FolderTransport, root: str
) -> None:
    def cut(remote: str, offset: int) -> None:
        device.cut_after_bytes = 0

    device.before_push = cut
    with pytest.raises(DeviceGone, match="broke 6 times in a row"):
        push(device, bundle, root)
    assert_nothing_to_run(root)


def test_a_restart_that_lost_what_was_verified(
    bundle: Bundle, device: FolderTransport, root: str
) -> None:
    """The power fails before the storage has the bytes: files shrink or hold zeros."""

    def lose(part: str = "layers.pte") -> None:
        for path in Path(root, "staging").glob("*.dir/head.pte"):
            path.write_bytes(bytes(path.stat().st_size))
        for path in Path(root, "staging").glob("*.part"):
            os.truncate(path, min(path.stat().st_size, CHUNK // 2))
        boot = "echo another"
        device.shell, plain = (
            lambda command, timeout_s=30.0: plain(
                boot if "boot_id" in command else command, timeout_s=timeout_s
            ),
            device.shell,
        )

    device.before_reconnect = lose
    device.cut_after_bytes = bundle.files["head.pte"].bytes + CHUNK + 100
    done = push(device, bundle, root)
    assert done.reconnections == 1
    assert_whole(bundle, root)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cuts=st.lists(st.integers(1, 3 * CHUNK), max_size=5),
    damage=st.lists(st.integers(0, 9 * CHUNK), max_size=2),
    lost=st.lists(st.sampled_from(["mv -f", "sha256", "stat", "sync", "rm -rf"]), max_size=3),
)
def test_whatever_breaks_the_bundle_is_whole_or_absent(
    bundle: Bundle, tmp_path: Path, cuts: list[int], damage: list[int], lost: list[str]
) -> None:
    root = str(tmp_path / "any" / "pocketdiff")
    shutil.rmtree(root, ignore_errors=True)
    device = FolderTransport()
    device.cut_commands = list(lost)
    device.cut_after_bytes = cuts[0] if cuts else None
    left, hits, sent = cuts[1:], sorted(damage), 0

    def next_cut() -> None:
        if left and device.cut_after_bytes is None:
            device.cut_after_bytes = left.pop(0)

    def flip(offset: int, data: bytes) -> bytes:
        nonlocal sent
        sent += len(data)
        if hits and sent > hits[0]:
            hits.pop(0)
            return bytes([data[0] ^ 1]) + data[1:]
        return data

    def check(command: str) -> None:
        bundles = Path(root, "bundles")
        for folder in bundles.iterdir() if bundles.exists() else ():
            open_bundle(folder, verify=True)

    device.before_reconnect, device.damage, device.before_shell = next_cut, flip, check
    push(device, bundle, root)
    assert_whole(bundle, root)
    assert device.bytes_pushed <= whole_bytes(bundle) + (len(cuts) + len(damage)) * CHUNK


# Damage


def test_a_chunk_damaged_on_the_way_is_sent_again_alone(
    bundle: Bundle, device: FolderTransport, root: str
) -> None:
    hits = []

    def flip(offset: int, data: bytes) -> bytes:
        if offset == 2 * CHUNK + 8192 and not hits:
            hits.append(offset)
            return bytes([data[0] ^ 1]) + data[1:]
        return data

    device.damage = flip
    done = push(device, bundle, root)
    assert hits
    assert_whole(bundle, root)
    assert done.bytes_sent == whole_bytes(bundle) + CHUNK


def test_damage_that_does_not_end_is_reported(
    bundle: Bundle, device: FolderTransport, root: str
) -> None:
    device.damage = lambda offset, data: bytes([data[0] ^ 1]) + data[1:]
    with pytest.raises(TransferDamaged, match=r"head\.pte has other bytes .* 3 times"):
        push(device, bundle, root)
    assert_nothing_to_run(root)


def test_of_a_damaged_staged_file_only_the_bad_chunks_are_sent(
    bundle: Bundle, device: FolderTransport, root: str
) -> None:
    content = bytearray(bundle.path("head.pte").read_bytes())
    content[CHUNK + 5] ^= 1
    content[4 * CHUNK] ^= 1
    part = Path(root, "staging", f"{bundle.files['head.pte'].sha256}.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(content)
    done = push(device, bundle, root)
    assert_whole(bundle, root)
    rest = whole_bytes(bundle) - len(content)
    assert done.bytes_sent == rest + 2 * CHUNK
    assert done.bytes_present == len(content) - 2 * CHUNK


@pytest.mark.parametrize("kind", ["too long", "a link", "a folder", "empty"])
def test_a_staged_file_that_cannot_be_ours(
    bundle: Bundle, device: FolderTransport, root: str, tmp_path: Path, kind: str
) -> None:
    part = Path(root, "staging", f"{bundle.files['head.pte'].sha256}.part")
    part.parent.mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    match kind:
        case "too long":
            part.write_bytes(bundle.path("head.pte").read_bytes() + b"x")
        case "a link":
            part.symlink_to(outside)
        case "a folder":
            (part / "inner").mkdir(parents=True)
        case "empty":
            part.touch()
    push(device, bundle, root)
    assert_whole(bundle, root)
    assert outside.read_bytes() == b"precious"


def test_within_a_chunk_sending_goes_on_at_a_whole_mebibyte(
    device: FolderTransport, root: str, tmp_path: Path
) -> None:
    content = random_bytes(7 * 2**20)
    bundle = make_bundle(tmp_path / "bundle", {"head.pte": content})
    part = Path(root, "staging", f"{bundle.files['head.pte'].sha256}.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(content[: 6 * 2**20 + 5])
    done = deploy(device, bundle, root=root, chunk_bytes=4 * 2**20)
    assert_whole(bundle, root)
    assert device.pushed[0] == (str(part), 6 * 2**20, 2**20)
    assert done.bytes_present == 6 * 2**20


@pytest.mark.parametrize("kind", ["a link", "a folder", "wrong bytes"])
def test_a_verified_file_that_is_none(
    bundle: Bundle, device: FolderTransport, root: str, tmp_path: Path, kind: str
) -> None:
    """Something else has the place of a file in the bundle that is being put together."""
    name = bundle_id((bundle.folder / "bundle.json").read_bytes())
    target = Path(root, "staging", f"{name}.dir", "head.pte")
    target.parent.mkdir(parents=True)
    match kind:
        case "a link":
            target.symlink_to(bundle.path("head.pte"))
        case "a folder":
            (target / "inner").mkdir(parents=True)
        case "wrong bytes":
            target.write_bytes(bytes(bundle.files["head.pte"].bytes))
    push(device, bundle, root)
    assert_whole(bundle, root)
    assert not Path(root, "bundles", name, "head.pte").is_symlink()


def test_a_deployed_bundle_that_was_damaged_is_repaired(
    bundle: Bundle, device: FolderTransport, root: str
) -> None:
    first = push(device, bundle, root)
    Path(first.remote_folder, "layers.pte").write_bytes(b"short")
    (found,) = deployed(device, root=root)
    assert not found.complete
    done = push(device, bundle, root)
    assert_whole(bundle, root)
    assert done.bytes_sent == bundle.files["layers.pte"].bytes


def test_local_files_that_are_not_what_the_manifest_says(
    bundle: Bundle, device: FolderTransport, root: str
) -> None:
    path = bundle.path("head.pte")
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(BundleError, match=r"head\.pte is not what bundle\.json says"):
        push(device, bundle, root)
    path.write_bytes(b"short")
    with pytest.raises(BundleError, match="has 5 bytes, expected"):
        push(device, bundle, root)
    path.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        push(device, bundle, root)
    (bundle.folder / "bundle.json").write_text('{"files": {}}')
    with pytest.raises(BundleError, match="changed since it was opened"):
        push(device, bundle, root)
    assert_nothing_to_run(root)


@pytest.mark.parametrize("reply", [b"", b"-1 x", b"no such command", b"9" * 40, b"\xff\xfe", b"ok"])
@pytest.mark.parametrize("command", ["stat -c", "stat -f", "mv -f"])
def test_a_device_that_answers_nonsense(
    bundle: Bundle, root: str, reply: bytes, command: str
) -> None:
    device = FolderTransport()
    plain = device.shell

    def shell(text: str, *, timeout_s: float = 30.0):
        result = plain(text, timeout_s=timeout_s)
        return type(result)(0, reply, b"") if command in text else result

    device.shell = shell
    with pytest.raises(ProtocolError):
        push(device, bundle, root)


# Room


def test_a_bundle_without_room_is_refused_before_anything_is_sent(
    device: FolderTransport, root: str, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle", {"huge": b"h"})
    huge = 2**43
    document = json.loads((bundle.folder / "bundle.json").read_text())
    document["files"]["huge"]["bytes"] = huge
    (bundle.folder / "bundle.json").write_text(json.dumps(document))
    bundle = Bundle(
        bundle.folder,
        bundle.manifest,
        {"huge": FileEntry(huge, bundle.files["huge"].sha256)},
        verified=False,
    )
    with pytest.raises(StorageFull, match=r"has [\d,.]+ MiB free, this bundle needs 8,472,"):
        push(device, bundle, root)
    assert device.pushed == []


def test_room_that_runs_out_keeps_what_was_sent(
    bundle: Bundle, device: FolderTransport, root: str
) -> None:
    device.capacity_bytes = 3 * CHUNK
    with pytest.raises(StorageFull):
        push(device, bundle, root)
    assert_nothing_to_run(root)
    device.capacity_bytes = None
    assert push(device, bundle, root).bytes_present == 3 * CHUNK
    assert_whole(bundle, root)


def test_commands_say_when_there_is_no_room() -> None:
    full = "dd: write error: No space left on device"
    with pytest.raises(StorageFull, match=r"no room left .*pocketdiff clean"):
        run_checked(FolderTransport(), f"echo '{full}' >&2; exit 1")
    with pytest.raises(CommandFailed, match=r"ended with 3 \(oh no\)"):
        run_checked(FolderTransport(), "echo oh no >&2; exit 3")
    with pytest.raises(CommandFailed, match="killed by signal 9"):
        run_checked(FolderTransport(), "kill -9 $$")
