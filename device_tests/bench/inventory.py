"""What of ours lies on a device: which bundles, whether they are whole, and how it is removed.

How a bundle gets there is the matter of `deploy`. Every `bundle.json` read from a device is
untrusted: what is odd in one is left out of account.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from device_tests.adb.transport import Transport
from device_tests.bench import device_lock
from device_tests.errors import CommandFailed, DeviceBusy
from device_tests.remote import files as remote_files
from device_tests.remote.files import Run
from device_tests.remote.shell import DEVICE_ROOT, quote, run_checked
from export.contract.manifest import MANIFEST_FILE, MAXIMUM_MANIFEST_BYTES, FileEntry
from quantize.errors import InputError

_BUNDLE_ID = re.compile(r"[0-9a-f]{16}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STAGED_FOLDER = re.compile(r"([0-9a-f]{16})\.dir")
_STAGED_FILE = re.compile(r"[0-9a-f]{64}\.[a-z0-9._-]+")
PACKED_FOLDER = "packed"
"""The folder of packed weights, which runs with a memory budget leave, below the root."""

_PACKED = re.compile(r"([0-9a-f]{16})-[0-9a-f]{16}\.[a-z-]+")
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Layout:
    """Where things lie under `root` on the device."""

    root: str = DEVICE_ROOT

    def __post_init__(self) -> None:
        path = PurePosixPath(self.root)
        if str(path) != self.root or len(path.parts) < 3 or path.parts[0] != "/":
            raise InputError(
                f"{self.root!r} cannot be the folder for bundles on a device; give a plain "
                f"absolute path at least two folders deep, such as {DEVICE_ROOT}"
            )
        if ".." in path.parts:
            raise InputError(f"{self.root!r} holds '..'; give the folder's plain path")

    @property
    def bundles(self) -> str:
        """The folder of whole bundles."""
        return f"{self.root}/bundles"

    @property
    def staging(self) -> str:
        """The folder of files and bundles on their way."""
        return f"{self.root}/staging"

    @property
    def runs(self) -> str:
        """The folder of requests, events and results of runs."""
        return f"{self.root}/runs"

    @property
    def packed(self) -> str:
        """The folder of packed weights of bundles."""
        return f"{self.root}/{PACKED_FOLDER}"

    def bundle(self, bundle_id: str) -> str:
        """The folder of a whole bundle."""
        return f"{self.bundles}/{bundle_id}"

    def staged_bundle(self, bundle_id: str) -> str:
        """The folder in which a bundle is put together."""
        return f"{self.staging}/{bundle_id}.dir"

    def staged_file(self, sha256: str) -> str:
        """A file on its way."""
        return f"{self.staging}/{sha256}.part"


@dataclass(frozen=True)
class Deployed:
    """A bundle found on a device.

    name: the model's, "" where it is not known. bytes: of the listed files that are there.
    complete: all listed files are there with their sizes, and bundle.json has the folder's hash.
    """

    bundle_id: str
    name: str
    bytes: int
    complete: bool


@dataclass(frozen=True)
class Cleaned:
    """What `clean` removed; bytes as the device counts blocks."""

    bundles: int
    runs: int
    bytes: int


@dataclass(frozen=True)
class RemoteManifest:
    """What was read of a `bundle.json` on a device; `genuine`: its hash is the folder's name."""

    name: str
    files: dict[str, FileEntry]
    bytes: int
    genuine: bool


def bundle_sha256(bundle_json: bytes) -> str:
    """What identifies a bundle: the SHA-256 of `bundle.json`, which holds those of its files."""
    return hashlib.sha256(bundle_json).hexdigest()


def bundle_id(bundle_json: bytes) -> str:
    """The name of the bundle's folder on a device: the first 16 characters of its SHA-256."""
    return bundle_sha256(bundle_json)[:16]


def deployed(transport: Transport, *, root: str = DEVICE_ROOT) -> list[Deployed]:
    """The bundles on the device, also those of an interrupted push; sizes are compared, not hashes.

    Raises what `Transport.shell` and `pull` raise.
    """
    layout, run = Layout(root), functools.partial(run_checked, transport)
    whole = [name for name in remote_files.names(run, layout.bundles) if _BUNDLE_ID.fullmatch(name)]
    found = [_inspect(transport, run, layout.bundle(name), name) for name in sorted(whole)]
    for name in sorted(remote_files.names(run, layout.staging)):
        if match := _STAGED_FOLDER.fullmatch(name):
            occupied = remote_files.occupied_bytes(run, [f"{layout.staging}/{name}"])
            found.append(Deployed(match.group(1), "", occupied, complete=False))
    return found


def whole_bundles(transport: Transport, run: Run, layout: Layout) -> dict[str, RemoteManifest]:
    """Folder -> manifest of every bundle under its final name whose manifest can be read."""
    found = {}
    for name in remote_files.names(run, layout.bundles):
        folder = layout.bundle(name)
        if _BUNDLE_ID.fullmatch(name) and (manifest := read_manifest(transport, folder, name)):
            found[folder] = manifest
    return found


def read_manifest(transport: Transport, folder: str, expected_id: str) -> RemoteManifest | None:
    """What the `bundle.json` of a folder on the device says, None if it says nothing usable."""
    buffer = io.BytesIO()
    try:
        transport.pull(f"{folder}/{MANIFEST_FILE}", buffer, length=MAXIMUM_MANIFEST_BYTES + 1)
    except CommandFailed:
        return None
    content = buffer.getvalue()
    if len(content) > MAXIMUM_MANIFEST_BYTES:
        return None
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or not isinstance(files := document.get("files"), dict):
        return None
    model = document.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    return RemoteManifest(
        name=name if isinstance(name, str) and name.isprintable() else "",
        files={file: entry for file, raw in files.items() if (entry := _entry(file, raw))},
        bytes=len(content),
        genuine=bundle_id(content) == expected_id,
    )


