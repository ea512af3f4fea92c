"""The command line `pocketdiff`: its verbs, and what a fault looks like.

A result for programs (`--json`) is one compact JSON document on the last line of stdout; progress
and errors go to stderr. Exit codes: 0 done, 2 something the user can put right (one sentence says
what), 130 interrupted, 1 a fault of the program.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import warnings

import typer

from quantize.errors import UserError
from scripts.console import err_console
from scripts.verbs import device_verbs, model_verbs, plan_verb

VERBS = (
    plan_verb.plan,
    model_verbs.quantize,
    model_verbs.export,
    model_verbs.inspect,
    model_verbs.generate,
    model_verbs.evaluate,
    device_verbs.devices,
    device_verbs.push,
    device_verbs.bench,
    device_verbs.report,
    device_verbs.compare,
    device_verbs.clean,
)

app = typer.Typer(
    help="Text-diffusion language models on phones: quantize, lower, run, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for verb in VERBS:
    app.command()(verb)


_exit_code: int | None = None
"""Of the signal that ended the program, if one did."""


def main() -> None:
    """The entry point."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # of a shell's background job
            signal.signal(number, _end)
    # Libraries tell of kernels that are for other processors, and of their own renamings.
    for library in ("torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a verb; what a user can cause becomes a sentence on stderr. Returns the exit code."""
    try:
        app(arguments, prog_name="pocketdiff")
    except SystemExit as end:  # how typer returns
        return end.code if isinstance(end.code, int) else 1
    except (UserError, OSError) as error:
        if _exit_code is not None:  # a library made another error of the signal's
            return _exit_code
        sentence = str(error) if isinstance(error, UserError) else _os_sentence(error)
    else:
        return 0
    err_console().print(f"pocketdiff: {sentence}", style="red", markup=False, soft_wrap=True)
    return 2


def _end(signal_number: int, frame: object) -> None:
    # Through the stack, so that temporary folders are removed.
    global _exit_code
    _exit_code = 128 + signal_number
    raise SystemExit(_exit_code)


def _os_sentence(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{where}no space left on the disk; free some space or choose another destination"
    reason = os.strerror(error.errno) if error.errno else str(error)
    return f"{where}{reason}; check the path and its permissions"


if __name__ == "__main__":
    main()
