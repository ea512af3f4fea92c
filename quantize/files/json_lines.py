"""Lines of JSON objects at the end of a file: appended whole, on the disk, or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any


def open_for_append(path: Path) -> int:
    """A descriptor of the file, which is made if there is none; raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


def append_bytes(descriptor: int, data: bytes) -> None:
    """Append `data` in one write; it is on the disk when this returns.

    Raises OSError, and on a full disk leaves the file as it was.
    """
    start = os.fstat(descriptor).st_size
    if os.write(descriptor, data) != len(data):
        os.ftruncate(descriptor, start)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(descriptor)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, None for anything else, such as what a killed process left."""
    try:
        document = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number in JSON")
