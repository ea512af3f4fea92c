"""A sample of a process's memory follows what it allocates."""

from __future__ import annotations

import subprocess
import sys

from export.host import memory_sampler


def test_a_sample_of_a_process_that_is_gone_is_empty() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert set(memory_sampler.sample(process.pid).values()) == {None}


def test_a_sample_follows_what_is_allocated() -> None:
    # In a process of its own: here, freed memory of earlier tests would be used again.
    script = """
import mmap
from export.host import memory_sampler
before = memory_sampler.sample()["anonymous_bytes"]
held = mmap.mmap(-1, 32 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
held.write(b"x" * len(held))
print(memory_sampler.sample()["anonymous_bytes"] - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert 30 * 2**20 <= int(result.stdout) <= 80 * 2**20
