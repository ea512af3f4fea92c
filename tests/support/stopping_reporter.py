"""A Reporter that prints nothing, and interrupts the work that it is told of."""

from __future__ import annotations

import io

from rich.console import Console

from scripts.console import Reporter


class StoppingReporter(Reporter):
    """Raises `error` when so much is done; never without one."""

    def __init__(
        self, stop_after: int | None = None, error: type[BaseException] = KeyboardInterrupt
    ) -> None:
        super().__init__("quiet", Console(file=io.StringIO()))
        self._stop_after = stop_after
        self._error = error

    def __call__(self, done: int, total: int, what: str) -> None:
        if done == self._stop_after:
            raise self._error
