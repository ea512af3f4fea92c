"""The command line in a process of its own: started anew, or forked without a wait for PyTorch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from scripts.pocketdiff import main


def command(*arguments: object) -> list[str]:
    """Arguments as a shell would hand them over."""
    return [str(argument) for argument in arguments]


def start(*arguments: object) -> subprocess.Popen[str]:
    """The real program in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.pocketdiff", *command(*arguments)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore Ctrl-C, which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


class ForkedCommand:
    """`pocketdiff` as it is started by a shell, in a fork of this process.

    `folder` is where its output is kept.
    """

    def __init__(self, folder: Path, *arguments: object) -> None:
        self._files = (folder / "stdout", folder / "stderr")
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._run(command("pocketdiff", *arguments))

    def _run(self, words: list[str]) -> None:
        code = 1
        try:
            for number, path in enumerate(self._files, start=1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
            sys.argv = words
            # A shell that runs the tests in the background has them ignore Ctrl-C.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return None if self._status is None else os.waitstatus_to_exitcode(self._status)

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def output(self) -> tuple[str, str]:
        """Stdout and stderr so far."""
        out, err = (path.read_text() if path.exists() else "" for path in self._files)
        return out, err
