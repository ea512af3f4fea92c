"""Ranges of files to and from a device, moved by `dd` there: an offset costs nothing, errors have
a code.

`exec:` has a terminal's 4 KiB buffer between, and sync can only write a file from its beginning.
"""

from __future__ import annotations

import io
import os
import shlex
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from device_tests.adb import faults
from device_tests.adb.opener import Deadline, Opener, TimedOut
from device_tests.adb.shell_reply import FRAME, STDERR
from device_tests.adb.shell_stream import ShellStream, keep, running
from device_tests.errors import DeviceGone, ProtocolError
from quantize.errors import DeviceError

BLOCK_BYTES = 1024 * 1024
"""Block of `dd` where the offset allows it."""
MIN_BLOCK_BYTES = 4096
"""Smaller blocks cost too many system calls to be used for more than a few bytes."""
PARALLEL_FROM_BYTES = 8 * BLOCK_BYTES

Progress = Callable[[int], None]
"""Called with the bytes moved so far by this call."""
Fill = Callable[[memoryview, int], int]
"""Reads bytes of the source, from a position, into a view; returns how many."""


class _Moved:
    """How many bytes several threads have moved."""

    def __init__(self, progress: Progress | None) -> None:
        self.total = 0
        self.stopped = threading.Event()
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.total += count
            if self._progress is not None:
                self._progress(self.total)


@dataclass(frozen=True)
class Transfer:
    """Moves parts of the file `remote` by an opener's streams; gives up after `stall_s` in which
    no byte moved."""

    opener: Opener
    remote: str
    stall_s: float

    def push(self, source: BinaryIO, length: int, offset: int, progress: Progress | None) -> None:
        """A large part of a plain file travels in the opener's parallel streams."""
        moved = _Moved(progress)
        fill, is_file = _filler(source)
        if not (is_file and self.opener.parallel_streams > 1 and length >= PARALLEL_FROM_BYTES):
            self._push(fill, 0, length, offset, moved)
        else:
            streams = self.opener.parallel_streams
            ends = [
                (offset + length * n // streams) // BLOCK_BYTES * BLOCK_BYTES - offset
                for n in range(1, streams)
            ]
            with ThreadPoolExecutor(streams) as pool:
                futures = [
                    pool.submit(self._push, fill, begin, end - begin, offset, moved)
                    for begin, end in zip([0, *ends], [*ends, length], strict=True)
                ]
                try:
                    ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
                finally:
                    moved.stopped.set()
                for future in ended:
                    future.result()
        if is_file:
            source.seek(length, os.SEEK_CUR)

    def pull(
        self, destination: BinaryIO, offset: int, length: int | None, progress: Progress | None
    ) -> int:
        skip, unwanted = divmod(offset, BLOCK_BYTES)
        command = f"LC_ALL=C dd {shlex.quote('if=' + self.remote)} bs={BLOCK_BYTES} skip={skip}"
        if length is not None:
            command += f" count={-(-(unwanted + length) // BLOCK_BYTES)}"
        moved = _Moved(progress)
        errors = bytearray()
        with self._running(command, "pulling") as shell:
            shell.end_input(self._deadline())
            for channel, data in shell.pieces(self._deadline):
                if channel == STDERR:
                    keep(errors, data)
                    continue
                data, unwanted = data[unwanted:], max(0, unwanted - len(data))
                if length is not None:
                    data = data[: length - moved.total]
                if not data:
                    continue
                try:
                    destination.write(data)
                except OSError as error:
                    raise DeviceError(
                        f"what was pulled from {self.remote} cannot be written here ({error}): "
                        "make room or choose another place"
                    ) from error
                moved.add(len(data))
        self._check(shell, errors, "read")
        return moved.total

    def _push(self, fill: Fill, begin: int, length: int, offset: int, moved: _Moved) -> None:
        """The source's bytes from `begin`, to `offset` + `begin` on the device."""
        for start, count, block in _ranges(offset + begin, length):
            self._push_range(fill, start - offset, count, start, block, moved)

    def _push_range(
        self, fill: Fill, begin: int, length: int, start: int, block: int, moved: _Moved
    ) -> None:
        """One `dd`; one that fails goes on taking input, so that the reason is heard."""
        command = (
            f"LC_ALL=C dd {shlex.quote('of=' + self.remote)} bs={block} seek={start // block} "
            "conv=notrunc || { s=$?; cat >/dev/null; exit $s; }"
        )
        left = length
        with self._running(command, "pushing") as shell:
            frame = memoryview(bytearray(FRAME.size + min(length, shell.best_input_bytes)))
            while left and not shell.has_output():
                if moved.stopped.is_set():
                    raise DeviceGone("the other half of the push broke off")
                data = frame[FRAME.size :][:left]
                count = fill(data, begin + length - left)
                if not count:
                    raise DeviceError(
                        f"what is to be pushed ended {left} bytes early: it was shortened "
                        "meanwhile, or its length is wrong"
                    )
                if not shell.write(frame[: FRAME.size + count], self._deadline()):
                    break
                left -= count
                moved.add(count)
            shell.end_input(self._deadline())
            errors = shell.collect(self._deadline)[STDERR]
        self._check(shell, errors, "written")
        if left:
            raise ProtocolError(
                f"{self.opener.serial} says {self.remote} is written but took {length - left} of "
                f"{length} bytes: push it again"
            )

    @contextmanager
    def _running(self, command: str, doing: str) -> Iterator[ShellStream]:
        try:
            with running(self.opener, command, self._deadline()) as shell:
                yield shell
        except TimedOut as error:
            raise faults.stalled(
                f"{doing} {self.remote}", self.opener.serial, self.stall_s
            ) from error

    def _deadline(self) -> Deadline:
        return Deadline(self.stall_s)

    def _check(self, shell: ShellStream, errors: bytearray, done: str) -> None:
        if shell.exit_code != 0:
            what = f"{self.remote} cannot be {done}"
            raise faults.failed_command(what, bytes(errors), self.opener.serial)


def _ranges(offset: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Offset, length and block of each `dd`: its offset is a multiple of its block."""
    head = min(length, -offset % MIN_BLOCK_BYTES)
    if head:  # the few bytes up to where larger blocks fit
        yield offset, head, 1
    if length > head or not length:
        start = offset + head
        yield start, length - head, min(start & -start or BLOCK_BYTES, BLOCK_BYTES)


def _filler(source: BinaryIO) -> tuple[Fill, bool]:
    """How `source` is read from where it stands, and whether threads may do so side by side."""
    is_file = isinstance(source, io.FileIO | io.BufferedReader | io.BufferedRandom) and hasattr(
        os, "preadv"
    )
    if isinstance(source, io.BufferedRandom):
        source.flush()
    start = source.tell() if is_file else 0

    def fill(view: memoryview, at: int) -> int:
        try:
            if is_file:
                return os.preadv(source.fileno(), [view], start + at)
            data = source.read(len(view))
        except OSError as error:
            raise DeviceError(
                f"what is to be pushed cannot be read ({error}): check the file here"
            ) from error
        view[: len(data)] = data
        return len(data)

    return fill, is_file
