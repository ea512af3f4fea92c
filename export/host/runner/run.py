"""A run from its first event to its exit code, whatever ends it; the work itself is `work`."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from export.contract.runner_protocol import (
    EVENTS_FILE,
    EXIT_FAILED,
    EXIT_OK,
    RESULT_FILE,
    RunnerProtocolError,
)
from export.host.runner import files
from export.host.runner.failures import describe
from export.host.runner.machine import THERMAL_FOLDER, process_began_s
from export.host.runner.work import Work, empty_result


def run(request_file: Path, thermal_folder: Path = THERMAL_FOLDER) -> int:
    """Do what the request says in this process; returns the exit code.

    A memory limit of the request stays in force afterwards.
    """
    folder = request_file.parent
    try:
        if (folder / RESULT_FILE).exists():
            raise FileExistsError(errno.EEXIST, "holds a run already")
        events = files.EventsFile(folder / EVENTS_FILE, process_began_s())
    except OSError as error:
        what = "holds a run already" if isinstance(error, FileExistsError) else error.strerror
        _say(f"{folder}: {what}; give each run a folder of its own that can be written")
        return EXIT_FAILED
    work = Work(events, thermal_folder)
    failure = None
    with _handling_signals(work.cancel):
        try:
            files.reserve_result(folder)
            work.run(request_file)
        except Exception as error:
            failure = describe(error, work.limit_bytes)
        try:
            work.end()
            failure = _write_result(work, folder, failure)
        except Exception as error:  # not even a small result can be written
            failure = failure or describe(error, work.limit_bytes)
    try:
        if failure is None:
            events("done")
        else:
            _say(f"{failure['reason']}: {failure['sentence']}")
            events("failed", **failure)
    except OSError as error:
        _say(f"{events.path} cannot be written ({error.strerror})")
    finally:
        events.close()
    return EXIT_OK if failure is None else EXIT_FAILED


def _write_result(
    work: Work, folder: Path, failure: dict[str, str] | None
) -> dict[str, str] | None:
    """Write the result, a small one if there is no room; returns how the run ended after all.

    Raises OSError if nothing can be written.
    """
    try:
        work.events.sync()
        status = "ok" if failure is None else "failed"
        files.write_result(folder, work.result | {"status": status, "failure": failure})
    except (OSError, RunnerProtocolError) as error:
        failure = failure or describe(error, work.limit_bytes)
        kept = {name: work.result[name] for name in ("run_id", "versions")}
        files.write_result(folder, empty_result() | kept | {"failure": failure})
    return failure


@contextmanager
def _handling_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    before = {n: signal.signal(n, handler) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _say(text: str) -> None:
    sys.stderr.write(f"runner: {text}\n")
