"""Push, listing and removal of bundles. CPU only, no model.

The device is a folder, whose transport injects faults at a byte or a command. What a real adbd
adds is in `test_deploy_adbd.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device_tests.bench.deploy import deploy
from device_tests.bench.inventory import bundle_id, clean, deployed
from device_tests.bench.transfer import TransferDamaged
from device_tests.errors import (
    CommandFailed,
    DeviceBusy,
    DeviceGone,
    ProtocolError,
    StorageFull,
)
from device_tests.remote import files as remote_files
from device_tests.remote.shell import run_checked
from export.contract.bundle import (
    Bundle,
    FileEntry,
    Manifest,
    ModelInfo,
    Sampler,
    SpecialTokens,
    Stage,
    TensorSpec,
    open_bundle,
    write_bundle,
)
from quantize.errors import BundleError, InputError
from tests.support.folder_transport import FolderTransport
from tests.support.small_systems import SMALL_SYSTEMS, small_device

CHUNK = 64 * 1024
ODD_NAMES = (
    "with space.bin", "it's.bin", "$(reboot).bin", "-rf", "ünïcode 模型.bin", "a;b&c`d`.bin",
    "%s%n.bin", "deep/er/-x.bin", "#!.bin", "~", "=", "e{m,p}[t]y!.bin",
)  # fmt: skip


def random_bytes(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


def make_bundle(folder: Path, files: dict[str, bytes], name: str = "toy") -> Bundle:
    """A bundle of any files; the stage's program is one of them."""
    spec = (TensorSpec("x", "int64", (1,)),)
    manifest = Manifest(
        model=ModelInfo("toy", name, 29, 8, 6, 40),
        style="uniform_diffusion",
        sampler=Sampler("entropy_bound", {}),
        special_tokens=SpecialTokens(),
        stages=(Stage("head", "head", next(iter(files)), spec, spec),),
        backend="portable",
        versions={},
    )
    return write_bundle(folder, manifest, files)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Two files of several chunks, one smaller than a chunk."""
    files = {
        "head.pte": random_bytes(5 * CHUNK + 1000, 1),
        "layers.pte": random_bytes(3 * CHUNK, 2),
        "tokenizer.json": random_bytes(100, 3),
    }
    return make_bundle(tmp_path / "bundle", files)


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "device" / "pocketdiff")


@pytest.fixture
def device() -> FolderTransport:
    return FolderTransport()


def push(device: FolderTransport, bundle: Bundle, root: str, **options: object):
    return deploy(device, bundle, root=root, chunk_bytes=CHUNK, retry_s=1.0, **options)


def manifest_bytes(bundle: Bundle) -> int:
    return (bundle.folder / "bundle.json").stat().st_size


def whole_bytes(bundle: Bundle) -> int:
    return bundle.total_bytes + manifest_bytes(bundle)


def assert_whole(bundle: Bundle, root: str) -> None:
    """The bundle is on the device as it is here, and nothing is left beside it."""
    (folder,) = (Path(root) / "bundles").iterdir()
    assert folder.name == bundle_id((bundle.folder / "bundle.json").read_bytes())
    assert open_bundle(folder, verify=True).files == bundle.files
    here = sorted(p.relative_to(bundle.folder) for p in bundle.folder.rglob("*"))
    assert sorted(p.relative_to(folder) for p in folder.rglob("*")) == here
    assert list((Path(root) / "staging").iterdir()) == []


def assert_nothing_to_run(root: str) -> None:
    bundles = Path(root) / "bundles"
    assert not bundles.exists() or list(bundles.iterdir()) == []


# A push that goes well


def test_a_bundle_arrives_whole_and_is_described(
    bundle: Bundle, device: FolderTransport, root: str
) -> None:
    done = push(device, bundle, root)
    assert_whole(bundle, root)
    assert done.remote_folder == f"{root}/bundles/{done.bundle_id}"
    assert (done.files, done.reconnections, done.bytes_present) == (4, 0, 0)
    assert done.bytes_total == done.bytes_sent == device.bytes_pushed == whole_bytes(bundle)
    (found,) = deployed(device, root=root)
    assert found.complete and found.name == "toy" and found.bytes == done.bytes_total


def test_what_is_there_is_not_sent_again(
    bundle: Bundle, device: FolderTransport, root: str
) -> None:
    push(device, bundle, root)
    device.pushed.clear()
    again = push(device, bundle, root)
    assert device.pushed == []
    assert (again.bytes_sent, again.bytes_present) == (0, again.bytes_total)
    assert_whole(bundle, root)


def test_no_stream_is_longer_than_a_chunk(
    bundle: Bundle, device: FolderTransport, root: str
) -> None:
    push(device, bundle, root)
    assert max(count for _, _, count in device.pushed) == CHUNK


def test_names_odd_and_empty_files_and_subfolders_arrive(
    tmp_path: Path, device: FolderTransport, root: str
) -> None:
    files = {name: random_bytes(20, i) for i, name in enumerate(ODD_NAMES)} | {"empty": b""}
    bundle = make_bundle(tmp_path / "bundle", files)
    push(device, bundle, root)
    assert_whole(bundle, root)
    assert deployed(device, root=root)[0].complete


def test_a_root_that_must_be_quoted(
    bundle: Bundle, device: FolderTransport, tmp_path: Path
) -> None:
    root = str(tmp_path / "it's a $HOME; folder")
    push(device, bundle, root)
    assert_whole(bundle, root)
    assert clean(device, root=root, holder=lambda _: None).bundles == 1
    assert not Path(root).exists()


def test_commands_fit_into_the_smallest_message(
    tmp_path: Path, device: FolderTransport, root: str
) -> None:
    files = {f"{i:03}{'x' * 180}": b"%d" % i for i in range(25)}
    push(device, make_bundle(tmp_path / "bundle", files), root)
    deployed(device, root=root)
    clean(device, root=root, holder=lambda _: None)
    assert max(len(command.encode()) for command in device.commands) < 4000


def test_progress_grows_to_the_total(bundle: Bundle, device: FolderTransport, root: str) -> None:
    seen: list[tuple[int, int, str]] = []
    push(device, bundle, root, progress=lambda *report: seen.append(report))
    done = [report[0] for report in seen]
    assert done == sorted(done) and done[-1] == whole_bytes(bundle)
    assert {total for _, total, _ in seen} == {whole_bytes(bundle)}
    words = {what.split()[0] for _, _, what in seen}
    assert {"sending", "verifying"} <= words


# What is known on the device


def test_content_of_another_bundle_is_not_sent(
    bundle: Bundle, device: FolderTransport, root: str, tmp_path: Path
) -> None:
    push(device, bundle, root)
    other = make_bundle(
        tmp_path / "other",
        {"renamed.pte": bundle.path("head.pte").read_bytes(), "new": b"new"},
        name="other",
    )
    device.pushed.clear()
    done = push(device, other, root)
    assert done.bytes_sent == device.bytes_pushed == manifest_bytes(other) + 3
    assert done.bytes_present == bundle.files["head.pte"].bytes
    assert open_bundle(done.remote_folder, verify=True)
    clean(device, done.bundle_id, root=root, holder=lambda _: None)
    assert_whole(bundle, root)


def test_content_is_copied_where_links_are_forbidden(
    bundle: Bundle, root: str, tmp_path: Path
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "ln").write_text("#!/bin/sh\necho 'ln: Permission denied' >&2\nexit 1\n")
    (tools / "ln").chmod(0o755)
    device = FolderTransport(path=f"{tools}:{os.environ['PATH']}")
    push(device, bundle, root)
    content = bundle.path("head.pte").read_bytes()
    other = make_bundle(tmp_path / "other", {"a": content, "b": content}, name="other")
    done = push(device, other, root)
    assert done.bytes_sent == manifest_bytes(other)
    assert Path(done.remote_folder, "a").stat().st_nlink == 1
    assert open_bundle(done.remote_folder, verify=True)


def test_the_same_content_under_two_names_is_sent_once(
    device: FolderTransport, root: str, tmp_path: Path
) -> None:
    content = random_bytes(CHUNK)
    bundle = make_bundle(tmp_path / "bundle", {"a": content, "b": content})
    assert push(device, bundle, root).bytes_sent == CHUNK + manifest_bytes(bundle)
    assert_whole(bundle, root)


def test_damaged_content_of_another_bundle_is_not_used(
    bundle: Bundle, device: FolderTransport, root: str, tmp_path: Path
) -> None:
    first = push(device, bundle, root)
    damaged = Path(first.remote_folder, "head.pte")
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    other = make_bundle(tmp_path / "other", {"h": bundle.path("head.pte").read_bytes()})
    done = push(device, other, root)
    assert done.bytes_sent == whole_bytes(other)
    assert open_bundle(done.remote_folder, verify=True)


HOSTILE_MANIFESTS = {
    "no JSON": b"{",
    "not UTF-8": b"\xff\xfe{}",
    "deeply nested": b"[" * 100_000,
    "a list": b"[]",
    "no files": b"{}",
    "files are a list": b'{"files": []}',
    "odd entries": json.dumps(
        {"model": 5, "files": {"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}, "": 1,
         "a": {"bytes": True, "sha256": "0" * 64}, "b": {"bytes": -1, "sha256": "0" * 64},
         "c": {"bytes": 1, "sha256": "zz"}, "d\n": {"bytes": 1, "sha256": "0" * 64},
         "e": {"bytes": 10**400, "sha256": "0" * 64}, "f": None, "/g": {}}}
    ).encode(),
}  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE_MANIFESTS.values(), ids=HOSTILE_MANIFESTS.keys())
def test_a_hostile_manifest_on_the_device_harms_nothing(
    bundle: Bundle, device: FolderTransport, root: str, content: bytes
) -> None:
    folder = Path(root, "bundles", "0" * 16)
    folder.mkdir(parents=True)
    (folder / "bundle.json").write_bytes(content)
    done = push(device, bundle, root)
    assert open_bundle(done.remote_folder, verify=True)
    states = {found.bundle_id: found.complete for found in deployed(device, root=root)}
    assert states == {"0" * 16: False, done.bundle_id: True}


def test_a_manifest_that_promises_the_content_wrongly_is_found_out(
    bundle: Bundle, device: FolderTransport, root: str
) -> None:
    folder = Path(root, "bundles", "0" * 16)
    folder.mkdir(parents=True)
    entry = bundle.files["head.pte"]
    lie = {"files": {"lie": {"bytes": entry.bytes, "sha256": entry.sha256}}}
    (folder / "bundle.json").write_text(json.dumps(lie))
    (folder / "lie").write_bytes(bytes(entry.bytes))
    done = push(device, bundle, root)
    assert done.bytes_sent == whole_bytes(bundle)
    assert open_bundle(done.remote_folder, verify=True)
    assert (folder / "lie").read_bytes() == bytes(entry.bytes), "a link to it was written through"


# Hashing behind the sender


def test_every_byte_is_hashed_once(bundle: Bundle, root: str, tmp_path: Path) -> None:
    """Files of several chunks while they are sent, the others afterwards; none of them twice."""
    tools, log = tmp_path / "tools", tmp_path / "hashed"
    tools.mkdir()
    script = f"t=$(mktemp); cat >$t; wc -c <$t >>{log}; sha256sum <$t; rm $t"
    (tools / "openssl").write_text(f"#!/bin/sh\n{script}\n")
    (tools / "openssl").chmod(0o755)
    device = FolderTransport(path=f"{tools}:{os.environ['PATH']}")
    push(device, bundle, root)
    assert_whole(bundle, root)
    hashed = sorted(int(line) for line in log.read_text().split())
    known_text = len("pocketdiff")
    expected = [entry.bytes for entry in bundle.files.values()] + [manifest_bytes(bundle)]
    assert hashed == sorted([known_text, *expected])
    followed = [command for command in device.commands if "setsid" in command]
    assert len(followed) == 2, "head.pte and layers.pte have several chunks"


@pytest.mark.parametrize("setsid", ["exit 127", "exec sleep 0", "sleep 0.3; kill -9 $$"])
def test_without_a_hash_from_behind_the_file_is_hashed_in_the_end(
    bundle: Bundle, root: str, tmp_path: Path, setsid: str
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "setsid").write_text(f"#!/bin/sh\n{setsid}\n")
    (tools / "setsid").chmod(0o755)
    device = FolderTransport(path=f"{tools}:{os.environ['PATH']}")
    device.damage = lambda offset, data: bytes(len(data)) if offset == 0 else data
    with pytest.raises(TransferDamaged):
        push(device, bundle, root)
    assert_nothing_to_run(root)
    device.damage = lambda _, data: data
    push(device, bundle, root)
    assert_whole(bundle, root)


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


# Two at once


@pytest.mark.parametrize("at", range(10))
def test_another_push_of_the_bundle_comes_between(
    bundle: Bundle, device: FolderTransport, root: str, at: int
) -> None:
    """The other one runs as a whole before the push number `at` of this one."""

    def between(remote: str, offset: int) -> None:
        if len(device.pushed) == at:
            device.before_push = lambda remote, offset: None
            push(FolderTransport(), bundle, root)

    device.before_push = between
    done = push(device, bundle, root)
    assert_whole(bundle, root)
    assert done.bytes_sent <= whole_bytes(bundle)


def test_three_pushes_at_once(bundle: Bundle, root: str) -> None:
    errors: list[BaseException] = []

    def one() -> None:
        try:
            push(FolderTransport(), bundle, root)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert_whole(bundle, root)


# Removal


def nobody(_: object) -> None:
    return None


def test_clean_removes_ours_and_nothing_else(
    bundle: Bundle, device: FolderTransport, root: str, tmp_path: Path
) -> None:
    done = push(device, bundle, root)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    base = Path(root)
    (base / "bundles" / ("1" * 16)).symlink_to(outside)
    (base / "bundles" / "notes").mkdir()
    (Path(done.remote_folder) / "link").symlink_to(outside)
    (base / "staging" / f"{'2' * 16}.dir").mkdir()
    (base / "staging" / f"{'3' * 64}.part").write_bytes(bytes(10_000))
    (base / "staging" / "thesis.txt").write_text("mine")
    (base / "runs" / "run-1").mkdir()
    (base / "runs" / "run-1" / "result.json").write_text("{}")
    (base / "runs" / "run-2").symlink_to(outside)
    (base / "lock").mkdir()
    (base / "packed").mkdir()
    (base / "packed" / f"{done.bundle_id}-{'4' * 16}.packed").write_bytes(bytes(1000))
    removed = clean(device, root=root, holder=nobody)
    assert (removed.bundles, removed.runs) == (2, 2)
    assert removed.bytes >= done.bytes_total + 10_000
    assert (outside / "precious").read_text() == "precious"
    left = sorted(str(path.relative_to(base)) for path in base.rglob("*"))
    assert left == ["bundles", "bundles/notes", "staging", "staging/thesis.txt"]
    again = clean(device, root=root, holder=nobody)
    assert (again.bundles, again.runs, again.bytes) == (0, 0, 0)


def test_clean_of_one_bundle_leaves_the_others(
    bundle: Bundle, device: FolderTransport, root: str, tmp_path: Path
) -> None:
    other = push(device, make_bundle(tmp_path / "other", {"x": b"x"}), root)
    done = push(device, bundle, root)
    Path(root, "runs", "run-1").mkdir()
    Path(root, "packed").mkdir()
    for owner in (done, other):
        for suffix in ("packed", "json", "lock"):
            Path(root, "packed", f"{owner.bundle_id}-{'4' * 16}.{suffix}").write_text("x")
    removed = clean(device, done.bundle_id, root=root, holder=nobody)
    assert (removed.bundles, removed.runs) == (1, 0)
    assert [found.bundle_id for found in deployed(device, root=root)] == [other.bundle_id]
    assert Path(root, "runs", "run-1").exists()
    packed = [path.name[:16] for path in Path(root, "packed").iterdir()]
    assert packed == [other.bundle_id] * 3
    with pytest.raises(InputError, match="has no bundle"):
        clean(device, done.bundle_id, root=root, holder=nobody)


@pytest.mark.parametrize("folder", ["bundles", "staging", "runs", "packed"])
def test_a_link_in_place_of_our_folder_is_not_followed(
    device: FolderTransport, root: str, tmp_path: Path, folder: str
) -> None:
    outside = tmp_path / "outside"
    (outside / ("0" * 16)).mkdir(parents=True)
    (outside / f"{'0' * 16}-{'1' * 16}.packed").write_text("precious")
    Path(root).mkdir(parents=True)
    Path(root, folder).symlink_to(outside)
    clean(device, root=root, holder=nobody)
    assert len(list(outside.iterdir())) == 2
    assert not Path(root).exists()


def test_a_root_that_is_a_link_is_refused(
    device: FolderTransport, root: str, tmp_path: Path
) -> None:
    (tmp_path / "outside" / "bundles" / ("0" * 16)).mkdir(parents=True)
    Path(root).parent.mkdir()
    Path(root).symlink_to(tmp_path / "outside")
    with pytest.raises(CommandFailed, match="is a symbolic link"):
        clean(device, root=root, holder=nobody)
    assert (tmp_path / "outside" / "bundles" / ("0" * 16)).is_dir()


@pytest.mark.parametrize("bad", ["", "/", "/data", "data/x/y", "/data/../x", "/data//x", "/a/b/"])
def test_a_root_that_cannot_be_ours_is_refused(device: FolderTransport, bad: str) -> None:
    with pytest.raises(InputError):
        clean(device, root=bad, holder=nobody)
    assert device.commands == []


@pytest.mark.parametrize("bad", ["", "*", "..", "../bundles", "0" * 15, "0" * 16 + "/x", "A" * 16])
def test_what_is_no_bundle_id_is_refused(device: FolderTransport, root: str, bad: str) -> None:
    with pytest.raises(InputError, match="is not the id of a bundle"):
        clean(device, bad, root=root, holder=nobody)
    assert device.commands == []


def test_clean_waits_for_a_benchmark_unless_forced(
    bundle: Bundle, device: FolderTransport, root: str
) -> None:
    push(device, bundle, root)
    with pytest.raises(DeviceBusy, match="bench 7 is measuring"):
        clean(device, root=root, holder=lambda _: "bench 7")
    assert_whole(bundle, root)
    assert clean(device, root=root, holder=lambda _: "bench 7", force=True).bundles == 1


# The shells and tools of small systems


@pytest.mark.parametrize("system", SMALL_SYSTEMS)
def test_small_systems_do_the_same(system: str, bundle: Bundle, root: str, tmp_path: Path) -> None:
    (tmp_path / "system").mkdir()
    device = small_device(system, tmp_path / "system")
    device.cut_after_bytes = 2 * CHUNK + 100
    part = Path(root, "staging", f"{bundle.files['layers.pte'].sha256}.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(bundle.path("layers.pte").read_bytes()[: CHUNK + 1000] + bytes(CHUNK))
    done = push(device, bundle, root)
    assert_whole(bundle, root)
    assert (done.reconnections, done.bytes_present) == (1, CHUNK)
    files = {name: random_bytes(20, i) for i, name in enumerate(ODD_NAMES)} | {"empty": b""}
    files["known"] = bundle.path("head.pte").read_bytes()
    other = make_bundle(tmp_path / "other", files, name="other")
    assert push(device, other, root).bytes_present == bundle.files["head.pte"].bytes
    assert all(found.complete for found in deployed(device, root=root))
    assert clean(device, root=root, holder=nobody).bundles == 2
    assert not Path(root).exists()


# Beyond 4 GiB


@pytest.mark.parametrize("openssl", ["exit 127", f"echo {'0' * 64}; cat > /dev/null", None])
def test_the_hash_program_is_tried_before_it_is_relied_on(
    bundle: Bundle, root: str, tmp_path: Path, openssl: str | None
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    if openssl is not None:
        (tools / "openssl").write_text(f"#!/bin/sh\n{openssl}\n")
        (tools / "openssl").chmod(0o755)
    device = FolderTransport(path=f"{tools}:{os.environ['PATH']}")
    push(device, bundle, root)
    assert_whole(bundle, root)
    placing = [command for command in device.commands if "h=$(" in command]
    expected = "openssl dgst" if openssl is None and shutil.which("openssl") else "sha256sum"
    assert placing and all(expected in command for command in placing)


def test_chunks_beyond_4_gib_are_hashed_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.seek(5 * 2**30)
        file.write(b"here")
    run = FolderTransport()

    def runs(command: str, timeout_s: float):
        return run_checked(run, command, timeout_s)

    assert remote_files.sizes_bytes(runs, [str(path)]) == [5 * 2**30 + 4]
    (found,) = remote_files.chunk_sha256s(
        runs, str(path), 5 * 2**30, path.stat().st_size, 64 * 2**20, remote_files.SHA256SUM
    )
    assert found == hashlib.sha256(b"here").hexdigest()


def test_a_file_beyond_4_gib_goes_on_at_its_end(
    device: FolderTransport, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real sizes and offsets on sparse files; only the hashing of gigabytes is left out."""
    size = 5 * 2**30 + 123
    tools = tmp_path / "tools"
    tools.mkdir()
    bundle = make_bundle(tmp_path / "bundle", {"huge": b"h"})
    digest = bundle.files["huge"].sha256
    bundle = Bundle(bundle.folder, bundle.manifest, {"huge": FileEntry(size, digest)}, False)
    (bundle.folder / "bundle.json").write_text(json.dumps(bundle.to_json()))
    with bundle.path("huge").open("r+b") as file:
        file.truncate(size)
        file.seek(5 * 2**30)
        file.write(b"the end")
    part = Path(root, "staging", f"{digest}.part")
    part.parent.mkdir(parents=True)
    part.touch()
    os.truncate(part, 5 * 2**30)

    def same(*arguments: object) -> str:
        return "same"

    def chunks(run: object, path: str, begin: int, end: int, chunk: int, _: str) -> list[str]:
        return ["same"] * -(-(end - begin) // chunk)

    manifest = (bundle.folder / "bundle.json").read_bytes()
    other = hashlib.sha256(manifest).hexdigest()
    (tools / "sha256sum").write_text(
        f"#!/bin/sh\n[ $(stat -L -c %s /dev/stdin) = {size} ] && echo {digest} || echo {other}\n"
    )
    (tools / "sha256sum").chmod(0o755)
    monkeypatch.setattr(remote_files, "hash_program", lambda _: remote_files.SHA256SUM)
    monkeypatch.setattr(remote_files, "chunk_sha256s", chunks)
    monkeypatch.setattr("device_tests.bench.transfer._sha256_of_range", same)
    device = FolderTransport(path=f"{tools}:{os.environ['PATH']}")
    done = deploy(device, bundle, root=root, chunk_bytes=64 * 2**20)
    assert (str(part), 5 * 2**30, 123) in device.pushed
    assert done.bytes_sent == 123 + len(manifest)
    assert done.bytes_present == 5 * 2**30
    with Path(done.remote_folder, "huge").open("rb") as file:
        file.seek(5 * 2**30)
        assert file.read() == b"the end" + bytes(116)
    assert deployed(device, root=root)[0].complete
