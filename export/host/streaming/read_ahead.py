"""Holds a budget of memory while stages run: reads their packed weights ahead, drops them after.

The weights are mapped from files (`packed_file`), so that the system may drop them whenever it is
short of memory. Left to itself it drops what was used longest ago, which in a pass over all stages
is what is needed next; so what is to stay and what is to go is decided here, as `residency` says.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TypeVar

from export.host.process import resident_bytes
from export.host.streaming.residency import leanest_residency, plan_residency
from quantize.errors import InputError

MARGIN_BYTES = 16 << 20
"""For what comes and goes while stages run; the budget is held with it."""
_GROWTH_BYTES = 4 << 20
"""More memory of other kinds than at the last plan makes a new one."""
_SCRATCH_BYTES = 1 << 20
_MOST_BUFFERS = 1024
# linux/mman.h; the last since Linux 5.14.
_MADV_NORMAL, _MADV_RANDOM, _MADV_DONTNEED, _MADV_POPULATE_READ = 0, 1, 4, 22

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Region:
    """Whole pages of a file that are mapped at an address; `offset` in the file."""

    path: Path
    offset: int
    bytes: int
    address: int

    def part(self, begin: int, end: int) -> Region | None:
        """The bytes from `begin` to `end` of it, which may lie beyond; None if there are none."""
        begin, end = max(begin, 0), min(end, self.bytes)
        if begin >= end:
            return None
        return Region(self.path, self.offset + begin, end - begin, self.address + begin)


def mapped(path: Path, offset: int, size: int) -> Region | None:
    """Where this process has `size` bytes from `offset` of a file mapped, as whole pages.

    Of a piece's first and last page the neighbours' bytes count too. None if it has not. Raises
    OSError where the system does not tell.
    """
    page = mmap.PAGESIZE
    begin = offset // page * page
    end = -(-(offset + size) // page) * page
    status = path.stat()
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        major, _, minor = fields[3].partition(":")
        device = os.makedev(int(major, 16), int(minor, 16))
        if (device, int(fields[4])) != (status.st_dev, status.st_ino):
            continue
        low, _, high = fields[0].partition("-")
        address, first = int(low, 16), int(fields[2], 16)
        if first <= begin and end - first <= int(high, 16) - address:
            return Region(path, begin, end - begin, address + begin - first)
    return None


@dataclass(frozen=True)
class StageWeights:
    """A stage by its name, and its weights in the order in which it reads them."""

    name: str
    regions: tuple[Region, ...]

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(region.bytes for region in self.regions)

    def part(self, begin: int, end: int | None = None) -> list[Region]:
        """The bytes from `begin` to `end`, counted over all regions."""
        end = self.bytes if end is None else end
        parts, at = [], 0
        for region in self.regions:
            parts.append(region.part(begin - at, end - at))
            at += region.bytes
        return [part for part in parts if part is not None]


@dataclass
class Streamed:
    """What was streamed so far. stages: runs of stages. bytes: read, or found in the page cache.
    stall_ms: time in which a stage that was due waited for its weights."""

    stages: int = 0
    bytes: int = 0
    stall_ms: float = 0.0


class WeightStreamer:
    """Runs stages within `budget_bytes` of resident memory, this process's own included.

    order: the stages of a pass, by number; a pass may end before its last stage. rest: what else is
    mapped of their files, of which no more is read than what is used. What the budget leaves for
    weights is known only when every stage has shown what else takes memory; until then nothing is
    kept. Raises InputError if the budget cannot be held: when this is made, and between passes if
    the process has grown.
    """

    def __init__(
        self,
        stages: Sequence[StageWeights],
        order: Sequence[int],
        budget_bytes: int,
        rest: Sequence[Region] = (),
    ) -> None:
        self.stages = tuple(stages)
        self.budget_bytes = budget_bytes
        self.streamed = Streamed()
        self._sizes = tuple(stage.bytes for stage in stages)
        self._order = tuple(order)
        self._place = -1  # in the order
        self._held: set[int] = set()  # whose streamed part is in memory, or on its way
        self._ready: set[int] = set()  # whose kept part is
        self._pending: tuple[int, Future[None]] | None = None
        regions = [region for stage in stages for region in stage.regions]
        self._pages = _Pages(region.path for region in (*rest, *regions))
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        weakref.finalize(self, self._reader.shutdown, wait=False)
        self._pages.drop((*rest, *regions))  # what loading has touched
        self._pages.advise(rest, _MADV_RANDOM)
        self._pages.advise(regions, _MADV_NORMAL)
        self.residency = leanest_residency(self._sizes, self._order)
        self._not_run = set(order)
        self._is_planned = False
        self._other_mapped = _mapped_bytes()
        self._other = self._measure()
        if self.residency.resident_bytes > self._room():
            raise refusal(budget_bytes, self._other, self.residency.resident_bytes)

    def run(self, stage: int, compute: Callable[[], _Value]) -> _Value:
        """`compute()` with the weights of stage number `stage` in memory."""
        self._enter(stage)
        return compute()

    def _enter(self, stage: int) -> None:
        following = (self._place + 1) % len(self._order)
        if self._order[following] != stage:  # the pass ended early
            following = self._order.index(stage)
        began_s = time.perf_counter()
        if following == 0 and self._place >= 0:
            self._settle()
        self._place = following
        if stage not in self._held:
            self._await()
            self._let_go_of(self._held)
            self._begin(stage)
        self._await()
        self.streamed.stall_ms += 1000 * (time.perf_counter() - began_s)
        if self.residency.ahead:
            ahead = self._order[(self._place + 1) % len(self._order)]
            self._let_go_of(self._held - {stage, ahead})
            if ahead not in self._held:
                self._begin(ahead)
        self._not_run.discard(stage)
        self.streamed.stages += 1

    def _begin(self, stage: int) -> None:
        """Begin to read what is not there of a stage."""
        kept = self.residency.kept[stage]
        parts = self.stages[stage].part(kept if stage in self._ready else 0)
        self._held.add(stage)
        self._ready.add(stage)
        self.streamed.bytes += self._sizes[stage] - kept
        if not parts:
            return
        for part in parts[1:]:
            self._pages.will_need(part)
        in_kernel = Event()
        self._pending = (stage, self._reader.submit(self._pages.read, parts, in_kernel))
        # A program that runs holds Python's global lock: the reader must be beyond it by then.
        in_kernel.wait()

    def _await(self) -> None:
        if self._pending is not None:
            self._pending[1].result()
            self._pending = None

    def _let_go_of(self, stages: Iterable[int]) -> None:
        for stage in sorted(stages):
            self._pages.drop(self.stages[stage].part(self.residency.kept[stage]))
            self._held.discard(stage)

    def _settle(self) -> None:
        """Between passes: plan if that was not done, or memory of other kinds has grown since."""
        self._await()  # what is on its way is measured as there
        other = self._measure()
        if self._not_run or (self._is_planned and other <= self._other + _GROWTH_BYTES):
            return
        self._is_planned = True
        self._other = max(self._other, other)
        residency = plan_residency(self._sizes, self._order, self._room())
        if residency is None:
            least = leanest_residency(self._sizes, self._order).resident_bytes
            raise refusal(self.budget_bytes, self._other, least)
        self.residency = residency
        for stage in self.stages:
            self._pages.drop(stage.regions)
        self._held.clear()
        self._ready.clear()

    def _room(self) -> int:
        return self.budget_bytes - self._other - MARGIN_BYTES

    def _measure(self) -> int:
        """Bytes of this process that are not the stages' weights."""
        kept = self.residency.kept
        weights = sum(kept[stage] for stage in self._ready)
        weights += sum(self._sizes[stage] - kept[stage] for stage in self._held)
        return resident_bytes("RssAnon") + max(self._other_mapped, _mapped_bytes() - weights)


