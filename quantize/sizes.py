"""Numbers of bytes as people read and write them: `1.5 MiB`, `512M`."""

from __future__ import annotations

import re

from quantize.errors import InputError


def format_bytes(count: int | float) -> str:
    """Bytes with a unit: `1.5 MiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def parse_bytes(text: str) -> int:
    """The number of bytes that `512M`, `1.5GiB` or `2000000` means; units are powers of 1024.

    Raises InputError for anything else.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*(?:([KMGT])(?:i?B)?|B)?", text.strip(), re.I)
    if found is None:
        raise InputError(f"{text!r} is no number of bytes; give one such as 512M, 2G or 1500000000")
    return round(float(found[1]) * 1024 ** (" KMGT".index((found[2] or " ").upper())))
