"""Push: a bundle becomes whole and verified on a device, or is not there under its name.

Files are sent in chunks to `staging/<sha256>.part`, hashed on the device (a chunk while the next
one is sent), moved into `staging/<bundle_id>.dir`, and that folder becomes `bundles/<bundle_id>` as
the last step. How the
bytes travel is the transport's matter; listing and removal are `inventory`'s.

Interruptions: everything is found out again from what lies on the device, by hashes, so a push
that broke (cable, restart, kill) goes on in the next process as in this one.

Two pushes at once: both write the same bytes to the same places, since a staged file is named by
its content, is never shortened, and is moved only by the command that has just hashed it (or, if
no other push is at it, has waited for the end of its hashing). If one takes away what the other is
about to use, the other looks again, and finds it in place.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

from device_tests.adb.transport import ShellResult, Transport
from device_tests.bench.following_hash import FollowingHash
from device_tests.bench.inventory import (
    Cleaned,
    Deployed,
    Layout,
    bundle_id,
    bundle_sha256,
    clean,
    deployed,
    whole_bundles,
)
from device_tests.errors import (
    CommandFailed,
    DeviceBusy,
    DeviceError,
    DeviceGone,
    ProtocolError,
    StorageFull,
)
from device_tests.remote import files as remote_files
from device_tests.remote.shell import DEVICE_ROOT, excerpt, quote, run_checked
from export.contract.bundle import MANIFEST_FILE, Bundle
from quantize.errors import BundleError

__all__ = [
    "CHUNK_BYTES",
    "Cleaned",
    "Deployed",
    "Deployment",
    "TransferDamaged",
    "bundle_id",
    "bundle_sha256",
    "clean",
    "deploy",
    "deployed",
]

CHUNK_BYTES = 64 * 2**20
"""What one broken stream costs at most."""

MARGIN_BYTES = 16 * 2**20
"""Left free beside what is written; plus a hundredth of it for the file system's own use."""

_ALIGNMENT_BYTES = 2**20
"""Where sending goes on within a chunk, so that transports may write in whole blocks."""

_REPAIRS = 3
_ATTEMPTS = 5
_PAUSE_S = 0.5
_RECONNECTIONS_IN_VAIN = 5

Progress = Callable[[int, int, str], None]
"""Called with bytes in place so far, bytes in all, and what is going on (`sending head.pte`)."""


_BOOT_ID = "cat /proc/sys/kernel/random/boot_id 2>/dev/null"

_T = TypeVar("_T")


class TransferDamaged(DeviceError):
    """What the device stored differs from what was sent, again and again."""


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


@dataclass(frozen=True)
class _File:
    """A file of the bundle: its name in it, where it lies here, its size and SHA-256."""

    name: str
    path: Path
    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Range:
    """Bytes of a file to be sent, within one chunk."""

    begin: int
    end: int


