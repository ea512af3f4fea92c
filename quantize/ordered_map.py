"""Work on a sequence of items by several threads, its results in the order of the items."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    size: Callable[[Item], int],
    size_in_all: int,
) -> Generator[tuple[Item, Result], None, None]:
    """Yields each item with `work(item)`, of which threads do the next ones meanwhile.

    There is a thread for each processor, in which torch's operators use no further ones: whole
    items side by side leave no processor waiting between two operators, and no sum depends on how
    many processors there are. At a time no more than two items for each thread are in work or
    waiting, and no more than `size_in_all` together, or a single larger one. Close the iterator
    (`contextlib.closing`) to have the threads end. Raises what `work` raises, at its item.
    """
    before = torch.get_num_threads()
    count = _processors()
    executor = ThreadPoolExecutor(count, initializer=lambda: torch.set_num_threads(1))
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    waiting_size = 0
    try:
        for item in items:
            while waiting and (
                len(waiting) >= 2 * count or waiting_size + size(item) > size_in_all
            ):
                first, future = waiting.popleft()
                waiting_size -= size(first)
                yield first, future.result()
            waiting.append((item, executor.submit(work, item)))
            waiting_size += size(item)
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
