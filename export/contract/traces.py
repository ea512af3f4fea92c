"""Golden traces: requests to small models, and every token that each step left.

A host in any language replays them. In words: `docs/bundle.md`; the files are under `traces/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from export.contract.manifest import StyleName
from export.contract.scalars import Count, Number, Positive, Seed, Sha256, Tokens
from export.contract.validation import Format
from quantize.errors import UserError

FOLDER = Path(__file__).with_name("traces")
MAXIMUM_BYTES = 16 * 2**20


class TraceError(UserError):
    """A trace file that cannot be read."""


FORMAT = Format("format of golden traces", "schema_version", TraceError, "write the traces again")


class _Part(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of everything in a trace."""


class Step(_Part, frozen=True):
    """What a step left: the next canvas, the best guess, and which positions of `tokens` stay (1)
    and which are noise (0); for autoregressive models one token.
    """

    tokens: Tokens
    draft: Tokens
    accepted: tuple[Literal[0, 1], ...]
    finished: bool


class Canvas(_Part, frozen=True):
    """A canvas: what it began with (None for autoregressive models), its steps, what was committed.

    encodings: tokens of each pass that brought known tokens into the KV cache before its steps.
    """

    encodings: tuple[Positive, ...]
    start: Tokens | None
    steps: Annotated[tuple[Step, ...], Meta(min_length=1)]
    committed: Tokens


class Turn(_Part, frozen=True):
    """One call: the request (tokens are appended to the conversation's), and what came of it.

    settings: sampler settings that replace the bundle's; force_steps: exactly so many steps a
    canvas, as in the runner protocol.
    """

    prompt: Tokens
    max_new_tokens: Positive
    seed: Seed
    settings: dict[str, Number]
    force_steps: Positive | None
    canvases: Annotated[tuple[Canvas, ...], Meta(min_length=1)]
    finish_reason: Literal["eos", "length"]


class Conversation(_Part, frozen=True):
    """Turns on one KV cache. is_equal_everywhere: also the eager int4 model agrees, with whatever
    vector instructions, so no decision in it is a near-tie.
    """

    name: str
    turns: Annotated[tuple[Turn, ...], Meta(min_length=1)]
    is_equal_everywhere: bool


class Traces(_Part, frozen=True, tag_field="schema_version", tag=1):
    """A file of traces: one model, quantized by the recipe and lowered to the backend.

    weights_sha256: of the checkpoint's model.safetensors.
    """

    style: StyleName
    checkpoint: str
    weights_sha256: Sha256
    recipe: str
    backend: str
    maximum_context: Count
    conversations: Annotated[tuple[Conversation, ...], Meta(min_length=1)]


def read_traces(style: str) -> Traces:
    """The traces of a style; raises TraceError."""
    path = FOLDER / f"{style}.json"
    document = FORMAT.load(path.read_bytes(), str(path), MAXIMUM_BYTES)
    FORMAT.check_version(document, str(path), "program")
    return FORMAT.check(document, Traces, str(path))


def write_traces(traces: Traces) -> None:
    """Write the file of the traces' style."""
    content = FORMAT.dump(traces, "the traces", MAXIMUM_BYTES, "take fewer requests")
    lines = msgspec.json.format(content, indent=0).replace(b',{"tokens"', b',\n{"tokens"')
    FOLDER.mkdir(exist_ok=True)
    text = lines.replace(b',{"encodings"', b',\n{"encodings"').replace(
        b',{"prompt"', b',\n{"prompt"'
    )
    (FOLDER / f"{traces.style}.json").write_bytes(text + b"\n")
