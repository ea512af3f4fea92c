"""One file of a bundle: sent as far as the device lacks it, hashed there, put in its place."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from device_tests.bench.background_hash import BackgroundHash
from device_tests.bench.inventory import Layout
from device_tests.bench.reconnecting import ReconnectingShell
from device_tests.errors import DeviceError, DeviceGone, ProtocolError
from device_tests.remote import files as remote_files
from device_tests.remote.shell import excerpt, quote
from export.contract.manifest import MANIFEST_FILE
from quantize.errors import BundleError
from quantize.files.durable import sha256_of

_ALIGNMENT_BYTES = 2**20
"""Where sending goes on within a chunk, so that transports may write in whole blocks."""

_REPAIRS = 3

Progress = Callable[[int, int, str], None]
"""Called with bytes in place so far, bytes in all, and what is going on (`sending head.pte`)."""


class TransferDamaged(DeviceError):
    """What the device stored differs from what was sent, again and again."""


class ChangedByOthers(Exception):
    """Another process moved what this one was about to use; look again."""


@dataclass(frozen=True)
class BundleFile:
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


@dataclass
class PushProgress:
    """How far a push has come: `placed_bytes` of `total_bytes` are in their places."""

    callback: Progress
    total_bytes: int
    placed_bytes: int = 0

    def file(self, doing: str, file: BundleFile, done_bytes: int = 0) -> None:
        """Report what is being done with a file, of which `done_bytes` are done."""
        self.callback(self.placed_bytes + done_bytes, self.total_bytes, f"{doing} {file.name}")

    def waiting(self) -> None:
        """Report that the device is being waited for."""
        self.callback(self.placed_bytes, self.total_bytes, "waiting for the device")

    def whole(self, doing: str) -> None:
        """Report that all bytes are in place and what is still going on."""
        self.callback(self.total_bytes, self.total_bytes, doing)


class FileTransfer:
    """Brings files into the folder in which a bundle is put together.

    bytes_sent: over the transport, repetitions counted. bytes_missing: that were not there.
    """

    def __init__(
        self,
        shell: ReconnectingShell,
        layout: Layout,
        bundle_id: str,
        chunk_bytes: int,
        progress: PushProgress,
    ) -> None:
        self.bytes_sent = 0
        self.bytes_missing = 0
        self._shell = shell
        self._serial = shell.transport.serial
        self._run = shell.run
        self._layout = layout
        self._staged = layout.staged_bundle(bundle_id)
        self._final = layout.bundle(bundle_id)
        self._chunk_bytes = chunk_bytes
        self._progress = progress
        self._hash_program = shell.again(lambda: remote_files.hash_program(shell.transport))

    def target(self, file: BundleFile) -> str:
        """Its place in the staged folder."""
        return f"{self._staged}/{file.name}"

    def is_right(self, file: BundleFile, remote: str) -> bool:
        """Whether the regular file `remote` has the size and the SHA-256 of `file`."""
        if remote_files.sizes_bytes(self._run, [remote]) != [file.bytes]:
            return False
        self._progress.file("verifying", file, file.bytes)
        if remote_files.sha256(self._run, remote, file.bytes, self._hash_program) != file.sha256:
            return False
        self._progress.placed_bytes += file.bytes
        return True

    def bring(self, file: BundleFile) -> None:
        """Send what of `file` is not on the device, verify it there, and put it in its place."""
        part = self._layout.staged_file(file.sha256)
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
                self._progress.file("verifying", file, file.bytes)
                if self.place(file, part, following) or self.is_right(file, self.target(file)):
                    return
                if remote_files.sizes_bytes(self._run, [f"{self._final}/{file.name}"]) != [None]:
                    raise ChangedByOthers
        raise TransferDamaged(
            f"{file.name} has other bytes on the device {self._serial} than were sent, "
            f"{_REPAIRS} times; try another cable or port, and look for a failing storage"
        )

    def _follow(self, file: BundleFile, part: str, todo: list[_Range]) -> BackgroundHash | None:
        """Have the file hashed behind what is sent, if that is its whole rest in several chunks."""
        count = sum(piece.end - piece.begin for piece in todo)
        if len(todo) < 2 or todo[0].begin + count != file.bytes:
            return None
        return BackgroundHash.start(
            self._run,
            part,
            f"{self._layout.staging}/{file.sha256}",
            file.bytes,
            self._chunk_bytes,
            self._hash_program,
        )

    def _send(self, file: BundleFile, source: BinaryIO, part: str, todo: list[_Range]) -> None:
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
                self._progress.file("sending", file, before + count)

            report(0)
            try:
                source.seek(piece.begin)
                self._shell.transport.push(
                    source, part, piece.end - piece.begin, offset=piece.begin, progress=report
                )
            except DeviceGone as error:
                self.bytes_sent += moved
                in_vain += 1
                self._shell.reconnect(error, in_vain)
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
        self, file: BundleFile, source: BinaryIO, part: str, begin_bytes: int = 0
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
        self._progress.file("comparing", file, begin)
        for position, found in zip(range(begin, size, chunk), hashes, strict=True):
            end, stored = min(position + chunk, file.bytes), min(position + chunk, size)
            if found != _sha256_of_range(file, source, position, stored):
                ranges.append(_Range(position, end))
            elif stored < end:
                resume = max(position, stored // _ALIGNMENT_BYTES * _ALIGNMENT_BYTES)
                ranges.append(_Range(resume, end))
            self._progress.file("comparing", file, stored)
        first = -(-size // chunk) * chunk
        return ranges + [
            _Range(position, min(position + chunk, file.bytes))
            for position in range(first, file.bytes, chunk)
        ]

    def place(self, file: BundleFile, remote: str, following: BackgroundHash | None = None) -> bool:
        """Hash `remote` on the device and, if it is right, move it into the staged folder.

        following: has hashed it already; only the right hash counts, else all is hashed here.
        Raises ChangedByOthers if it is gone, or another push put something else there meanwhile.
        """
        target = self.target(file)
        # One command, so that little comes between. The inode shows whether what was moved is what
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
        said = self._run(command, 2 * remote_files.transfer_timeout_s(file.bytes)).text.strip()
        if said == "placed":
            self._progress.placed_bytes += file.bytes
            return True
        if said == "gone":
            # It may also be in its place, if the command was repeated after its answer was lost.
            if self.is_right(file, self.target(file)):
                return True
            raise ChangedByOthers
        if said != "differs":
            raise ProtocolError(
                f"the device {self._serial} answered {excerpt(said)!r} when it was to "
                f"verify {file.name}; look whether its shell has sha256sum"
            )
        return False


@contextmanager
def _opened(file: BundleFile) -> Iterator[BinaryIO]:
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


def _sha256_of_range(file: BundleFile, source: BinaryIO, begin: int, end: int) -> str:
    """SHA-256 of bytes `begin` to `end` of the local file."""
    try:
        source.seek(begin)
        return sha256_of(source, size=end - begin)
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: BundleFile, error: OSError) -> BundleError:
    return BundleError(
        f"{file.path} cannot be read ({error.strerror or error}); check its permissions"
    )
