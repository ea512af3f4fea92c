"""A folder that appears under its final name whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from quantize.errors import OutputError, UserError
from quantize.files.durable import sync
from quantize.files.journal import Journal

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# What the hidden folder beside the destination holds: the folder that is to appear, in
# resumable work its journal, and for an instant the earlier result that is being replaced.
_CONTENT, _JOURNAL, _REPLACED = "content", "journal.jsonl", "replaced"


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
    holder: Path | None = None
    try:
        parent = destination.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=parent))
        content = _make_content(holder)
        yield content
        _finish(holder, destination, overwrite, is_ours)
    except OSError as error:
        raise OutputError(_sentence(destination, error)) from error
    finally:
        if holder is not None:
            shutil.rmtree(holder, ignore_errors=True)


@contextmanager
def resumable_folder(
    destination: str | Path,
    work: str,
    *,
    overwrite: bool = False,
    is_ours: Callable[[Path], bool] = lambda folder: False,
    irreplaceable: bool = False,
) -> Iterator[tuple[Path, Journal]]:
    """An `atomic_folder` of which a later call finds what an interrupted one had done.

    Yields the temporary folder and its journal, whose `records` say what in the folder is done;
    the block appends to it what it has written and flushed. Both are kept if the process is
    killed, and for whatever leaves the block but a UserError or an OSError: a wrong input and a
    full disk would stop the next call too. A next call with another text `work` (which therefore
    names everything that the result depends on) begins anew. What is `irreplaceable`, since its
    source may be gone, is kept whatever leaves the block, and other work is refused beside it.
    Raises OutputError as `atomic_folder` does, for that, and while another process is at work on
    the same destination.
    """
    destination = Path(destination)
    holder = _resumable_holder(destination)
    if not holder.exists():
        _refuse_occupied(destination, overwrite, is_ours)
    journal: Journal | None = None
    keep = False
    try:
        holder.parent.mkdir(parents=True, exist_ok=True)
        holder.mkdir(exist_ok=True)
        journal = _open_journal(holder, work, destination)
        replaced = holder / _REPLACED
        if replaced.exists() and not os.path.lexists(destination):
            os.rename(replaced, destination)
        try:
            _refuse_occupied(destination, overwrite, is_ours)
        except OutputError:
            keep = (holder / _CONTENT).exists()
            raise
        if irreplaceable and journal.is_new and (holder / _CONTENT).is_dir():
            keep = True
            raise OutputError(
                f"{holder} holds unfinished work of another recipe, source or version; finish it "
                "with these, or delete that folder to begin anew."
            )
        shutil.rmtree(replaced, ignore_errors=True)
        if journal.is_new or not (holder / _CONTENT).is_dir():
            shutil.rmtree(holder / _CONTENT, ignore_errors=True)
            journal.begin()
            journal.records = []
            _make_content(holder)
            sync(holder)
        keep = irreplaceable
        yield holder / _CONTENT, journal
        # All is done: what goes wrong now, such as a folder that has meanwhile appeared under
        # the final name, can be put right.
        keep = True
        _finish(holder, destination, overwrite, is_ours)
        keep = False
    except OSError as error:
        raise OutputError(_sentence(destination, error)) from error
    except UserError:
        raise
    except BaseException:
        keep = True
        raise
    finally:
        if journal is not None:
            if not keep:
                _remove(holder)
            journal.close()


def unfinished_work(destination: str | Path) -> bool:
    """Whether a `resumable_folder` of this destination was interrupted."""
    return (_resumable_holder(Path(destination)) / _CONTENT).is_dir()


def _resumable_holder(destination: Path) -> Path:
    return destination.absolute().parent / f".{destination.absolute().name}.partial"


def _open_journal(holder: Path, work: str, destination: Path) -> Journal:
    try:
        return Journal(holder / _JOURNAL, work)
    except BlockingIOError:
        raise OutputError(
            f"Another process is writing {destination}; wait for it or choose another destination."
        ) from None


def _make_content(holder: Path) -> Path:
    content = holder / _CONTENT
    content.mkdir()
    content.chmod(0o755)
    return content


def _finish(
    holder: Path, destination: Path, overwrite: bool, is_ours: Callable[[Path], bool]
) -> None:
    content = holder / _CONTENT
    for path in sorted(content.rglob("*")):
        sync(path)
    sync(content)
    # Once more: the work may have taken hours.
    _refuse_occupied(destination, overwrite, is_ours)
    _move_into_place(content, destination, holder / _REPLACED)
    sync(holder.parent)


def _remove(holder: Path) -> None:
    """Only what is ours in it: its name is not as unlikely to be another's as a random one is."""
    for name in (_CONTENT, _REPLACED):
        shutil.rmtree(holder / name, ignore_errors=True)
    (holder / _JOURNAL).unlink(missing_ok=True)
    if not any(holder.iterdir()):
        holder.rmdir()


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


def _move_into_place(content: Path, destination: Path, replaced: Path) -> None:
    if not destination.exists() or not any(destination.iterdir()):
        os.rename(content, destination)
        return
    os.rename(destination, replaced)
    try:
        os.rename(content, destination)
    except BaseException:
        os.rename(replaced, destination)
        raise


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
