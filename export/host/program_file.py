"""What a program file (.pte) says of its memory and of where its data lies.

Read from the file's header alone, without ExecuTorch, so that a host without torch can budget a
bundle. The format is `program.fbs` of ExecuTorch 1.5 (a flatbuffer, then segments); field numbers
below are its order of fields, which flatbuffers never change.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from quantize.errors import BundleError

T = TypeVar("T")

IDENTIFIER = b"ET12"
# program.fbs: table -> number of a field in it.
_PROGRAM_PLANS, _PROGRAM_SEGMENTS, _PROGRAM_CONSTANTS, _PROGRAM_NAMED = 1, 4, 5, 7
_PLAN_BUFFERS = 8
_CONSTANTS_SEGMENT, _CONSTANTS_OFFSETS = 0, 1
_NAMED_KEY, _NAMED_SEGMENT = 0, 1
_SEGMENT_OFFSET, _SEGMENT_SIZE = 0, 1
# The extended header behind the identifier: mark, length, size of the flatbuffer, start of the
# segments (schema/extended_header.h).
_EXTENDED = struct.Struct("<4sIQQ")
_MOST = 1_000_000
"""Items of a list at most; a file that says more is damaged."""


@dataclass(frozen=True)
class ProgramMemory:
    """Bytes of one program.

    planned: buffers that the runtime allocates and touches when it loads the method, caches of keys
    and values among them. constants: tables and buffers that operators outside of the delegates
    read from the mapped file. weights: what delegates take from the file and pack into memory of
    their own. delegates: serialized graphs of the delegates. file: the whole.
    """

    planned_bytes: int
    constant_bytes: int
    weight_bytes: int
    delegate_bytes: int
    file_bytes: int


@dataclass(frozen=True)
class Extent:
    """Bytes of a file: from `start`, `size` of them."""

    start: int
    size: int


@dataclass(frozen=True)
class ProgramLayout:
    """Where a program file keeps what.

    header: the flatbuffer. named: weights of the delegates by their keys. constants: the room of
    each constant of operators outside of the delegates (with the padding behind it). delegates:
    the other segments, in which graphs of the delegates lie.
    """

    header: Extent
    named: dict[str, Extent]
    constants: tuple[Extent, ...]
    delegates: tuple[Extent, ...]


def read_program_memory(path: str | os.PathLike[str]) -> ProgramMemory:
    """Read the header of a `.pte`. Raises BundleError for a file that is not one of ExecuTorch."""
    return _reading(path, _memory)


def read_program_layout(path: str | os.PathLike[str]) -> ProgramLayout:
    """Read the header of a `.pte`. Raises BundleError for a file that is not one of ExecuTorch."""
    return _reading(path, _layout)


def _reading(path: str | os.PathLike[str], read: Callable[[mmap.mmap, int], T]) -> T:
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 64:
            raise BundleError(f"{path} has {size} bytes and is no program; export the bundle again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[4:8] != IDENTIFIER:
                raise BundleError(
                    f"{path} begins with {bytes(data[4:8])!r} in place of {IDENTIFIER!r}, the mark "
                    "of an ExecuTorch program; export the bundle again"
                )
            try:
                return read(data, size)
            except (struct.error, IndexError, ValueError) as error:
                raise BundleError(
                    f"{path} is no whole ExecuTorch program ({error}); export the bundle again"
                ) from error


def _memory(data: mmap.mmap, size: int) -> ProgramMemory:
    program = _Table(data, struct.unpack_from("<I", data, 0)[0])
    segments = [table.u64(_SEGMENT_SIZE) for table in program.tables(_PROGRAM_SEGMENTS)]
    plans = program.tables(_PROGRAM_PLANS)
    if not plans:
        raise ValueError("it has no method")
    planned = sum(sum(plan.i64s(_PLAN_BUFFERS)) for plan in plans)
    constants: set[int] = set()
    section = program.table(_PROGRAM_CONSTANTS)
    if section is not None and section.count(_CONSTANTS_OFFSETS):
        constants.add(section.u32(_CONSTANTS_SEGMENT))
    named = {table.u32(_NAMED_SEGMENT) for table in program.tables(_PROGRAM_NAMED)} - constants
    rest = set(range(len(segments))) - constants - named
    return ProgramMemory(
        planned_bytes=planned,
        constant_bytes=sum(segments[i] for i in constants),
        weight_bytes=sum(segments[i] for i in named),
        delegate_bytes=sum(segments[i] for i in rest),
        file_bytes=size,
    )


def _layout(data: mmap.mmap, size: int) -> ProgramLayout:
    mark, _, header_size, base = _EXTENDED.unpack_from(data, 8)
    if mark != b"eh00":
        raise ValueError("it has no extended header")
    program = _Table(data, struct.unpack_from("<I", data, 0)[0])
    segments = [
        Extent(base + table.u64(_SEGMENT_OFFSET), table.u64(_SEGMENT_SIZE))
        for table in program.tables(_PROGRAM_SEGMENTS)
    ]
    if any(extent.start + extent.size > size for extent in segments) or header_size > size:
        raise ValueError("a segment ends behind the file")
    used: set[int] = set()
    constants: list[Extent] = []
    section = program.table(_PROGRAM_CONSTANTS)
    if section is not None and section.count(_CONSTANTS_OFFSETS):
        number = section.u32(_CONSTANTS_SEGMENT)
        used.add(number)
        starts = section.u64s(_CONSTANTS_OFFSETS)
        ends = [*starts[1:], segments[number].size]
        constants = [
            Extent(segments[number].start + start, end - start)
            for start, end in zip(starts, ends, strict=True)
        ]
    named = {}
    for table in program.tables(_PROGRAM_NAMED):
        used.add(table.u32(_NAMED_SEGMENT))
        named[table.text(_NAMED_KEY)] = segments[table.u32(_NAMED_SEGMENT)]
    rest = tuple(extent for i, extent in enumerate(segments) if i not in used)
    return ProgramLayout(Extent(0, header_size), named, tuple(constants), rest)


class _Table:
    """A flatbuffer table: fields by number, absent ones as 0 or nothing."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at
        self.vtable = at - struct.unpack_from("<i", data, at)[0]
        if self.vtable < 0:
            raise ValueError("a table lies before the file")
        self.fields = (struct.unpack_from("<H", data, self.vtable)[0] - 4) // 2

    def _place(self, field: int) -> int:
        if field >= self.fields:
            return 0
        offset = struct.unpack_from("<H", self.data, self.vtable + 4 + 2 * field)[0]
        return self.at + offset if offset else 0

    def u32(self, field: int) -> int:
        place = self._place(field)
        return struct.unpack_from("<I", self.data, place)[0] if place else 0

    def u64(self, field: int) -> int:
        place = self._place(field)
        return struct.unpack_from("<Q", self.data, place)[0] if place else 0

    def table(self, field: int) -> _Table | None:
        place = self._place(field)
        return _Table(self.data, _follow(self.data, place)) if place else None

    def count(self, field: int) -> int:
        place = self._place(field)
        return struct.unpack_from("<I", self.data, _follow(self.data, place))[0] if place else 0

    def _items(self, field: int) -> tuple[int, int]:
        count = self.count(field)
        if count > _MOST:
            raise ValueError(f"a list has {count} items")
        return count, _follow(self.data, self._place(field)) + 4 if count else 0

    def tables(self, field: int) -> list[_Table]:
        count, first = self._items(field)
        return [_Table(self.data, _follow(self.data, first + 4 * i)) for i in range(count)]

    def i64s(self, field: int) -> list[int]:
        count, first = self._items(field)
        return list(struct.unpack_from(f"<{count}q", self.data, first)) if count else []

    def u64s(self, field: int) -> list[int]:
        count, first = self._items(field)
        return list(struct.unpack_from(f"<{count}Q", self.data, first)) if count else []

    def text(self, field: int) -> str:
        place = self._place(field)
        if not place:
            return ""
        place = _follow(self.data, place)
        length = struct.unpack_from("<I", self.data, place)[0]
        return bytes(self.data[place + 4 : place + 4 + length]).decode("utf-8")


def _follow(data: mmap.mmap, place: int) -> int:
    return place + struct.unpack_from("<I", data, place)[0]
