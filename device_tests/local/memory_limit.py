"""A memory cgroup that the processes of a local device share."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

from device_tests.local.adbd import LocalDeviceUnavailable

_REMOVE_S = 10.0


def _memory_cgroup() -> Path:
    """The folder of this process's memory cgroup, version 1."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            for mount in Path("/proc/self/mountinfo").read_text().splitlines():
                fields = mount.split()
                kind, _, options = fields[fields.index("-") + 1 :]
                if kind == "cgroup" and "memory" in options.split(","):
                    return Path(fields[4]) / group.lstrip("/")
    raise LocalDeviceUnavailable(
        "a memory limit of the local device needs a memory cgroup of version 1, and this system "
        "has none; leave memory_bytes out"
    )


def make_cgroup(limit_bytes: int) -> Path:
    folder = _memory_cgroup() / f"pocketdiff-{uuid.uuid4().hex[:12]}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
    except OSError as error:
        raise LocalDeviceUnavailable(
            f"the memory limit of the local device cannot be set in {folder}: {error.strerror}; be "
            "root or leave memory_bytes out"
        ) from error
    return folder


def remove_cgroup(folder: Path) -> None:
    """The group empties when the last process is gone, a moment after the first."""
    give_up = time.monotonic() + _REMOVE_S
    while True:
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.01)
