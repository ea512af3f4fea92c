"""What a program file (.pte) says of its memory: planned buffers, constants, packed weights.

Read from the file's header alone, without ExecuTorch, so that a host without torch can budget a
bundle. The format is `program.fbs` of ExecuTorch 1.5 (a flatbuffer, then segments); field numbers
below are its order of fields, which flatbuffers never change.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import BundleError

IDENTIFIER = b"ET12"
# program.fbs: table -> number of a field in it.
_PROGRAM_PLANS, _PROGRAM_SEGMENTS, _PROGRAM_CONSTANTS, _PROGRAM_NAMED = 1, 4, 5, 7
_PLAN_BUFFERS = 8
_CONSTANTS_SEGMENT, _CONSTANTS_OFFSETS = 0, 1
_NAMED_SEGMENT = 1
_SEGMENT_SIZE = 1
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


def read_program_memory(path: str | os.PathLike[str]) -> ProgramMemory:
    """Read the header of a `.pte`. Raises BundleError for a file that is not one of ExecuTorch."""
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
                return _read(data, size)
            except (struct.error, IndexError, ValueError) as error:
                raise BundleError(
                    f"{path} is no whole ExecuTorch program ({error}); export the bundle again"
                ) from error


def _read(data: mmap.mmap, size: int) -> ProgramMemory:
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


def _follow(data: mmap.mmap, place: int) -> int:
    return place + struct.unpack_from("<I", data, place)[0]
