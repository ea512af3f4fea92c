"""The numbers and texts that the formats are made of, with their limits."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

_END = "$(?!\n)"
"""The end; `$` alone matches before a last line end too, in Python."""
_PRINTABLE = "^[^\\u0000-\\u001f\\u007f-\\u009f]*" + _END
"""No control characters."""
_MOST = 2**63 - 1

Count = Annotated[int, Meta(ge=0, le=_MOST)]
Size = Annotated[int, Meta(ge=1, le=_MOST)]
Positive = Annotated[int, Meta(ge=1, le=2**30)]
Token = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Number = Annotated[int, Meta(ge=-(10**18), le=10**18)] | Annotated[float, Meta(ge=-1e38, le=1e38)]
Ms = Annotated[float, Meta(description="Milliseconds.", ge=0, le=1e15)]
Share = Annotated[float, Meta(ge=0, le=1)]

Seed = Annotated[int, Meta(ge=0, extra_json_schema={"maximum": 2**64 - 1})]
"""An unsigned 64-bit number; whoever uses the type checks its maximum (`check_seed`)."""

Tokens = Annotated[tuple[Token, ...], Meta(max_length=2**22)]
Prompt = (
    Annotated[str, Meta(min_length=1, max_length=2**24)]
    | Annotated[tuple[Token, ...], Meta(min_length=1, max_length=2**22)]
)
"""A text, which goes through the chat template, or token ids, which are taken as they are."""

Text = Annotated[str, Meta(max_length=2**24)]
Sentence = Annotated[
    str,
    Meta(
        description="For a person; no control characters.",
        min_length=1,
        max_length=2000,
        pattern=_PRINTABLE,
    ),
]
Label = Annotated[str, Meta(min_length=1, max_length=200, pattern=_PRINTABLE)]
Name = Annotated[
    str, Meta(min_length=1, max_length=200, pattern="^[A-Za-z0-9][A-Za-z0-9_.-]*" + _END)
]
RunId = Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,127}" + _END)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}" + _END)]
AbsolutePath = Annotated[str, Meta(max_length=4096, pattern="^/" + _PRINTABLE[1:])]
Versions = Annotated[dict[Label, Label], Meta(max_length=64)]


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed over 64 bits, which `Seed` cannot say."""
    if seed >= 2**64:
        raise ValueError("Expected `int` < 2**64")
