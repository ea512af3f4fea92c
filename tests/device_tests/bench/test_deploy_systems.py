"""Push with the shells and tools of small systems, and beyond 4 GiB. CPU only, no model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from device_tests.bench.deploy import deploy
from device_tests.bench.inventory import clean, deployed
from device_tests.remote import files as remote_files
from device_tests.remote.shell import run_checked
from export.contract.bundle import Bundle
from export.contract.manifest import FileEntry
from tests.support.folder_transport import FolderTransport
from tests.support.push_tools import CHUNK, ODD_NAMES, assert_whole, make_bundle, push, random_bytes
from tests.support.small_systems import SMALL_SYSTEMS, small_device

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
    assert clean(device, root=root, holder=lambda _: None).bundles == 2
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
