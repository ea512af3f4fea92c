"""Push: a bundle becomes whole and verified on a device, or is not there under its name.

Files are sent in chunks to `staging/<sha256>.part`, hashed on the device (a chunk while the next
one is sent), moved into `staging/<bundle_id>.dir`, and that folder becomes `bundles/<bundle_id>` as
the last step. How one file is brought is `transfer`'s matter, listing and removal `inventory`'s.

Interruptions: everything is found out again from what lies on the device, by hashes, so a push
that broke (cable, restart, kill) goes on in the next process as in this one.

Two pushes at once: both write the same bytes to the same places, since a staged file is named by
its content, is never shortened, and is moved only by the command that has just hashed it (or, if
no other push is at it, has waited for the end of its hashing). If one takes away what the other is
about to use, the other looks again, and finds it in place.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import PurePosixPath

from device_tests.adb.transport import Transport
from device_tests.bench.inventory import Layout, bundle_sha256, whole_bundles
from device_tests.bench.reconnecting import ReconnectingShell
from device_tests.bench.transfer import (
    BundleFile,
    ChangedByOthers,
    FileTransfer,
    Progress,
    PushProgress,
)
from device_tests.errors import CommandFailed, DeviceBusy, StorageFull
from device_tests.remote import files as remote_files
from device_tests.remote.shell import DEVICE_ROOT, quote
from export.contract.bundle import Bundle
from export.contract.manifest import MANIFEST_FILE
from quantize.errors import BundleError

CHUNK_BYTES = 64 * 2**20
"""What one broken stream costs at most."""

MARGIN_BYTES = 16 * 2**20
"""Left free beside what is written; plus a hundredth of it for the file system's own use."""

_ATTEMPTS = 5
_PAUSE_S = 0.5


@dataclass(frozen=True)
class Deployment:
    """A bundle that is whole on a device.

    files: how many, `bundle.json` among them. bytes_sent: over the transport, repetitions counted.
    bytes_present: what was there already by hash.
    """

    bundle_id: str
    bundle_sha256: str
    remote_folder: str
    files: int
    bytes_total: int
    bytes_sent: int
    bytes_present: int
    seconds: float
    reconnections: int


def deploy(
    transport: Transport,
    bundle: Bundle,
    *,
    progress: Progress | None = None,
    retry_s: float = 60.0,
    chunk_bytes: int = CHUNK_BYTES,
    root: str = DEVICE_ROOT,
) -> Deployment:
    """Bring `bundle` to the device, sending only what is not there by hash.

    A broken connection is waited for `retry_s`, each time. Raises StorageFull before anything is
    sent if there is no room, DeviceGone if the device stays away (what was sent is kept for the
    next push), BundleError if the local files are not what `bundle.json` says, TransferDamaged if
    what arrives is wrong again and again, and what the transport raises.
    """
    began = time.monotonic()
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}, expected at least 1")
    push = _Push(transport, bundle, progress, retry_s, chunk_bytes, Layout(root))
    push.run()
    return Deployment(
        bundle_id=push.bundle_id,
        bundle_sha256=push.bundle_sha256,
        remote_folder=push.layout.bundle(push.bundle_id),
        files=len(push.files),
        bytes_total=push.progress.total_bytes,
        bytes_sent=push.transfer.bytes_sent,
        bytes_present=max(0, push.progress.total_bytes - push.transfer.bytes_missing),
        seconds=time.monotonic() - began,
        reconnections=push.shell.reconnections,
    )


