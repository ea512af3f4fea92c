"""A memory cgroup of one's own: a hard limit on what a process and its page cache hold.

Linux with the memory controller, version 1 or 2, and the right to make groups (root as a rule).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_VERSION_1 = Path("/sys/fs/cgroup/memory")
_VERSION_2 = Path("/sys/fs/cgroup")


class CannotLimit(Exception):
    """No memory cgroup can be made here; the text says why."""


class MemoryGroup:
    """A group that was made, with its limit; files as in the documentation of the kernel."""

    def __init__(self, folder: Path, limit_bytes: int, *, version: int) -> None:
        self._folder = folder
        self._version = version
        limit = "memory.limit_in_bytes" if version == 1 else "memory.max"
        (folder / limit).write_text(str(limit_bytes))

    def enter(self) -> None:
        """Put the calling process in: for what runs between fork and exec."""
        (self._folder / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def peak_bytes(self) -> int:
        """The most that was ever charged."""
        name = "memory.max_usage_in_bytes" if self._version == 1 else "memory.peak"
        return int((self._folder / name).read_text())

    @property
    def times_at_the_limit(self) -> int:
        """How often an allocation met the limit, and pages had to be dropped for it."""
        if self._version == 1:
            return int((self._folder / "memory.failcnt").read_text())
        events = dict(
            line.split() for line in (self._folder / "memory.events").read_text().splitlines()
        )
        return int(events["max"])


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A group for the duration; whoever is in it must be gone at the end. Raises CannotLimit."""
    version, root = (1, _VERSION_1) if _VERSION_1.is_dir() else (2, _VERSION_2)
    folder = root / f"pocketdiff-{os.getpid()}-{time.monotonic_ns()}"
    try:
        folder.mkdir()
    except OSError as error:
        raise CannotLimit(f"no memory cgroup can be made ({error})") from error
    try:
        try:
            group = MemoryGroup(folder, limit_bytes, version=version)
        except OSError as error:
            raise CannotLimit(f"no limit can be set on a memory cgroup ({error})") from error
        yield group
    finally:
        folder.rmdir()
