"""Push: what is sent, what is found on the device, two pushes at once. CPU only, no model.

The device is a folder, whose transport injects faults at a byte or a command. What a real adbd
adds is in `test_deploy_adbd.py`.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from device_tests.bench.inventory import clean, deployed
from device_tests.bench.transfer import TransferDamaged
from export.contract.bundle import Bundle, open_bundle
from tests.support.folder_transport import FolderTransport
from tests.support.push_tools import (
    CHUNK,
    ODD_NAMES,
    assert_nothing_to_run,
    assert_whole,
    make_bundle,
    manifest_bytes,
    push,
    random_bytes,
    whole_bytes,
)

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