class _Push:
    """One push and what it has learned so far."""

    def __init__(
        self,
        transport: Transport,
        bundle: Bundle,
        progress: Progress | None,
        retry_s: float,
        chunk_bytes: int,
        layout: Layout,
    ) -> None:
        self.layout = layout
        self.files, self.bundle_sha256 = _files(bundle)
        self.bundle_id = self.bundle_sha256[:16]
        self.progress = PushProgress(
            progress or (lambda done, total, what: None), sum(file.bytes for file in self.files)
        )
        self.shell = ReconnectingShell(transport, retry_s, self.progress.waiting)
        self.transfer = FileTransfer(self.shell, layout, self.bundle_id, chunk_bytes, self.progress)
        self._run = self.shell.run
        self._staged = layout.staged_bundle(self.bundle_id)
        self._final = layout.bundle(self.bundle_id)

    def run(self) -> None:
        """Push until the bundle is whole under its name."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                if self._already_whole() or self._bring_and_finish():
                    break
            except ChangedByOthers:
                pass
            except CommandFailed:
                # What another push moves away makes commands fail in any place.
                if attempt == _ATTEMPTS:
                    raise
            # Not in step with the other one.
            time.sleep(random.uniform(0, _PAUSE_S))
        else:
            raise DeviceBusy(
                f"what lies in {self._staged} on the device {self.shell.transport.serial} changes "
                "meanwhile; wait until no other push of this bundle goes on, then repeat this one"
            )
        self._remove_leftovers()

    def _bring_and_finish(self) -> bool:
        """Bring all files and give the bundle its name; False if it must be looked at again."""
        # A restart may have lost what was verified but not yet on the storage: then all is verified
        # again.
        self.shell.restarted = True
        while self.shell.restarted:
            self.shell.restarted = False
            self._bring_all()
        return self._finish() and not self.shell.restarted

    # What is there

    def _already_whole(self) -> bool:
        """Whether the bundle is there under its name with right hashes. One that is damaged loses
        the name, and what is right in it is used."""
        self.progress.placed_bytes = 0
        final = quote(self._final)
        if self._run(f"if [ -d {final} ]; then echo there; fi").text.strip() != "there":
            return False
        if all(self.transfer.is_right(file, f"{self._final}/{file.name}") for file in self.files):
            return True
        staged = quote(self._staged)
        self._run(
            f"mkdir -p {quote(self.layout.staging)} && "
            f"if [ -d {final} ]; then rm -rf {staged}; mv {final} {staged} || [ ! -d {final} ]; fi",
            600.0,
        )
        self.progress.placed_bytes = 0
        return False

    def _known(self) -> dict[tuple[str, int], str]:
        """(SHA-256, size) -> path of a file of another bundle that is said to have it."""
        known: dict[tuple[str, int], str] = {}
        for folder, manifest in self.shell.again(
            lambda: whole_bundles(self.shell.transport, self._run, self.layout)
        ).items():
            for name, entry in manifest.files.items():
                known.setdefault((entry.sha256, entry.bytes), f"{folder}/{name}")
        return known

    # Bringing files

    def _bring_all(self) -> None:
        """Put every file, verified, into the staged folder; `bundle.json` as the last."""
        self.progress.placed_bytes = 0
        folders = {str(PurePosixPath(self._staged, file.name).parent) for file in self.files}
        remote_files.make_folders(
            self._run, [self.layout.bundles, self.layout.runs, *sorted(folders)]
        )
        known = self._known()
        targets = [self.transfer.target(file) for file in self.files]
        sizes = remote_files.sizes_bytes(self._run, targets)
        lacking = []
        for file, target, size in zip(self.files, targets, sizes, strict=True):
            if size == file.bytes and self.transfer.is_right(file, target):
                known[file.sha256, file.bytes] = target
            else:
                lacking.append(file)
        # Also what is no regular file: a file moved into a folder would not take its name.
        remote_files.remove(self._run, [self.transfer.target(file) for file in lacking])
        missing = [file for file in lacking if not self._reuse(file, known, "ln")]
        self._check_space(missing, known)
        for file in missing:
            # An earlier file of the bundle may have had the same content.
            if not (self._reuse(file, known, "ln") or self._reuse(file, known, "cp")):
                self.transfer.bring(file)
            known[file.sha256, file.bytes] = self.transfer.target(file)

    def _reuse(self, file: BundleFile, known: dict[tuple[str, int], str], how: str) -> bool:
        """Take the content from elsewhere on the device by `ln` or `cp`, if it is right there.

        Beside the staged folder first, never to the `.part`, which is written in place.
        """
        source = known.get((file.sha256, file.bytes))
        if source is None or remote_files.sizes_bytes(self._run, [source]) != [file.bytes]:
            return False
        beside = f"{self.layout.staging}/{file.sha256}.{how}"
        self.progress.file("copying", file)
        command = (
            f"rm -rf {quote(beside)}; {how} {quote(source, beside)} || "
            f"{{ rm -f {quote(beside)}; exit 1; }}"
        )
        try:
            self._run(command, remote_files.transfer_timeout_s(file.bytes))
        except CommandFailed:
            # Android forbids hard links to some users, some file systems have none.
            return False
        if self.transfer.place(file, beside):
            return True
        remote_files.remove(self._run, [beside])
        del known[file.sha256, file.bytes]
        return False

    def _check_space(self, missing: list[BundleFile], known: dict[tuple[str, int], str]) -> None:
        """Raise StorageFull unless there is room for what will be sent and copied."""
        parts = [self.layout.staged_file(file.sha256) for file in missing]
        sizes = dict(zip(parts, remote_files.sizes_bytes(self._run, parts), strict=True))
        needed = 0
        for part, file in {p: f for p, f in zip(parts, missing, strict=True)}.items():
            there = 0 if (file.sha256, file.bytes) in known else min(sizes[part] or 0, file.bytes)
            needed += file.bytes - there
        if needed == 0:
            return
        free = remote_files.free_bytes(self._run, self.layout.staging)
        wanted = needed + needed // 100 + MARGIN_BYTES
        if free < wanted:
            raise StorageFull(
                f"the device {self.shell.transport.serial} has {_mebibytes(free)} free, this "
                f"bundle needs {_mebibytes(wanted)} ({_mebibytes(needed)} of it are still to be "
                "written); delete something there, or remove earlier bundles with "
                "`pocketdiff clean`"
            )

    # The end

    def _finish(self) -> bool:
        """Give the staged folder its final name; False if another process was quicker or files are
        missing from it."""
        targets = [self.transfer.target(file) for file in self.files]
        sizes = remote_files.sizes_bytes(self._run, targets)
        if sizes != [file.bytes for file in self.files]:
            return False
        self.progress.whole("writing back")
        staged, final = quote(self._staged), quote(self._final)
        # Hashes are of what the device has in memory: `sync` before the bundle has its name.
        # `mv` into a folder that has just appeared would nest, hence the last part.
        nested = quote(f"{self._final}/{PurePosixPath(self._staged).name}")
        self._run(
            f"sync; if [ -d {staged} ] && [ ! -e {final} ]; then "
            f"{{ mv {staged} {final} || [ -d {final} ]; }} && rm -rf {nested} && sync; fi",
            remote_files.transfer_timeout_s(self.progress.total_bytes),
        )
        found = remote_files.sizes_bytes(self._run, [f"{self._final}/{MANIFEST_FILE}"])
        return found == [self.files[-1].bytes]

    def _remove_leftovers(self) -> None:
        """Remove what other pushes of this content may have left."""
        staging, ours = self.layout.staging, {file.sha256 for file in self.files}
        names = remote_files.names(self._run, staging)
        paths = [f"{staging}/{name}" for name in names if name.split(".")[0] in ours]
        remote_files.remove(self._run, [*paths, self._staged])
        self.progress.whole("done")


def _files(bundle: Bundle) -> tuple[list[BundleFile], str]:
    """The bundle's files, `bundle.json` last, and what identifies it.

    Raises BundleError if `bundle.json` is not the one that was opened.
    """
    path = bundle.folder / MANIFEST_FILE
    try:
        content = path.read_bytes()
        listed = json.loads(content)["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} cannot be read ({error}); export the bundle again") from error
    if listed != bundle.to_json()["files"]:
        raise BundleError(f"{path} has changed since it was opened; push the bundle again")
    files = [
        BundleFile(name, bundle.path(name), entry.bytes, entry.sha256)
        for name, entry in sorted(bundle.files.items())
    ]
    digest = bundle_sha256(content)
    return [*files, BundleFile(MANIFEST_FILE, path, len(content), digest)], digest


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
