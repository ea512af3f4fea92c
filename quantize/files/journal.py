"""An append-only file of JSON lines that tells a later process how far an earlier one came."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from quantize.files.json_lines import append_bytes, open_for_append, parse_line


class Journal:
    """Records of one piece of work, held by one process at a time.

    `work` is a text that is the same for the same work. `records` are those of earlier processes
    that did this work; `is_new` tells that there is no such work, be it that the file is new or
    that it is of other work, which `begin` then clears. Raises BlockingIOError while another
    process has the journal, OSError.
    """

    def __init__(self, path: Path, work: str):
        self._path = path
        self._descriptor = _open_locked(path)
        self._first = {"work": work}
        try:
            first, *self.records = _read(self._descriptor) or [{}]
        except BaseException:
            os.close(self._descriptor)
            raise
        self.is_new = first != self._first
        if self.is_new:
            self.records = []

    def begin(self) -> None:
        """Forgets all records of other work."""
        os.ftruncate(self._descriptor, 0)
        self.append([self._first])

    def append(self, records: Iterable[dict]) -> None:
        """Adds records; they are on the disk when this returns, unless it raises OSError."""
        data = b"".join(json.dumps(r, separators=(",", ":")).encode() + b"\n" for r in records)
        append_bytes(self._descriptor, data)

    def close(self) -> None:
        """Lets other processes have it."""
        os.close(self._descriptor)


def work_text(files: Iterable[Path], **parts: object) -> str:
    """A text that differs whenever the files (by name, size and time) or the parts do."""
    stats = [(path.name, path.stat()) for path in files]
    named = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    document = json.dumps({"files": named, **parts}, sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()


def _open_locked(path: Path) -> int:
    while True:
        descriptor = open_for_append(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between the two lines above, the process that had it may have removed it.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _read(descriptor: int) -> list[dict]:
    """All whole lines; what a killed process left of a line behind them is cut off."""
    with open(os.dup(descriptor), "rb") as file:
        file.seek(0)
        data = file.read()
    records, end = [], 0
    for line in data.splitlines(keepends=True):
        record = parse_line(line)
        if record is None or not line.endswith(b"\n"):
            break
        records.append(record)
        end += len(line)
    os.ftruncate(descriptor, end)
    return records