def _mapped_bytes() -> int:
    """Resident of files, those of file systems in memory too."""
    return resident_bytes("RssFile") + resident_bytes("RssShmem")


def refusal(budget_bytes: int, other_bytes: int, weights_bytes: int) -> InputError:
    """Why a budget cannot be held, with the numbers."""
    needed = other_bytes + weights_bytes + MARGIN_BYTES
    return InputError(
        f"a memory budget of {budget_bytes} bytes is too small: the program and its buffers take "
        f"{other_bytes}, the largest stage's weights {weights_bytes}, and {MARGIN_BYTES} stay "
        f"free; give at least {needed}"
    )


class _Pages:
    """Reads and drops the pages of some files, in this process's mappings and in the page cache."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._descriptors = {p: os.open(p, os.O_RDONLY | os.O_CLOEXEC) for p in set(paths)}
        weakref.finalize(self, _close_all, tuple(self._descriptors.values()))
        self._madvise = ctypes.CDLL(None, use_errno=True).madvise
        self._madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._scratch: bytearray | None = None  # where the system cannot populate a mapping

    def will_need(self, region: Region) -> None:
        """Let the system begin to read it."""
        os.posix_fadvise(
            self._descriptors[region.path], region.offset, region.bytes, os.POSIX_FADV_WILLNEED
        )

    def read(self, regions: Sequence[Region], in_kernel: Event) -> None:
        """Read all of them; `in_kernel` is set just before the system is called."""
        for region in regions:
            in_kernel.set()
            if self._scratch is None:
                # One call, during which others can have Python's global lock.
                failed = self._madvise(region.address, region.bytes, _MADV_POPULATE_READ)
                if not failed or ctypes.get_errno() != errno.EINVAL:
                    continue  # what could not be read now is read when it is used
                self._scratch = bytearray(_SCRATCH_BYTES)
            self._read_through(region, self._scratch)

    def _read_through(self, region: Region, scratch: bytearray) -> None:
        """Read into the page cache by reading over and over into one small buffer."""
        descriptor, offset = self._descriptors[region.path], region.offset
        while (left := region.offset + region.bytes - offset) > 0:
            count = min(-(-left // _SCRATCH_BYTES), _MOST_BUFFERS)
            done = os.preadv(descriptor, [scratch] * count, offset)
            if done <= 0:
                return
            offset += done

    def drop(self, regions: Iterable[Region]) -> None:
        """Unmap their pages and have the page cache forget them, if no other process maps them."""
        for region in regions:
            self._madvise(region.address, region.bytes, _MADV_DONTNEED)
            os.posix_fadvise(
                self._descriptors[region.path], region.offset, region.bytes, os.POSIX_FADV_DONTNEED
            )

    def advise(self, regions: Iterable[Region], advice: int) -> None:
        """Tell the system how they will be used."""
        for region in regions:
            self._madvise(region.address, region.bytes, advice)


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