class _LookAgain(Exception):
    """Another process moved what this one was about to use."""


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
    push = _Push(transport, bundle, progress, retry_s, chunk_bytes, Layout(root))
    push.run()
    return Deployment(
        bundle_id=push.bundle_id,
        bundle_sha256=push.bundle_sha256,
        remote_folder=push.layout.bundle(push.bundle_id),
        files=len(push.files),
        bytes_total=push.total_bytes,
        bytes_sent=push.bytes_sent,
        bytes_present=max(0, push.total_bytes - push.bytes_missing),
        seconds=time.monotonic() - began,
        reconnections=push.reconnections,
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
        if chunk_bytes < 1:
            raise ValueError(f"chunk_bytes is {chunk_bytes}, expected at least 1")
        self.layout = layout
        self.files, self.bundle_sha256 = _files(bundle)
        self.bundle_id = self.bundle_sha256[:16]
        self.total_bytes = sum(file.bytes for file in self.files)
        self.bytes_sent = 0
        self.bytes_missing = 0
        self.reconnections = 0
        self._transport = transport
        self._progress = progress or (lambda done, total, what: None)
        self._retry_s = retry_s
        self._chunk_bytes = chunk_bytes
        self._staged = layout.staged_bundle(self.bundle_id)
        self._final = layout.bundle(self.bundle_id)
        self._placed_bytes = 0
        self._boot_id = ""
        self._hash_program = remote_files.SHA256SUM
        self._restarted = False

    def run(self) -> None:
        """Push until the bundle is whole under its name."""
        self._boot_id = self._read_boot_id()
        self._hash_program = self._again(lambda: remote_files.hash_program(self._transport))
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                if self._already_whole() or self._bring_and_finish():
                    break
            except _LookAgain:
                pass
            except CommandFailed:
                # What another push moves away makes commands fail in any place.
                if attempt == _ATTEMPTS:
                    raise
            # Not in step with the other one.
            time.sleep(random.uniform(0, _PAUSE_S))
        else:
            raise DeviceBusy(
                f"what lies in {self._staged} on the device {self._transport.serial} changes "
                "meanwhile; wait until no other push of this bundle goes on, then repeat this one"
            )
        self._remove_leftovers()

    def _bring_and_finish(self) -> bool:
        """Bring all files and give the bundle its name; False if it must be looked at again."""
        # A restart may have lost what was verified but not yet on the storage: then all is verified
        # again.
        self._restarted = True
        while self._restarted:
            self._restarted = False
            self._bring_all()
        return self._finish() and not self._restarted

    # What is there

    def _already_whole(self) -> bool:
        """Whether the bundle is there under its name with right hashes. One that is damaged loses
        the name, and what is right in it is used."""
        self._placed_bytes = 0
        final = quote(self._final)
        if self._run(f"if [ -d {final} ]; then echo there; fi").text.strip() != "there":
            return False
        if all(self._is_right(file, f"{self._final}/{file.name}") for file in self.files):
            return True
        staged = quote(self._staged)
        self._run(
            f"mkdir -p {quote(self.layout.staging)} && "
            f"if [ -d {final} ]; then rm -rf {staged}; mv {final} {staged} || [ ! -d {final} ]; fi",
            600.0,
        )
        self._placed_bytes = 0
        return False

    def _is_right(self, file: _File, remote: str) -> bool:
        """Whether the regular file `remote` has the size and the SHA-256 of `file`."""
        if remote_files.sizes_bytes(self._run, [remote]) != [file.bytes]:
            return False
        self._say("verifying", file, file.bytes)
        if remote_files.sha256(self._run, remote, file.bytes, self._hash_program) != file.sha256:
            return False
        self._placed_bytes += file.bytes
        return True

    def _known(self) -> dict[tuple[str, int], str]:
        """(SHA-256, size) -> path of a file of another bundle that is said to have it."""
        known: dict[tuple[str, int], str] = {}
        for folder, manifest in self._again(
            lambda: whole_bundles(self._transport, self._run, self.layout)
        ).items():
            for name, entry in manifest.files.items():
                known.setdefault((entry.sha256, entry.bytes), f"{folder}/{name}")
        return known

    # Bringing files

    def _bring_all(self) -> None:
        """Put every file, verified, into the staged folder; `bundle.json` as the last."""
        self._placed_bytes = 0
        folders = {str(PurePosixPath(self._staged, file.name).parent) for file in self.files}
        remote_files.make_folders(
            self._run, [self.layout.bundles, self.layout.runs, *sorted(folders)]
        )
        known = self._known()
        targets = [self._target(file) for file in self.files]
        sizes = remote_files.sizes_bytes(self._run, targets)
        lacking = []
        for file, target, size in zip(self.files, targets, sizes, strict=True):
            if size == file.bytes and self._is_right(file, target):
                known[file.sha256, file.bytes] = target
            else:
                lacking.append(file)
        # Also what is no regular file: a file moved into a folder would not take its name.
        remote_files.remove(self._run, [self._target(file) for file in lacking])
        missing = [file for file in lacking if not self._reuse(file, known, "ln")]
        self._check_space(missing, known)
        for file in missing:
            # An earlier file of the bundle may have had the same content.
            if not (self._reuse(file, known, "ln") or self._reuse(file, known, "cp")):
                self._bring(file)
            known[file.sha256, file.bytes] = self._target(file)

    def _reuse(self, file: _File, known: dict[tuple[str, int], str], how: str) -> bool:
        """Take the content from elsewhere on the device by `ln` or `cp`, if it is right there.

        Beside the staged folder first, never to the `.part`, which is written in place.
        """
        source = known.get((file.sha256, file.bytes))
        if source is None or remote_files.sizes_bytes(self._run, [source]) != [file.bytes]:
            return False
        beside = f"{self.layout.staging}/{file.sha256}.{how}"
        self._say("copying", file)
        command = (
            f"rm -rf {quote(beside)}; {how} {quote(source, beside)} || "
            f"{{ rm -f {quote(beside)}; exit 1; }}"
        )
        try:
            self._run(command, remote_files.patience_s(file.bytes))
        except CommandFailed:
            # Android forbids hard links to some users, some file systems have none.
            return False
        if self._place(file, beside):
            return True
        remote_files.remove(self._run, [beside])
        del known[file.sha256, file.bytes]
        return False

    def _check_space(self, missing: list[_File], known: dict[tuple[str, int], str]) -> None:
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
                f"the device {self._transport.serial} has {_mebibytes(free)} free, this bundle "
                f"needs {_mebibytes(wanted)} ({_mebibytes(needed)} of it are still to be written); "
                "delete something there, or remove earlier bundles with `pocketdiff clean`"
            )

    def _bring(self, file: _File) -> None:
        """Send what of `file` is not on the device, verify it there, and put it in its place."""
        part = self.layout.staged_file(file.sha256)
        with _opened(file) as source:
            for repair in range(_REPAIRS):
                todo = self._differing(file, source, part)
                if repair and not todo:
                    raise BundleError(
                        f"{file.path} is not what {MANIFEST_FILE} says (SHA-256 "
                        f"{file.sha256[:12]}…); copy or export the bundle again"
                    )
                if repair == 0:
                    self.bytes_missing += sum(piece.end - piece.begin for piece in todo)
                following = self._follow(file, part, todo)
                self._send(file, source, part, todo)
                self._say("verifying", file, file.bytes)
                if self._place(file, part, following) or self._is_right(file, self._target(file)):
                    return
                if remote_files.sizes_bytes(self._run, [f"{self._final}/{file.name}"]) != [None]:
                    raise _LookAgain
        raise TransferDamaged(
            f"{file.name} has other bytes on the device {self._transport.serial} than were sent, "
            f"{_REPAIRS} times; try another cable or port, and look for a failing storage"
        )

    def _follow(self, file: _File, part: str, todo: list[_Range]) -> FollowingHash | None:
        """Have the file hashed behind what is sent, if that is its whole rest in several chunks."""
        count = sum(piece.end - piece.begin for piece in todo)
        if len(todo) < 2 or todo[0].begin + count != file.bytes:
            return None
        return FollowingHash.start(
            self._run,
            part,
            f"{self.layout.staging}/{file.sha256}",
            file.bytes,
            self._chunk_bytes,
            self._hash_program,
        )

    def _send(self, file: _File, source: BinaryIO, part: str, todo: list[_Range]) -> None:
        """Send ranges; after a broken connection find out by hashes what of them arrived."""
        in_vain = 0
        if file.bytes == 0:
            self._run(f": > {quote(part)}")
        while todo:
            piece = todo[0]
            remaining = sum(each.end - each.begin for each in todo)
            moved = 0

            def report(count: int, before: int = file.bytes - remaining) -> None:
                nonlocal moved
                moved = count
                self._say("sending", file, before + count)

            report(0)
            try:
                source.seek(piece.begin)
                self._transport.push(
                    source, part, piece.end - piece.begin, offset=piece.begin, progress=report
                )
            except DeviceGone as error:
                self.bytes_sent += moved
                in_vain += 1
                self._reconnect(error, in_vain)
                rest = self._differing(file, source, part, piece.begin)
                if sum(each.end - each.begin for each in rest) < remaining:
                    in_vain = 0
                todo = rest
            except OSError as error:
                raise _unreadable(file, error) from error
            else:
                self.bytes_sent += piece.end - piece.begin
                in_vain = 0
                todo = todo[1:]

    def _differing(
        self, file: _File, source: BinaryIO, part: str, begin_bytes: int = 0
    ) -> list[_Range]:
        """Which ranges from the chunk of `begin_bytes` the device lacks or has wrong."""
        size = remote_files.sizes_bytes(self._run, [part])[0]
        if size is None or size > file.bytes:
            # Also what is no regular file: a link would be followed by the push.
            remote_files.remove(self._run, [part])
            size = 0
        chunk = self._chunk_bytes
        begin = min(begin_bytes, size) // chunk * chunk
        ranges = []
        hashes = remote_files.chunk_sha256s(self._run, part, begin, size, chunk, self._hash_program)
        self._say("comparing", file, begin)
        for position, found in zip(range(begin, size, chunk), hashes, strict=True):
            end, stored = min(position + chunk, file.bytes), min(position + chunk, size)
            if found != _sha256_of_range(file, source, position, stored):
                ranges.append(_Range(position, end))
            elif stored < end:
                resume = max(position, stored // _ALIGNMENT_BYTES * _ALIGNMENT_BYTES)
                ranges.append(_Range(resume, end))
            self._say("comparing", file, stored)
        first = -(-size // chunk) * chunk
        return ranges + [
            _Range(position, min(position + chunk, file.bytes))
            for position in range(first, file.bytes, chunk)
        ]

    def _place(self, file: _File, remote: str, following: FollowingHash | None = None) -> bool:
        """Hash `remote` on the device and, if it is right, move it into the staged folder.

        following: has hashed it already; only the right hash counts, else all is hashed here.
        Raises _LookAgain if it is gone, or another push put something else there meanwhile.
        """
        target = self._target(file)
        # One command, so that little comes between. The inode tells whether what was moved is what
        # was hashed.
        followed = "h=; " if following is None else following.finish_command(file.bytes)
        command = (
            f"p={quote(remote)}; t={quote(target)}; d={quote(str(PurePosixPath(target).parent))}; "
            'gone() { if [ -f "$p" ] && [ -d "$d" ]; then exit 1; fi; echo gone; exit 0; }; '
            '[ -f "$p" ] || gone; i=$(stat -c %i "$p") || gone; '
            f'{followed}[ "${{h%% *}}" = {file.sha256} ] || '
            f'h=$({self._hash_program} < "$p") || gone; '
            f'if [ "${{h%% *}}" != {file.sha256} ]; then echo differs; exit 0; fi; '
            'mv -f "$p" "$t" || gone; '
            'if [ "$(stat -c %i "$t")" = "$i" ]; then echo placed; else echo gone; fi'
        )
        said = self._run(command, 2 * remote_files.patience_s(file.bytes)).text.strip()
        if said == "placed":
            self._placed_bytes += file.bytes
            return True
        if said == "gone":
            # It may also be in its place, if the command was repeated after its answer was lost.
            if self._is_right(file, self._target(file)):
                return True
            raise _LookAgain
        if said != "differs":
            raise ProtocolError(
                f"the device {self._transport.serial} answered {excerpt(said)!r} when it was to "
                f"verify {file.name}; look whether its shell has sha256sum"
            )
        return False

    # The end

    def _finish(self) -> bool:
        """Give the staged folder its final name; False if another process was quicker or files are
        missing from it."""
        targets = [self._target(file) for file in self.files]
        sizes = remote_files.sizes_bytes(self._run, targets)
        if sizes != [file.bytes for file in self.files]:
            return False
        self._progress(self.total_bytes, self.total_bytes, "writing back")
        staged, final = quote(self._staged), quote(self._final)
        # Hashes are of what the device has in memory: `sync` before the name that vouches for it.
        # `mv` into a folder that has just appeared would nest, hence the last part.
        nested = quote(f"{self._final}/{PurePosixPath(self._staged).name}")
        self._run(
            f"sync; if [ -d {staged} ] && [ ! -e {final} ]; then "
            f"{{ mv {staged} {final} || [ -d {final} ]; }} && rm -rf {nested} && sync; fi",
            remote_files.patience_s(self.total_bytes),
        )
        found = remote_files.sizes_bytes(self._run, [f"{self._final}/{MANIFEST_FILE}"])
        return found == [self.files[-1].bytes]

    def _remove_leftovers(self) -> None:
        """Remove what other pushes of this content may have left."""
        staging, ours = self.layout.staging, {file.sha256 for file in self.files}
        names = remote_files.names(self._run, staging)
        paths = [f"{staging}/{name}" for name in names if name.split(".")[0] in ours]
        remote_files.remove(self._run, [*paths, self._staged])
        self._progress(self.total_bytes, self.total_bytes, "done")

    # Speaking with the device

    def _run(self, command: str, timeout_s: float = 30.0) -> ShellResult:
        """Run a command that may be repeated, as often as the connection breaks and comes back."""
        return self._again(lambda: run_checked(self._transport, command, timeout_s))

    def _again(self, action: Callable[[], _T]) -> _T:
        """Do what may be repeated until the connection holds."""
        in_vain = 0
        while True:
            try:
                return action()
            except DeviceGone as error:
                in_vain += 1
                self._reconnect(error, in_vain)

    def _reconnect(self, error: DeviceGone, in_vain: int) -> None:
        """Wait for the device. Raises DeviceGone if it stays away or breaks off every time."""
        if in_vain > _RECONNECTIONS_IN_VAIN:
            raise DeviceGone(
                f"the connection to {self._transport.serial} broke {in_vain} times in a row "
                f"({error}); try another cable or port, then push again: what arrived is kept"
            ) from error
        self._progress(self._placed_bytes, self.total_bytes, "waiting for the device")
        try:
            self._transport.reconnect(self._retry_s)
        except DeviceGone as gone:
            raise DeviceGone(f"{gone}; push again when it is back: what arrived is kept") from gone
        self.reconnections += 1
        try:
            # What cannot be read counts as a restart: it costs a verification, no more.
            boot_id = self._transport.shell(_BOOT_ID).text
        except DeviceError:
            boot_id = ""
        if not boot_id or boot_id != self._boot_id:
            self._boot_id, self._restarted = boot_id, True

    def _read_boot_id(self) -> str:
        return self._again(lambda: self._transport.shell(_BOOT_ID)).text

    def _target(self, file: _File) -> str:
        return f"{self._staged}/{file.name}"

    def _say(self, doing: str, file: _File, done_bytes: int = 0) -> None:
        self._progress(self._placed_bytes + done_bytes, self.total_bytes, f"{doing} {file.name}")


def _files(bundle: Bundle) -> tuple[list[_File], str]:
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
        _File(name, bundle.path(name), entry.bytes, entry.sha256)
        for name, entry in sorted(bundle.files.items())
    ]
    digest = bundle_sha256(content)
    return [*files, _File(MANIFEST_FILE, path, len(content), digest)], digest


@contextmanager
def _opened(file: _File) -> Iterator[BinaryIO]:
    """The local file, which must have the size that `bundle.json` says."""
    try:
        source = file.path.open("rb")
    except OSError as error:
        raise _unreadable(file, error) from error
    with source:
        size = source.seek(0, io.SEEK_END)
        if size != file.bytes:
            raise BundleError(
                f"{file.path} has {size} bytes, expected {file.bytes}; copy or export the bundle "
                "again"
            )
        yield source


def _sha256_of_range(file: _File, source: BinaryIO, begin: int, end: int) -> str:
    """SHA-256 of bytes `begin` to `end` of the local file."""
    digest = hashlib.sha256()
    try:
        source.seek(begin)
        remaining = end - begin
        while remaining and (data := source.read(min(remaining, 2**20))):
            digest.update(data)
            remaining -= len(data)
    except OSError as error:
        raise _unreadable(file, error) from error
    return digest.hexdigest()


def _unreadable(file: _File, error: OSError) -> BundleError:
    return BundleError(
        f"{file.path} cannot be read ({error.strerror or error}); check its permissions"
    )


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
