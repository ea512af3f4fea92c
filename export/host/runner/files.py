"""The files that a run leaves: events.jsonl grows by whole lines, result.json appears whole."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from export.contract.runner_protocol import RESULT_FILE, event_line, result_bytes
from quantize.files.durable import sync

_RESERVED_BYTES = 4096
"""Held for the result, so that a full disk can still be reported; one without numbers fits."""


class EventsFile:
    """events.jsonl, open: to call it writes an event, in one piece."""

    def __init__(self, path: Path, began_s: float) -> None:
        """began_s: when the process began, on the clock of time.monotonic.

        Raises FileExistsError for a folder that was used for a run before, OSError.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)
        self.path = path
        self.began_s = began_s

    def __call__(self, event: str, **fields: Any) -> None:
        line = event_line(event, 1000 * (time.monotonic() - self.began_s), fields)
        written = os.write(self._descriptor, line)
        while written < len(line):  # a disk that is nearly full takes a part
            try:
                written += os.write(self._descriptor, line[written:])
            except OSError:
                size = os.fstat(self._descriptor).st_size
                os.ftruncate(self._descriptor, size - written)
                raise

    def sync(self) -> None:
        """Have the system write it to the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """No more events follow."""
        os.close(self._descriptor)


def reserve_result(folder: Path) -> None:
    """Take room on the disk for a small result. Raises OSError."""
    descriptor = _open_part(folder)
    try:
        os.posix_fallocate(descriptor, 0, _RESERVED_BYTES)
    finally:
        os.close(descriptor)


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """The result under its name, whole and on the disk. Raises OSError, RunnerProtocolError."""
    content = result_bytes(result)
    # Not truncated: what was reserved is written over.
    with os.fdopen(_open_part(folder), "wb", buffering=0) as file:
        written = 0
        while written < len(content):
            written += file.write(memoryview(content)[written:])
        file.truncate(len(content))
        os.fsync(file.fileno())
    os.replace(_part(folder), folder / RESULT_FILE)
    sync(folder)


def _part(folder: Path) -> Path:
    return folder / (RESULT_FILE + ".part")


def _open_part(folder: Path) -> int:
    return os.open(_part(folder), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
