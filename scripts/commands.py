"""How every command of the project ends: exit codes, one sentence for a fault, signals.

Exit codes: 0 done, 2 something the user can put right, 130 interrupted, 1 a fault of the program.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from quantize.errors import UserError
from scripts.console import err_console, say

_signal_code: int | None = None
"""Exit code of the signal that ended the program, if one did."""


def end_on_signals() -> None:
    """Have SIGINT and SIGTERM end the program through the stack, so that it can clean up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # of a shell's background job
            signal.signal(number, _end)


def _end(signal_number: int, frame: object) -> None:
    global _signal_code
    _signal_code = 128 + signal_number
    raise SystemExit(_signal_code)


def run_command(command: Callable[[], object], name: str) -> int:
    """Run a typer command; returns the exit code.

    What a user can cause, a full disk included, becomes a sentence on stderr that begins with
    `name`.
    """
    try:
        command()
    except SystemExit as end:  # how typer returns
        return end.code if isinstance(end.code, int) else 1
    except (UserError, OSError) as error:
        if _signal_code is not None:  # a library made another error of the signal's
            return _signal_code
        sentence = str(error) if isinstance(error, UserError) else _os_sentence(error)
    else:
        return 0
    err_console().print(f"{name}: {sentence}", style="red", markup=False, soft_wrap=True)
    return 2


def _os_sentence(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{where}no space left on the disk; free some space or choose another destination"
    reason = os.strerror(error.errno) if error.errno else str(error)
    return f"{where}{reason}; check the path and its permissions"


@contextmanager
def resumable(destination: Path) -> Iterator[None]:
    """Print after an interruption that the same command goes on with the work that is kept."""
    from quantize.files.atomic_folder import unfinished_work

    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if unfinished_work(destination):
            say(
                f"What is done of {destination} is kept; the same command goes on from there.",
                on_stderr=True,
            )
        raise
