"""What the operating system states about this process, and what native libraries log."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import IO, Literal


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far, in bytes.

    From /proc where there is one: `getrusage` there inherits the peak of the parent process.
    """
    kib = _proc_value("status", "VmHWM")
    if kib is not None:
        return kib * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_address_space_bytes() -> int:
    """The largest address space of this process so far; 0 where the system does not state it."""
    return (_proc_value("status", "VmPeak") or 0) * 1024


_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_M_MMAP_THRESHOLD = -3  # malloc.h of glibc


def die_with_parent() -> None:
    """This process is killed when the thread that started it ends, however it ends. Linux only."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def resident_bytes(kind: Literal["RssAnon", "RssFile", "RssShmem"]) -> int:
    """Resident bytes: its own, of mapped files, or shared; 0 where the system states none."""
    return (_proc_value("status", kind) or 0) * 1024


def storage_read_bytes() -> int | None:
    """What this process has had read from storage so far, its threads and read-ahead included.

    read_bytes of /proc/self/io; None where there is none.
    """
    return _proc_value("io", "read_bytes")


def _proc_value(file: str, name: str) -> int | None:
    """The number behind a name in a file of /proc/self; None where there is none."""
    try:
        for line in Path("/proc/self", file).read_text(encoding="ascii").splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1])
    except OSError:
        pass
    return None


def processor_name() -> str:
    """The processor's model where the system states it, the machine's kind elsewhere."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


class CapturedText:
    """What was written to a captured file descriptor so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def text(self) -> str:
        """All of it, decoded."""
        self._file.seek(0)
        return self._file.read().decode("utf-8", errors="replace")


@contextmanager
def captured_stderr() -> Iterator[CapturedText]:
    """Hold back what anything writes to standard error, C++ by its file descriptor included.

    For the duration of a native call that logs. ExecuTorch's bindings write through Python's
    `sys.stderr`, its libraries to descriptor 2.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            with open(os.dup(2), "w", buffering=1, errors="replace") as text, redirect_stderr(text):
                yield CapturedText(file)
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def return_large_blocks() -> None:
    """Have glibc return blocks of a mebibyte and more to the system when they are freed.

    It raises that limit to 32 MiB by itself, and then keeps tens of megabytes between what stays:
    lowering a vocabulary head of 262,144 x 2816 took up to 9.2 GiB so. Of this process, from now
    on; elsewhere it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
