"""Processes of this machine."""

from __future__ import annotations

from pathlib import Path


def start_ticks(pid: int) -> int | None:
    """When the process `pid` began, in clock ticks since the boot; None if it is dead or there is
    none. With its number it identifies a process: numbers are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
