"""Files that a verb writes beside what it prints."""

from __future__ import annotations

from pathlib import Path

from quantize.errors import OutputError
from quantize.files.durable import replacing
from scripts.console import say


def check_target(target: Path | None, overwrite: bool) -> None:
    """Refuse in the first second a file that could not be written in the end.

    Raises OutputError.
    """
    if target is None:
        return
    if target.exists() and not overwrite:
        raise OutputError(f"{target} is there already; give another name, or --overwrite")
    if not target.absolute().parent.is_dir():
        raise OutputError(f"{target.parent} is not a folder; make it, or give another name")


def write_report(target: Path, content: str | bytes) -> None:
    """Write the whole file or nothing, and say so on stderr. Raises OSError."""
    with replacing(target.absolute()) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
    say(f"wrote {target}", on_stderr=True)
