"""Work in a child of this process, to be interrupted or killed: it need not import torch anew."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

DEADLINE_S = 300


@contextmanager
def forked(work: Callable[[], int], stderr: Path) -> Iterator[BaseProcess]:
    """A child that exits with what `work` returns and writes its stderr to a file; killed after."""

    def child() -> None:
        # A shell that runs the tests in the background has them ignore Ctrl-C, which is inherited.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stderr = stderr.open("w")
        os.dup2(sys.stderr.fileno(), 2)
        sys.exit(work())

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_for(process: BaseProcess, happened: Callable[[], object]) -> None:
    """Return when something has happened; fail if the child ends before, or takes minutes."""
    deadline = time.monotonic() + DEADLINE_S
    while not happened():
        assert process.exitcode is None, f"the child ended with {process.exitcode}"
        assert time.monotonic() < deadline
        time.sleep(0.01)
