"""Reads and writes the JSON of every format: limits, version, types; one sentence for a fault.

What the formats hold is said by types elsewhere: msgspec structs with constraints.
"""

from __future__ import annotations

import bisect
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from quantize.errors import UserError

VERSION = 1
"""Of every format."""

_LONGEST_QUOTE = 200
_AT = re.compile(r"^(.*?)(?: - at (?:`key` in )?`\$(.*)`)?$", re.DOTALL)


@dataclass(frozen=True)
class Format:
    """One format: what it is called in a sentence, where its version stands, what is raised.

    `remedy` says what to do about a document that is broken.
    """

    name: str
    version_field: str
    error: type[UserError]
    remedy: str

    def load(self, content: bytes, where: str, maximum_bytes: int) -> dict[str, Any]:
        """The JSON object in `content`, its fields not yet checked; raises `error`."""
        if len(content) > maximum_bytes:
            raise self.error(
                f"{where} has {len(content)} bytes or more, at most {maximum_bytes} are read; "
                f"{self.remedy}"
            )
        try:
            document = msgspec.json.decode(content)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise self.error(
                f"{where} is not valid JSON ({_quote(_reason(error, content))}); {self.remedy}"
            ) from error
        if not isinstance(document, dict):
            raise self.error(
                f"{where} holds a JSON {type(document).__name__}, expected an object; {self.remedy}"
            )
        return document

    def check_version(self, document: dict[str, Any], where: str, reader: str) -> None:
        """Raise `error` for every version but this one; `reader` says who reads."""
        version = document.get(self.version_field)
        if type(version) is not int:
            raise self.error(
                f"{where} has {self.version_field} {_quote(reprlib.repr(version))}, expected the "
                f"integer {VERSION}; {self.remedy}"
            )
        if version != VERSION:
            remedy = f"update the {reader}" if version > VERSION else self.remedy
            kind = self.version_field.removesuffix("_version")
            raise self.error(
                f"{where} has {kind} version {_quote(str(version))}, this {reader} reads "
                f"{VERSION}; {remedy}"
            )

    def check(self, document: dict[str, Any], type_: Any, where: str) -> Any:
        """The document as the type, of which it has every field; raises `error`."""
        try:
            return msgspec.convert(document, type_)
        except RecursionError as error:
            raise self.error(f"{where} is nested too deeply; {self.remedy}") from error
        except msgspec.ValidationError as error:
            reason, place = _located(document, type_, str(error))
            raise self.error(
                f"{where} breaks the {self.name} at {_quote(place)} ({_quote(reason)}); "
                f"{self.remedy}"
            ) from error

    def dump(self, document: Any, where: str, maximum_bytes: int, advice: str) -> bytes:
        """The document as JSON; numbers that are not finite become null. Raises `error`."""
        try:
            content = msgspec.json.encode(document)
        except ValueError as error:  # half of a surrogate pair
            raise self.error(
                f"{where} holds what JSON cannot carry ({_quote(str(error))}); leave it out"
            ) from error
        if len(content) >= maximum_bytes:
            raise self.error(
                f"{where} has {len(content)} bytes, at most {maximum_bytes} are read; {advice}"
            )
        return content


def sentence(text: str) -> str:
    """Text as a failure's sentence may be: one line, no control characters, at most 2,000 long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line[:2000] or "no reason was given"


def _quote(text: str) -> str:
    """Text from a stranger, short and printable."""
    return sentence(text)[:_LONGEST_QUOTE]


def _reason(error: Exception, content: bytes) -> str:
    """What the parser says, with the bytes that it stumbled over."""
    found = re.search(r"\(byte (\d+)\)$", str(error))
    if found is None:
        return str(error)
    rest = content[int(found[1]) :][:20].decode("utf-8", "replace")
    return f"{error}, near {rest!r}"


def _located(document: dict[str, Any], type_: Any, message: str) -> tuple[str, str]:
    """Reason and place of a message of msgspec, the place with dots and with the keys it omits."""
    found = _AT.match(message)
    assert found is not None
    reason, path = found[1], found[2] or ""
    place: list[str | int] = []
    for name, index in re.findall(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]", path):
        if index == "...":
            place.append(_first_bad_key(document, type_, place, path))
        else:
            place.append(name or int(index))
    return reason, ".".join(map(str, place)) or "the top level"


def _first_bad_key(
    document: dict[str, Any], type_: Any, place: Sequence[str | int], path: str
) -> str:
    """The key that msgspec writes as `...`: the first with which the object there is refused."""
    value: Any = document
    for part in place:
        value = value[part]
    keys = list(value)

    def breaks(last: int) -> bool:
        try:
            msgspec.convert(_with_keys(document, place, keys[: last + 1]), type_)
        except msgspec.ValidationError as error:
            return f"`${path}`" in str(error)
        return False

    return keys[min(bisect.bisect_left(range(len(keys)), True, key=breaks), len(keys) - 1)]


def _with_keys(value: Any, place: Sequence[str | int], keys: Sequence[str]) -> Any:
    """A copy whose object at `place` has these keys only."""
    if not place:
        return {key: value[key] for key in keys}
    copy = value.copy()
    copy[place[0]] = _with_keys(value[place[0]], place[1:], keys)
    return copy
