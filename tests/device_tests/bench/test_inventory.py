"""Removal of what lies on a device. CPU only, no model; the device is a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_tests.bench.inventory import clean, deployed
from device_tests.errors import CommandFailed, DeviceBusy
from export.contract.bundle import Bundle
from quantize.errors import InputError
from tests.support.folder_transport import FolderTransport
from tests.support.push_tools import assert_whole, make_bundle, push


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
