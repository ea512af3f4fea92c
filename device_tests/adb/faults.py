"""What a device's own words mean: a line of them for a message, and whether its storage is full."""

from __future__ import annotations

MAXIMUM_QUOTED_CHARACTERS = 200
"""What a message quotes of a device's answer or of a command, at most."""

_STORAGE_FULL = ("no space left on device", "quota exceeded")


def says_storage_full(text: str) -> bool:
    """Whether a device's message means that there is no room (or no quota) left."""
    folded = text.lower()
    return any(sign in folded for sign in _STORAGE_FULL)


def excerpt(text: str) -> str:
    """One printable line of what a device said, or of a command, shortened in the middle."""
    line = " ".join(text.split())
    line = "".join(character if character.isprintable() else "\ufffd" for character in line)
    if len(line) <= MAXIMUM_QUOTED_CHARACTERS:
        return line
    half = MAXIMUM_QUOTED_CHARACTERS // 2
    return f"{line[:half]} … {line[-half:]}"
