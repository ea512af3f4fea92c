"""A file as a `bytes` object whose content is mapped and not read.

ExecuTorch's bindings load a program from a file or from `bytes`. From a file they lock its pages in
memory, and XNNPACK's weights cache unmaps data that some operators still read (XNNCompiler.cpp of
1.5.1 keeps the buffers of operators that do not pack only if there is no cache). From `bytes`
everything stays where it is, so the bytes are made to be the file's pages.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

from export.host.streaming import page_cache
from export.host.streaming.read_ahead import Region
from quantize.errors import InputError

_PROT_READ, _PROT_WRITE = 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
_MADV_RANDOM, _MADV_DONTNEED = 1, 4  # linux/mman.h
_HEADER_BYTES = bytes.__basicsize__ - 1
"""Of a bytes object, before its content; the 1 is the zero behind it."""
_MANY = 1 << 28
"""References: the memory is not the allocator's and must never be given back to it."""


class _Header(ctypes.Structure):
    """PyBytesObject (Include/cpython/bytesobject.h) up to its content."""

    _fields_ = (
        ("references", ctypes.c_ssize_t),
        ("type", ctypes.c_void_p),
        ("size", ctypes.c_ssize_t),
        ("hash", ctypes.c_ssize_t),
    )


class MappedBytes:
    """The content of a file, read-only: `content` is a `bytes` object of its mapped pages.

    The mapping stays until the process ends; what it holds of memory are pages of the file, which
    the system may drop. Raises OSError, and InputError for an interpreter that lays bytes out in
    another way.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if sys.implementation.name != "cpython" or ctypes.sizeof(_Header) != _HEADER_BYTES:
            raise InputError(
                "this Python cannot have a program mapped as bytes; run without a memory budget"
            )
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            # A page for the header before the content, and one for the zero behind it.
            begin = _map(None, size + 2 * mmap.PAGESIZE, _MAP_PRIVATE | _MAP_ANONYMOUS, -1)
            self.address = begin + mmap.PAGESIZE
            if size:
                _map(self.address, size, _MAP_SHARED | _MAP_FIXED, descriptor)
        finally:
            os.close(descriptor)
        at = self.address - _HEADER_BYTES
        header = _Header.from_address(at)
        header.type, header.size, header.hash = id(bytes), size, -1
        header.references = _MANY
        self.content: bytes = ctypes.cast(at, ctypes.py_object).value

    @property
    def whole(self) -> Region:
        """All of it."""
        return self.region(0, len(self.content))

    def expect_little(self) -> None:
        """Read no more of the file than what is used; else the system reads megabytes ahead."""
        _madvise(self.address, max(len(self.content), 1), _MADV_RANDOM)

    def forget(self) -> None:
        """Let go of its pages, here and in the page cache; what is used again is read again."""
        _madvise(self.address, max(len(self.content), 1), _MADV_DONTNEED)
        page_cache.drop([self.path])

    def region(self, offset: int, size: int) -> Region:
        """The whole pages that hold `size` bytes from `offset`."""
        begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
        end = -(-(offset + size) // mmap.PAGESIZE) * mmap.PAGESIZE
        return Region(self.path, begin, end - begin, self.address + begin)


def _madvise(address: int, size: int, advice: int) -> None:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function(address, size, advice)


def _map(address: int | None, size: int, flags: int, descriptor: int) -> int:
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    )  # fmt: skip
    protection = _PROT_READ | (_PROT_WRITE if flags & _MAP_ANONYMOUS else 0)
    found = function(address, size, protection, flags, descriptor, 0)
    if found in (None, ctypes.c_void_p(-1).value):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found
