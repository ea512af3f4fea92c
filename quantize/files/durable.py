"""Files that reach the disk whole: written beside their name, flushed, renamed; and hashed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

CHUNK_BYTES = 1 << 20


def sync(path: Path) -> None:
    """Have the system write a file or a folder to the disk; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that becomes `path` when the block ends, or not at all.

    It is written as a hidden file beside `path` and is on the disk before it is renamed; an
    exception in the block removes it and leaves `path` as it was. Raises OSError.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all.

    Raises ValueError for a number that is not finite, OSError.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with replacing(path) as file:
        file.write(text.encode("utf-8") + b"\n")


def sha256_of(
    source: Path | IO[bytes],
    *,
    size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Lower-case hexadecimal SHA-256 of a file, or of an open one from where it stands.

    size: bytes to read at most; None: all that follow. progress: called with the bytes read so far.
    Raises OSError.
    """
    if isinstance(source, Path):
        with source.open("rb") as file:
            return sha256_of(file, size=size, progress=progress)
    digest = hashlib.sha256()
    done = 0
    while piece := source.read(CHUNK_BYTES if size is None else min(CHUNK_BYTES, size - done)):
        digest.update(piece)
        done += len(piece)
        if progress is not None:
            progress(done)
    return digest.hexdigest()
