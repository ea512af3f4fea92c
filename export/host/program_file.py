"""What a program file (.pte) states of its memory and of where its data lies.

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

from flatbuffers import number_types
from flatbuffers.table import Table

from quantize.errors import BundleError

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
"""Items of a list at most; a file that states more is damaged."""


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
    the other segments, in which graphs of the delegates lie. planned and file: as of ProgramMemory.
    """

    header: Extent
    named: dict[str, Extent]
    constants: tuple[Extent, ...]
    delegates: tuple[Extent, ...]
    planned_bytes: int
    file_bytes: int


def read_program_memory(path: str | os.PathLike[str]) -> ProgramMemory:
    """Read the header of a `.pte`. Raises BundleError for a file that is not one of ExecuTorch."""
    layout = read_program_layout(path)
    return ProgramMemory(
        planned_bytes=layout.planned_bytes,
        constant_bytes=sum(extent.size for extent in layout.constants),
        weight_bytes=sum(extent.size for extent in set(layout.named.values())),
        delegate_bytes=sum(extent.size for extent in layout.delegates),
        file_bytes=layout.file_bytes,
    )


def read_program_layout(path: str | os.PathLike[str]) -> ProgramLayout:
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
                return _layout(data, size)
            except (struct.error, IndexError, TypeError, ValueError) as error:
                raise BundleError(
                    f"{path} is no whole ExecuTorch program ({error}); export the bundle again"
                ) from error


def _layout(data: mmap.mmap, size: int) -> ProgramLayout:
    mark, _, header_size, base = _EXTENDED.unpack_from(data, 8)
    if mark != b"eh00":
        raise ValueError("it has no extended header")
    program = _Table(data, struct.unpack_from("<I", data, 0)[0])
    plans = program.tables(_PROGRAM_PLANS)
    if not plans:
        raise ValueError("it has no method")
    segments = [
        Extent(base + table.integer(_SEGMENT_OFFSET), table.integer(_SEGMENT_SIZE))
        for table in program.tables(_PROGRAM_SEGMENTS)
    ]
    if any(extent.start + extent.size > size for extent in segments) or header_size > size:
        raise ValueError("a segment ends behind the file")
    used: set[int] = set()
    constants: list[Extent] = []
    section = program.table(_PROGRAM_CONSTANTS)
    if section is not None and (starts := section.integers(_CONSTANTS_OFFSETS)):
        number = section.integer(_CONSTANTS_SEGMENT, number_types.Uint32Flags)
        used.add(number)
        ends = [*starts[1:], segments[number].size]
        constants = [
            Extent(segments[number].start + start, end - start)
            for start, end in zip(starts, ends, strict=True)
        ]
    named = {}
    for table in program.tables(_PROGRAM_NAMED):
        number = table.integer(_NAMED_SEGMENT, number_types.Uint32Flags)
        used.add(number)
        named[table.text(_NAMED_KEY)] = segments[number]
    return ProgramLayout(
        header=Extent(0, header_size),
        named=named,
        constants=tuple(constants),
        delegates=tuple(extent for i, extent in enumerate(segments) if i not in used),
        planned_bytes=sum(sum(plan.integers(_PLAN_BUFFERS)) for plan in plans),
        file_bytes=size,
    )


class _Table(Table):
    """A flatbuffer table, read by the numbers of its fields; absent ones are 0 or nothing."""

    def _offset(self, field: int) -> int:
        return self.Offset(4 + 2 * field)

    def integer(self, field: int, kind: type = number_types.Uint64Flags) -> int:
        return self.GetSlot(4 + 2 * field, 0, kind)

    def table(self, field: int) -> _Table | None:
        offset = self._offset(field)
        return _Table(self.Bytes, self.Indirect(self.Pos + offset)) if offset else None

    def _items(self, field: int) -> tuple[int, int]:
        """How many items a list has, and where the first is."""
        offset = self._offset(field)
        count = self.VectorLen(offset) if offset else 0
        if count > _MOST:
            raise ValueError(f"a list has {count} items")
        return count, self.Vector(offset) if count else 0

    def tables(self, field: int) -> list[_Table]:
        count, first = self._items(field)
        return [_Table(self.Bytes, self.Indirect(first + 4 * i)) for i in range(count)]

    def integers(self, field: int) -> list[int]:
        count, first = self._items(field)
        return list(struct.unpack_from(f"<{count}q", self.Bytes, first)) if count else []

    def text(self, field: int) -> str:
        offset = self._offset(field)
        return self.String(self.Pos + offset).decode("utf-8") if offset else ""