def clean(
    transport: Transport,
    bundle_id: str | None = None,
    *,
    force: bool = False,
    holder: Callable[[Transport], object | None] = device_lock.holder,
    root: str = DEVICE_ROOT,
) -> Cleaned:
    """Remove one bundle, or all bundles, runs, unfinished pushes and a stale lock; nothing else.

    With a bundle go its packed weights.

    What is under `root` and has none of our names stays. holder: says who holds the device. Raises
    DeviceBusy while somebody does, unless `force`; InputError for an id that is none or that the
    device does not have, or a `root` that cannot be.
    """
    layout, run = Layout(root), functools.partial(run_checked, transport)
    if bundle_id is not None and not _BUNDLE_ID.fullmatch(bundle_id):
        raise InputError(
            f"{bundle_id!r} is not the id of a bundle; it has 16 characters of 0-9 and a-f, and "
            "`pocketdiff devices` or `push` prints it"
        )
    _refuse_link(transport, layout.root)
    if not force and (who := holder(transport)) is not None:
        raise DeviceBusy(
            f"{who} is measuring on the device {transport.serial}; wait for its end, or clean "
            "by force"
        )
    bundles, staged, runs = _ours(run, layout, bundle_id)
    packed = [
        f"{layout.packed}/{name}"
        for name in remote_files.names(run, layout.packed)
        if (found := _PACKED.fullmatch(name)) and bundle_id in (None, found[1])
    ]
    if bundle_id is not None and not bundles + staged:
        raise InputError(f"the device {transport.serial} has no bundle {bundle_id}")
    paths = bundles + staged + runs + packed
    occupied = remote_files.occupied_bytes(run, paths)
    # In this order: a bundle that is half removed must not look like one that can be run.
    for bundle in bundles:
        remote_files.remove(run, [f"{bundle}/{MANIFEST_FILE}"])
    remote_files.remove(run, paths)
    if bundle_id is None:
        _remove_rest(run, layout)
    return Cleaned(len(bundles), len(runs), occupied)


def _ours(run: Run, layout: Layout, only: str | None) -> tuple[list[str], list[str], list[str]]:
    """Paths of bundles, of what is staged, and of runs; with `only` those of that bundle."""
    bundles = remote_files.names(run, layout.bundles)
    staged = remote_files.names(run, layout.staging)
    runs = remote_files.names(run, layout.runs)
    folders = [name for name in staged if _STAGED_FOLDER.fullmatch(name)]
    files = [name for name in staged if _STAGED_FILE.fullmatch(name)]
    if only is not None:
        bundles = [name for name in bundles if name == only]
        # Whose the files on their way are is not written anywhere: they go with the last folder.
        others = [name for name in folders if name != f"{only}.dir"]
        folders = [name for name in folders if name == f"{only}.dir"]
        files = [] if others or not folders else files
        runs = []
    return (
        [layout.bundle(name) for name in bundles if _BUNDLE_ID.fullmatch(name)],
        [f"{layout.staging}/{name}" for name in folders + files],
        [f"{layout.runs}/{name}" for name in runs if _RUN.fullmatch(name)],
    )


def _refuse_link(transport: Transport, root: str) -> None:
    if transport.shell(f"[ -L {quote(root)} ]").exit_code == 0:
        raise CommandFailed(
            f"{root} on the device {transport.serial} is a symbolic link, and what it leads to is "
            "not touched; remove the link there"
        )


def _remove_rest(run: Run, layout: Layout) -> None:
    """Remove the lock, and our folders (or links in their places) if nothing foreign is in them."""
    for folder in (layout.bundles, layout.staging, layout.runs, layout.packed):
        path = quote(folder)
        run(f"if [ -L {path} ]; then rm -f {path}; else rmdir {path} 2>/dev/null; fi; true", 30.0)
    # The lock is stale here, or its owner has just lost its bundle by force.
    remote_files.remove(run, [f"{layout.root}/lock"])
    run(f"rmdir {quote(layout.root)} 2>/dev/null; true", 30.0)


def _inspect(transport: Transport, run: Run, folder: str, name: str) -> Deployed:
    manifest = read_manifest(transport, folder, name)
    if manifest is None:
        occupied = remote_files.occupied_bytes(run, [folder])
        return Deployed(name, "", occupied, complete=False)
    sizes = remote_files.sizes_bytes(run, [f"{folder}/{file}" for file in manifest.files])
    expected = [entry.bytes for entry in manifest.files.values()]
    total = manifest.bytes + sum(size for size in sizes if size is not None)
    return Deployed(name, manifest.name, total, complete=manifest.genuine and sizes == expected)


def _entry(name: str, raw: Any) -> FileEntry | None:
    """A file that a device's manifest lists, None if it is not one that we would have written."""
    path = PurePosixPath(name)
    plain = name == str(path) and not path.is_absolute() and ".." not in path.parts
    if not plain or not name.isprintable() or name in ("", ".") or not isinstance(raw, dict):
        return None
    count, digest = raw.get("bytes"), raw.get("sha256")
    if type(count) is not int or count < 0 or not isinstance(digest, str):
        return None
    return FileEntry(count, digest) if _SHA256.fullmatch(digest) else None
