"""A folder that appears under its final name whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from quantize.errors import OutputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def atomic_folder(
    destination: str | Path,
    *,
    overwrite: bool = False,
    is_ours: Callable[[Path], bool] = lambda folder: False,
) -> Iterator[Path]:
    """Yields a temporary folder beside `destination`, and renames it when the block succeeds.

    If the block fails, or is interrupted, the temporary folder is removed. An existing, non-empty
    destination is replaced only with `overwrite`, and only if `is_ours` knows it as a folder that
    this program wrote. Raises OutputError for that, for a full disk, and for any other OSError.
    """
    destination = Path(destination)
    _refuse_occupied(destination, overwrite, is_ours)
    temporary: Path | None = None
    try:
        parent = destination.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=parent))
        temporary.chmod(0o755)
        yield temporary
        for path in sorted(temporary.rglob("*")):
            _sync(path)
        _sync(temporary)
        # Once more: the work may have taken hours.
        _refuse_occupied(destination, overwrite, is_ours)
        _move_into_place(temporary, destination)
        _sync(parent)
    except OSError as error:
        raise OutputError(_sentence(destination, error)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _refuse_occupied(destination: Path, overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    if not os.path.lexists(destination):
        return
    if destination.is_symlink() or not destination.is_dir():
        raise OutputError(f"{destination} exists and is no folder; choose another destination.")
    if not any(destination.iterdir()):
        return
    if not overwrite:
        raise OutputError(
            f"{destination} exists already; choose another destination or ask to overwrite it."
        )
    if not is_ours(destination):
        raise OutputError(
            f"{destination} holds files that this program did not write, so it is not "
            "overwritten; choose another destination."
        )


def _move_into_place(temporary: Path, destination: Path) -> None:
    if not destination.exists() or not any(destination.iterdir()):
        os.rename(temporary, destination)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.old-", dir=temporary.parent))
    os.rename(destination, old)
    try:
        os.rename(temporary, destination)
    except BaseException:
        os.rename(old, destination)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sentence(destination: Path, error: OSError) -> str:
    if error.errno in _FULL:
        return (
            f"{destination} does not fit on the disk ({error.strerror}); "
            "free some space or choose another destination."
        )
    where = f", {error.filename}" if error.filename else ""
    return (
        f"{destination} cannot be written ({error.strerror or error}{where}); "
        "check the permissions or choose another destination."
    )
