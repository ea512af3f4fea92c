"""Text from a device made harmless: for a terminal, for Markdown; and numbers with their units.

HTML is escaped by the template.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

MAXIMUM_CHARACTERS = 300

_NONE = {"threads": "the runtime's choice", "settings": "the bundle's own"}
"""What it means that a condition has no value."""

_UNITS = {"_s": "s", "_c": "°C"}

_MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~!$@^])")


def plain(text: object, maximum: int = MAXIMUM_CHARACTERS) -> str:
    """`text` on one line without control, format and surrogate characters, which are shown as
    escapes; what is longer than `maximum` characters is cut."""
    found = str(text)
    cut = found[:maximum]
    shown = "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        else character
        for character in cut
    )
    return shown + ("…" if len(found) > maximum else "")


def plain_tree(value: Any, depth: int = 0) -> Any:
    """A JSON value with every string in it made plain; numbers stay, deep nests become text."""
    if isinstance(value, str):
        return plain(value)
    if depth > 6:
        return plain(value)
    if isinstance(value, Mapping):
        return {plain(key): plain_tree(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_tree(item, depth + 1) for item in value]
    return value


def markdown(text: object) -> str:
    """`text` for a cell of a Markdown table: no markup, no HTML, no new cell."""
    escaped = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN_SPECIAL.sub(r"\\\1", escaped)


def number(value: float) -> str:
    """A number with three to five digits that matter."""
    size = abs(value)
    if value == int(value) and size < 1e6:
        return f"{int(value):,}"
    digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"


def quantity(value: float | None, unit: str) -> str:
    """A number with its unit, bytes in MiB, a share in per cent; a dash where there is none."""
    if value is None:
        return "-"
    if unit == "bytes":
        return f"{value / 2**20:,.1f} MiB"
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "ms" and value >= 10_000:
        return f"{value / 1000:,.2f} s"
    return f"{number(value)} {unit}"


def condition(leaf: str, value: Any) -> str:
    """The value of a condition for people."""
    name = leaf.rpartition(".")[2]
    if value is None:
        return _NONE.get(name, "none" if leaf.startswith("workload") else "not told")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("bytes") and isinstance(value, int):
        return f"{value:,} bytes ({quantity(value, 'bytes')})"
    if isinstance(value, Mapping) and leaf.startswith("clocks"):
        return _cores(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{plain(key, 40)} {plain(item, 40)}" for key, item in value.items())
    if isinstance(value, (int, float)):
        return f"{value if isinstance(value, int) else f'{value:.15g}'} {_unit(name)}".rstrip()
    return plain(value)


def field_name(field: str) -> str:
    """The name of a field for people, without the unit, which is in the value."""
    unit = _unit(field)
    bare = field.rpartition("_")[0] if unit or field.endswith(("_bytes", "_mhz")) else field
    return bare.replace("_", " ")


def _unit(name: str) -> str:
    return next((unit for suffix, unit in _UNITS.items() if name.endswith(suffix)), "")


def _cores(values: Mapping[str, Any]) -> str:
    """`{"cpu0": x, "cpu1": x}` with equal values put together."""
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        shown = (
            " to ".join(f"{part:.10g}" for part in value) + " MHz"
            if isinstance(value, list) and all(isinstance(part, (int, float)) for part in value)
            else plain(value if isinstance(value, str) else json.dumps(value))
        )
        names.setdefault(shown, []).append(plain(name, 40))
    if not names:
        return "not told"
    return "; ".join(f"{value}: {', '.join(found)}" for value, found in names.items())
