"""Samples the memory of a process from /proc; run as a script, it watches its parent.

A process of its own and not a thread, since ExecuTorch's bindings hold Python's global lock while
a program loads or runs. It imports nothing but the standard library, so that it begins at once.
"""

from __future__ import annotations

import json
import os
import sys
import time

_PARENT_CHECK_S = 1.0


def sample(pid: int | str = "self") -> dict[str, int | None]:
    """One sample of a process: sizes in bytes, page faults since it began.

    From smaps_rollup and stat; one that the system does not state is None. `file_bytes` is what
    is resident and not anonymous: mapped files and shared memory.
    """
    sizes = _sizes(pid)
    rss, anonymous = sizes.get("Rss"), sizes.get("Anonymous")
    minor, major = _faults(pid)
    return {
        "rss_bytes": rss,
        "pss_bytes": sizes.get("Pss"),
        "anonymous_bytes": anonymous,
        "file_bytes": None if rss is None or anonymous is None else rss - anonymous,
        "swap_bytes": sizes.get("SwapPss", sizes.get("Swap")),
        "major_faults": major,
        "minor_faults": minor,
    }


def _sizes(pid: int | str) -> dict[str, int]:
    sizes = {}
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            for line in file:
                name, _, value = line.partition(":")
                number, _, unit = value.strip().partition(" ")
                if unit == "kB":
                    sizes[name] = int(number) * 1024
    except OSError:
        pass
    return sizes


def _faults(pid: int | str) -> tuple[int | None, int | None]:
    """Minor and major page faults."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name may hold spaces
        return int(fields[7]), int(fields[9])
    except (OSError, IndexError):
        return None, None


def watch(pid: int, began_s: float, interval_ms: int, events_file: str) -> None:
    """Append a `memory` event to `events_file` every `interval_ms` until the parent `pid` ends.

    began_s: when the process began, on the clock of time.monotonic. A full disk ends it quietly:
    the runner meets it too. Raises OSError if the file cannot be opened.
    """
    descriptor = os.open(events_file, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    due_s = time.monotonic()
    while os.getppid() == pid:
        t_ms = round(1000 * (time.monotonic() - began_s), 3)
        fields = sample(pid)
        if fields["rss_bytes"] is None:
            return
        line = json.dumps({"event": "memory", "t_ms": t_ms} | fields, separators=(",", ":"))
        if not _append(descriptor, line.encode("ascii") + b"\n"):
            return
        # What a sample takes is part of the interval; one that came too late is left out.
        due_s = max(due_s + interval_ms / 1000, time.monotonic())
        while os.getppid() == pid and (left_s := due_s - time.monotonic()) > 0:
            time.sleep(min(left_s, _PARENT_CHECK_S))


def _append(descriptor: int, line: bytes) -> bool:
    """Whether the line was written, whole; else the file is as it was."""
    try:
        written = os.write(descriptor, line)
    except OSError:
        return False
    if written < len(line):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
    return written == len(line)


if __name__ == "__main__":
    watch(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
