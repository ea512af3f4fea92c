"""What ends a run has one of the protocol's names."""

from __future__ import annotations

import pytest

from export.host.runner.failures import describe


@pytest.mark.parametrize(
    ("error", "limit_bytes", "reason"),
    [
        (MemoryError("std::bad_alloc"), None, "out_of_memory"),
        (OSError(12, "Cannot allocate memory"), None, "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), None, "out_of_memory"),
        (RuntimeError("method->execute() failed with error 0x1"), 1, "out_of_memory"),
        (RuntimeError("method->execute() failed with error 0x1"), 1 << 62, "internal"),
        (RuntimeError("method->execute() failed with error 0x1"), None, "internal"),
        (OSError(28, "No space left on device", "/x/events.jsonl"), None, "storage_full"),
        (PermissionError(13, "Permission denied"), None, "internal"),
        (ValueError("line one\nline two\x1b[31m"), None, "internal"),
    ],
)
def test_names_what_ended_a_run(error: Exception, limit_bytes: int | None, reason: str) -> None:
    failure = describe(error, limit_bytes)
    assert failure["reason"] == reason
    assert failure["sentence"].isprintable()
