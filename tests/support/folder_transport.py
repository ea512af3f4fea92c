"""A device that is a folder of this machine: commands by `sh`, with faults to be injected.

For what a real adbd adds nothing to: cuts after a given byte, damage on the way, full storage.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from device_tests.adb.transport import Progress, RemoteStat, ShellResult
from device_tests.errors import CommandFailed, CommandTimeout, DeviceGone, StorageFull

BLOCK_BYTES = 4096


class FolderTransport:
    """Paths are those of this machine; tests give a temporary folder as the root.

    cut_after_bytes: the connection breaks after this many more bytes of pushes. comes_back: whether
    `reconnect` then finds it again. damage: called with offset and bytes of each block, gives what
    is stored. capacity_bytes: a push that would store more than this in one file finds it full.
    before_push, before_reconnect, before_shell: called first, to change what is on the device.
    """

    kind = "tcp"

    def __init__(self, *, path: str | None = None, shell: tuple[str, ...] = ("sh",)) -> None:
        self.serial = "folder"
        self.commands: list[str] = []
        self.pushed: list[tuple[str, int, int]] = []
        self.reconnections = 0
        self.cut_after_bytes: int | None = None
        self.cut_commands: list[str] = []
        self.comes_back = True
        self.capacity_bytes: int | None = None
        self.damage: Callable[[int, bytes], bytes] = lambda _, data: data
        self.before_push: Callable[[str, int], None] = lambda remote, offset: None
        self.before_reconnect: Callable[[], None] = lambda: None
        self.before_shell: Callable[[str], None] = lambda command: None
        self._gone = False
        self._shell = shell
        self._environment = dict(os.environ) | ({"PATH": path} if path else {})

    @property
    def bytes_pushed(self) -> int:
        """Bytes that were stored by pushes."""
        return sum(count for _, _, count in self.pushed)

    def shell(self, command: str, *, timeout_s: float = 30.0) -> ShellResult:
        self._check()
        self.before_shell(command)
        self.commands.append(command)
        try:
            done = subprocess.run(
                # `sync` would wait for all that this machine writes.
                [*self._shell, "-c", f"sync() {{ :; }}; {command}"],
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=timeout_s,
                env=self._environment,
            )
        except subprocess.TimeoutExpired:
            raise CommandTimeout(f"no end after {timeout_s} s") from None
        # After the command: what was asked has happened, and nobody heard of it.
        if self.cut_commands and self.cut_commands[0] in command:
            self.cut_commands.pop(0)
            self._break()
        code = done.returncode
        return ShellResult(code if code >= 0 else 128 - code, done.stdout, done.stderr)

    def push(
        self,
        source: BinaryIO,
        remote: str,
        length: int,
        *,
        offset: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self._check()
        self.before_push(remote, offset)
        descriptor = os.open(remote, os.O_WRONLY | os.O_CREAT, 0o644)
        moved = 0
        try:
            while moved < length:
                count = min(BLOCK_BYTES, length - moved)
                if self.cut_after_bytes is not None:
                    count = min(count, self.cut_after_bytes)
                    if count == 0:
                        self.cut_after_bytes = None
                        self._break()
                    self.cut_after_bytes -= count
                if self.capacity_bytes is not None and offset + moved + count > self.capacity_bytes:
                    raise StorageFull("no room; delete something")
                data = source.read(count)
                if len(data) != count:
                    raise CommandFailed("the file ended early")
                os.pwrite(descriptor, self.damage(offset + moved, data), offset + moved)
                moved += count
                if progress is not None:
                    progress(moved)
        finally:
            self.pushed.append((remote, offset, moved))
            os.close(descriptor)

    def pull(
        self,
        remote: str,
        destination: BinaryIO,
        *,
        offset: int = 0,
        length: int | None = None,
        progress: Progress | None = None,
    ) -> int:
        self._check()
        try:
            with Path(remote).open("rb") as file:
                file.seek(offset)
                return destination.write(file.read(-1 if length is None else length))
        except OSError as error:
            raise CommandFailed(f"cannot read {remote}: {error}") from error

    def stat(self, remote: str) -> RemoteStat | None:
        self._check()
        try:
            status = os.stat(remote)
        except OSError:
            return None
        return RemoteStat(status.st_size, status.st_mode, int(status.st_mtime))

    @contextmanager
    def forward(self, remote: str) -> Iterator[int]:
        raise CommandFailed("a folder has no ports")
        yield 0

    def reconnect(self, timeout_s: float) -> None:
        self.before_reconnect()
        if not self.comes_back:
            raise DeviceGone(f"{self.serial} did not come back within {timeout_s} s")
        self._gone = False
        self.reconnections += 1

    def close(self) -> None:
        self._gone = True

    def _check(self) -> None:
        if self._gone:
            raise DeviceGone("the connection is broken")

    def _break(self) -> None:
        self._gone = True
        raise DeviceGone("the connection broke")
