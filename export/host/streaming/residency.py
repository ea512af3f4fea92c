"""Which part of each stage's weights stays in memory, and which is read from flash in each pass.

Arithmetic alone: it is given sizes, the order in which a pass runs the stages, and the room there
is. Who reads and drops the weights is `streaming`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GRANULE = 2 << 20
"""A stage's kept part is a multiple of it, or all: as large as the pages of a file's cache get."""
_SHARE_STEP = 1e-4


@dataclass(frozen=True)
class Residency:
    """A division of the stages' weights; all by stage, in bytes.

    sizes: all weights. kept: stays in memory once it was read; the rest is streamed. ahead: the
    streamed part of a stage is read while the stage before it computes, so that two are held at a
    time; else it is read when its turn comes.
    """

    sizes: tuple[int, ...]
    kept: tuple[int, ...]
    ahead: bool
    window_bytes: int
    streamed_bytes: int

    @property
    def resident_bytes(self) -> int:
        """At most in memory: what is kept, and the streamed parts that are held at a time."""
        return sum(self.kept) + self.window_bytes


def plan_residency(sizes: Sequence[int], order: Sequence[int], room_bytes: int) -> Residency | None:
    """The division that reads least in a pass and holds no more than `room_bytes`.

    sizes: weights of each stage in bytes. order: the stages in the order in which a pass runs them;
    passes follow each other. None if not even one stage after the other has room.

    What a pass reads often is kept first. Of stages that are read equally often each keeps the same
    share, so that reading and computing alternate evenly.
    """
    nothing = [0] * len(sizes)
    for ahead in (True, False):
        if _divided(sizes, nothing, order, ahead).resident_bytes > room_bytes:
            continue
        kept = nothing
        loads = _loads(order, ahead, len(sizes))
        for count in sorted(set(loads), reverse=True):
            group = [stage for stage, times in enumerate(loads) if times == count]

            kept = _keep_of_group(sizes, kept, order, ahead, group, room_bytes)
        return _divided(sizes, kept, order, ahead)
    return None


def _keep_of_group(
    sizes: Sequence[int],
    kept: Sequence[int],
    order: Sequence[int],
    ahead: bool,
    group: Sequence[int],
    room_bytes: int,
) -> list[int]:
    """`kept` with the largest share of the group's weights that has room besides."""

    def keeping(share: float) -> list[int]:
        return [_part(s, share) if i in group else kept[i] for i, s in enumerate(sizes)]

    def fits(share: float) -> bool:
        return _divided(sizes, keeping(share), order, ahead).resident_bytes <= room_bytes

    if fits(1.0):
        return keeping(1.0)
    low, high = 0.0, 1.0
    while high - low > _SHARE_STEP:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return keeping(low)


def leanest_residency(sizes: Sequence[int], order: Sequence[int]) -> Residency:
    """The division that holds least: one stage at a time."""
    return _divided(sizes, [0] * len(sizes), order, ahead=False)


def _part(size: int, share: float) -> int:
    return size if share >= 1.0 else int(size * share) // GRANULE * GRANULE


def _divided(
    sizes: Sequence[int], kept: Sequence[int], order: Sequence[int], ahead: bool
) -> Residency:
    streamed = [size - part for size, part in zip(sizes, kept, strict=True)]
    window = 0
    for i, stage in enumerate(order):
        held = {stage, order[(i + 1) % len(order)]} if ahead else {stage}
        window = max(window, sum(streamed[other] for other in held))
    loads = _loads(order, ahead, len(sizes))
    read = sum(count * size for count, size in zip(loads, streamed, strict=True))
    return Residency(tuple(sizes), tuple(kept), ahead, window, read)


def _loads(order: Sequence[int], ahead: bool, stages: int) -> list[int]:
    """How often a pass reads each stage's streamed part: whenever it is not held already."""
    loads = [0] * stages
    for i, stage in enumerate(order):
        before = order[i - 1]
        held = {order[i - 2], before} if ahead else {before}
        if stage not in held:
            loads[stage] += 1
    return loads
