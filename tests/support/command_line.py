"""The real command line in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command(*arguments: object) -> list[str]:
    return [str(argument) for argument in arguments]


def start(*arguments: object) -> subprocess.Popen[str]:
    """The real program in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.pocketdiff", *command(*arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore Ctrl-C, which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
