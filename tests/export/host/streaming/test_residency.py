"""What of a model's weights stays in memory within a room, against a simulation of passes."""

from __future__ import annotations

import random

import pytest

from export.host.streaming.residency import GRANULE, leanest_residency, plan_residency

ORDERS = {
    "stages once each": (0, 1, 2, 3),
    "two that take turns": (0, 1, 1, 2, 1, 1, 2, 3),
    "two stages": (0, 1),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_division_holds_no_more_than_its_room_and_reads_what_it_says(
    order: tuple[int, ...],
) -> None:
    """Against a simulation of passes that knows only: hold what runs and what runs next."""
    random_ = random.Random(0)
    for _ in range(50):
        sizes = [random_.randrange(1, 400) * GRANULE // 3 for _ in range(max(order) + 1)]
        room = random_.randrange(max(sizes) // 2, 2 * sum(sizes))
        residency = plan_residency(sizes, order, room)
        if residency is None:
            assert leanest_residency(sizes, order).resident_bytes > room
            continue
        streamed = [size - kept for size, kept in zip(sizes, residency.kept, strict=True)]
        held: set[int] = set()
        read = most = 0
        for i in range(3 * len(order)):
            stage, following = order[i % len(order)], order[(i + 1) % len(order)]
            wanted = {stage, following} if residency.ahead else {stage}
            if i >= 2 * len(order):  # the third pass, as all that follow
                read += sum(streamed[new] for new in wanted - held)
            held = wanted
            most = max(most, sum(residency.kept) + sum(streamed[s] for s in held))
        assert most <= room and most == residency.resident_bytes
        assert read == residency.streamed_bytes
        assert all(0 <= kept <= size for kept, size in zip(residency.kept, sizes, strict=True))


def test_more_room_never_reads_more() -> None:
    sizes, order = [300 * GRANULE] * 4 + [100 * GRANULE], (0, 1, 2, 3, 4)
    found = [plan_residency(sizes, order, room * GRANULE) for room in range(299, 1400, 50)]
    assert found[0] is None and found[-1].streamed_bytes == 0
    assert found[-1].kept == tuple(sizes)
    for ahead in (False, True):
        read = [r.streamed_bytes for r in found[1:] if r.ahead is ahead]
        assert len(read) > 1 and read == sorted(read, reverse=True)


def test_what_is_read_most_often_is_kept_first() -> None:
    """Without room to read ahead, stage 1 is read four times a pass, 2 twice, the others once."""
    sizes = [100 * GRANULE] * 4
    residency = plan_residency(sizes, (0, 1, 2, 1, 2, 1, 3, 1), 190 * GRANULE)
    assert not residency.ahead
    assert residency.kept[1] > 0 and residency.kept[0] == residency.kept[3] == 0
