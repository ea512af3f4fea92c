"""Which share of files the page cache holds, and how to make it let go of them.

For loading a bundle as after a restart, without rights of an administrator. Linux only; where the
system does not tell, the answer is None.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

_LOW_BIT = bytes(value & 1 for value in range(256))


def resident_share(files: Iterable[Path]) -> float | None:
    """Resident pages by all pages of the files (mincore); None where that cannot be told."""
    resident = total = 0
    try:
        for path in files:
            pages = _resident_pages(path)
            resident += pages.count(1)
            total += len(pages)
    except (OSError, ValueError, AttributeError):
        return None
    return resident / total if total else None


def drop(files: Iterable[Path]) -> None:
    """Ask the kernel to forget the files' pages (posix_fadvise DONTNEED).

    It keeps pages that a process has mapped, and file systems in memory (tmpfs) keep everything:
    `resident_share` tells what came of it. Raises OSError for a file that cannot be opened.
    """
    for path in files:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)  # pages not yet written are kept otherwise
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _resident_pages(path: Path) -> bytes:
    """One byte a page, 1 where it is resident. Raises OSError where the kernel does not tell."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if status.st_size == 0:
            return b""
        # mm/mincore.c, can_do_mincore: of other people's files all pages are said to be resident.
        if status.st_uid != os.geteuid() and not os.access(path, os.W_OK):
            raise PermissionError(f"the kernel does not tell the resident pages of {path}")
        # A private mapping, since ctypes wants one it may write to; no page of it is touched.
        with mmap.mmap(
            descriptor, status.st_size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
        ) as mapped:
            pages = ctypes.create_string_buffer(-(-status.st_size // mmap.PAGESIZE))
            anchor = ctypes.c_char.from_buffer(mapped)
            try:
                mincore = ctypes.CDLL(None, use_errno=True).mincore
                mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
                if mincore(ctypes.addressof(anchor), status.st_size, pages) != 0:
                    raise OSError(ctypes.get_errno(), "mincore fails")
            finally:
                del anchor
        return pages.raw.translate(_LOW_BIT)
    finally:
        os.close(descriptor)
