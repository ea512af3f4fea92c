"""The results file: one JSON line per run on a device, appended and never rewritten.

What a record's metrics mean and how records are compared is not known here. The format is
`device_tests.results.record_format`'s.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

from device_tests.results.record_format import (
    FORMAT,
    PASSES,
    REASONS,
    FailedRun,
    OkRun,
    Pass,
    Reason,
    RecordError,
)
from export.contract.validation import VERSION
from quantize.errors import OutputError
from quantize.files.json_lines import append_bytes, open_for_append, parse_line

MAXIMUM_LINE_BYTES = 256 * 2**20

SCHEMA_VERSION = VERSION
Record = dict[str, Any]

__all__ = [
    "PASSES", "REASONS", "Pass", "Reason", "Record", "RecordError", "append", "check", "prepare",
    "read",
]  # fmt: skip

_BEGINNING = b'{"schema_version"'
_log = logging.getLogger(__name__)


def prepare(path: str | os.PathLike[str]) -> None:
    """Make the file, empty, if it is not there; better known before a run than after it.

    Raises OutputError if it cannot be written.
    """
    try:
        with Path(path).open("ab"):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def append(path: str | os.PathLike[str], record: Record) -> None:
    """Write `record` as the last line of `path` in one write, and have it on the disk on return.

    The file is made if it is not there. A last line that a killed process left unfinished is cut
    off first, with a warning. Raises RecordError if the record breaks the schema, OutputError if
    the file cannot be written.
    """
    check(record, "the record to be written")
    record = {"schema_version": record["schema_version"]} | record  # a line begins with it
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    if len(line) > MAXIMUM_LINE_BYTES:
        raise RecordError(
            f"the record of run {record['run_id']} has {len(line)} bytes, at most "
            f"{MAXIMUM_LINE_BYTES} are allowed; sample memory less often"
        )
    path = Path(path)
    try:
        descriptor = open_for_append(path)
        try:
            append_bytes(descriptor, _close_last_line(descriptor, path) + line)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(
                f"{path} has no room for another record; free space and resume"
            ) from error
        raise _unwritable(path, error) from error


def read(path: str | os.PathLike[str]) -> list[Record]:
    """Read and check every record of `path`, in the order in which they were written.

    A last line that a killed process left unfinished is left out, with a warning. Raises
    RecordError, naming the line, for anything else that is not a record.
    """
    path = Path(path)
    found: list[Record] = []
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAXIMUM_LINE_BYTES + 1):
                number += 1
                if len(line) > MAXIMUM_LINE_BYTES:
                    raise RecordError(
                        f"{path} line {number} is longer than {MAXIMUM_LINE_BYTES} bytes; "
                        "give a results file of `pocketdiff bench`"
                    )
                record = parse_line(line)
                if record is None and not line.endswith(b"\n"):
                    _log.warning(
                        "%s: line %d is unfinished (the bench was killed); left out", path, number
                    )
                    break
                where = f"{path} line {number}"
                if record is None:
                    raise RecordError(f"{where} is not a JSON object; remove the line")
                check(record, where)
                found.append(record)
    except OSError as error:
        raise RecordError(
            f"{path} cannot be read ({error.strerror}); give a results file of `pocketdiff bench`"
        ) from error
    return found


def check(record: Record, where: str) -> None:
    """Raise RecordError, naming the field, if `record` breaks the format."""
    FORMAT.check_version(record, where, "program")
    FORMAT.check(record, OkRun | FailedRun, where)


def _unwritable(path: str | os.PathLike[str], error: OSError) -> OutputError:
    return OutputError(
        f"{path} cannot be written ({error.strerror}); free space or give another file"
    )


def _close_last_line(descriptor: int, path: Path) -> bytes:
    """Bring the file to the end of a line: cut an unfinished one, or return the missing newline."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return b""
    start = max(0, size - MAXIMUM_LINE_BYTES)
    tail = os.pread(descriptor, size - start, start)
    if b"\n" not in tail and start > 0:
        raise RecordError(f"{path} is no results file; give another one")
    last = tail[tail.rfind(b"\n") + 1 :]
    if parse_line(last) is not None:
        return b"\n"
    if not last.startswith(_BEGINNING[: len(last)]):  # never cut into another program's file
        raise RecordError(f"{path} is no results file; give another one")
    os.ftruncate(descriptor, size - len(last))
    _log.warning("%s: the last line was unfinished (a bench was killed); removed", path)
    return b""
