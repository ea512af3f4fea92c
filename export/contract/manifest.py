"""The manifest: what `bundle.json` says, as types; parsing, checking and writing it.

Pure: files and folders are `export.contract.bundle`'s. What the stages compute and who runs them is
not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field

from export.contract.scalars import Count, Name, Number, Sha256, Size, Token
from export.contract.styles import STYLES
from export.contract.validation import Format
from quantize.errors import BundleError

MANIFEST_FILE = "bundle.json"
MAXIMUM_MANIFEST_BYTES = 16 * 2**20

StyleName = Annotated[str, Meta(extra_json_schema={"enum": list(STYLES)})]
Role = Literal["layers", "head"]
DType = Literal["float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"]
Axis = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Constant = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
FileName = Annotated[
    str,
    Meta(description="Relative, forward slashes, inside the bundle.", min_length=1, max_length=255),
]
OperatorCounts = dict[str, Annotated[int, Meta(ge=1, le=2**63 - 1)]]

FORMAT = Format(
    "bundle format",
    "schema_version",
    BundleError,
    "copy or export the bundle again with a matching version of the program",
)


class _Part(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of everything in a manifest; a field of its default is left out of the file."""


class TensorSpec(_Part, frozen=True):
    """One input or output of a program, and the axes whose size may be anything from 1 to that of
    `shape`.
    """

    name: Name
    dtype: DType
    shape: tuple[Size, ...]
    dynamic: tuple[Axis, ...] = ()


class Delegation(_Part, frozen=True):
    """Operators of a stage counted by name: inside the backend's delegates, and outside."""

    delegates: Count
    delegated: OperatorCounts
    portable: OperatorCounts


class Stage(_Part, frozen=True):
    """One program of the model and the tensors that go in and come out, in the method's order.

    role: `layers` owns the KV cache of its layers, runs in encoding and in denoising; `head` is the
    vocabulary head with the sampler, and runs in denoising only. backend: what it was lowered to.
    data_file: a .ptd file with the program's weights, if they are kept apart.
    """

    name: Name
    role: Role
    backend: Name
    file: FileName
    inputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1)]
    outputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1)]
    method: Name = "forward"
    data_file: FileName | None = None
    delegation: Delegation | None = None


class Call(_Part, frozen=True):
    """One run of a `layers` stage within a pass, for models that run a stage several times.

    inputs, outputs: the stage's name of a tensor -> the name of the value that goes in or comes
    out, where they differ. constants: the stage's name of an input -> its value, as [1] int64.
    """

    stage: Name
    inputs: dict[str, Name] = {}
    outputs: dict[str, Name] = {}
    constants: dict[str, Constant] = {}


class Decoding(_Part, frozen=True):
    """How the loop of a masked-diffusion or an autoregressive model uses its layers.

    prefill_length: most tokens in one call of the layers. block_length: a position sees the whole
    block that it is in, and all blocks before (blocks count from position 0): 1 is causal, 0 is one
    block of everything. shift: the hidden state at a position is that of the token so many
    positions later (1: autoregressive, and diffusion models made from such). mask_token: None for
    autoregressive models. bidirectional_prompt: the first turn's prompt is one block (PrefixLM).
    """

    prefill_length: Size
    block_length: Count = 1
    shift: Annotated[int, Meta(ge=0, le=1)] = 0
    mask_token: Token | None = None
    bidirectional_prompt: bool = False


class ModelInfo(_Part, frozen=True):
    """Which model it is; lengths in tokens, `maximum_context` with the canvas included."""

    family: Name
    name: Annotated[str, Meta(min_length=1)]
    vocabulary_size: Size
    hidden_size: Size
    canvas_length: Size
    maximum_context: Size


class Sampler(_Part, frozen=True):
    """The sampler inside the program and the defaults of its settings."""

    name: Name
    settings: dict[str, Number]


class SpecialTokens(_Part, frozen=True):
    """Token ids with a meaning: any of `eos` ends the text."""

    eos: tuple[Token, ...] = ()
    pad: Token | None = None
    bos: Token | None = None


class Experts(_Part, frozen=True):
    """How a mixture of experts is computed, and the estimates (ms per layer) that decided it."""

    computation: Literal["none", "dense", "gather"] = "none"
    estimated_ms_per_layer: dict[str, Annotated[float, Meta(ge=0, le=1e15)]] = {}


class TokenizerInfo(_Part, frozen=True):
    """The tokenizer's file in the bundle, and the chat template as Jinja source."""

    file: FileName
    chat_template: str | None = None


class Random(_Part, frozen=True):
    """The generator of the host's random numbers and the stream each use takes."""

    generator: Literal["philox4x32-10"] = "philox4x32-10"
    streams: dict[str, Count] = field(default_factory=lambda: {"uniform": 0, "token": 1})


class FileEntry(_Part, frozen=True):
    """Size and lower-case hexadecimal SHA-256 of one file."""

    bytes: Count
    sha256: Sha256


class Manifest(_Part, frozen=True):
    """Everything `bundle.json` says except the list of files, which sealing fills in.

    recipe: the quantization recipe; None for a model that was not quantized. notes: sentences for
    the user about what was left out on purpose. decoding: None for uniform diffusion. schedule: the
    runs of the `layers` stages in a pass; if empty, each once and in their order.
    """

    model: ModelInfo
    style: StyleName
    sampler: Sampler
    special_tokens: SpecialTokens
    stages: Annotated[tuple[Stage, ...], Meta(min_length=1)]
    versions: dict[str, str]
    experts: Experts = Experts()
    tokenizer: TokenizerInfo | None = None
    recipe: dict[str, Any] | None = None
    random: Random = field(default_factory=Random)
    notes: tuple[str, ...] = ()
    decoding: Decoding | None = None
    schedule: Annotated[tuple[Call, ...], Meta(max_length=4096)] = ()

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"style is {self.style!r}, known are {', '.join(STYLES)}")

    @property
    def backends(self) -> tuple[str, ...]:
        """The stages' backends by name, each once, in the order of the stages."""
        return tuple(dict.fromkeys(stage.backend for stage in self.stages))


class BundleDocument(Manifest, frozen=True, kw_only=True, tag_field="schema_version", tag=1):
    """`bundle.json`: the manifest, and every file of the bundle except itself."""

    files: Annotated[dict[FileName, FileEntry], Meta(min_length=1)]


def parse(content: bytes, where: str) -> tuple[Manifest, dict[str, FileEntry]]:
    """The manifest and the files that a `bundle.json` says; raises BundleError."""
    document = FORMAT.load(content, where, MAXIMUM_MANIFEST_BYTES)
    FORMAT.check_version(document, where, "program")
    read: BundleDocument = FORMAT.check(document, BundleDocument, where)
    fields = msgspec.structs.asdict(read)
    files = fields.pop("files")
    return Manifest(**fields), files


def serialize(manifest: Manifest, files: Mapping[str, FileEntry]) -> bytes:
    """The content of `bundle.json`; raises BundleError if it could not be read back."""
    content = FORMAT.dump(
        BundleDocument(files=dict(sorted(files.items())), **msgspec.structs.asdict(manifest)),
        "the manifest to be written",
        MAXIMUM_MANIFEST_BYTES,
        "cut the model into fewer stages",
    )
    parse(content, "the manifest to be written")
    return msgspec.json.format(content, indent=1) + b"\n"


def parse_stage(document: Mapping[str, Any]) -> Stage:
    """A stage from JSON that this program wrote."""
    return msgspec.convert(document, Stage)


def check_references(manifest: Manifest, files: Mapping[str, FileEntry], what: object) -> None:
    """Check what types cannot: names agree with each other, ids are in the vocabulary.

    `what` is the bundle's name in a sentence. Raises BundleError.
    """
    for name in files:
        check_file_name(name)
    if MANIFEST_FILE in files:
        raise BundleError(f"{what} lists {MANIFEST_FILE} among its own files; export it again")
    wanted = [stage.file for stage in manifest.stages]
    wanted += [stage.data_file for stage in manifest.stages if stage.data_file is not None]
    wanted += [manifest.tokenizer.file] if manifest.tokenizer else []
    for name in wanted:
        if name not in files:
            raise BundleError(
                f"{what} uses the file {name!r}, which is not among its listed files "
                f"({', '.join(sorted(files))}); export the bundle again"
            )
    names = [stage.name for stage in manifest.stages]
    if len(set(names)) != len(names):
        raise BundleError(f"{what} has two stages of one name ({', '.join(names)})")
    if unknown := {call.stage for call in manifest.schedule} - set(names):
        raise BundleError(f"{what} schedules {sorted(unknown)}, which are no stages")
    model, special, decoding = manifest.model, manifest.special_tokens, manifest.decoding
    if decoding is None:
        STYLES[manifest.style].check_decoding(what, model, decoding)
    mask = None if decoding is None else decoding.mask_token
    for token in (*special.eos, special.pad, special.bos, mask):
        if token is not None and token >= model.vocabulary_size:
            raise BundleError(
                f"{what} has a special token with id {token}, the vocabulary has "
                f"{model.vocabulary_size} tokens; export the bundle again"
            )
    if model.canvas_length > model.maximum_context:
        raise BundleError(
            f"{what} has a canvas of {model.canvas_length} tokens in a context of "
            f"{model.maximum_context}; export the bundle again"
        )


def check_file_name(name: str) -> None:
    """Raise BundleError for a name that is not a plain relative path inside the bundle."""
    path = PurePosixPath(name)
    plain = (
        name == str(path)
        and not path.is_absolute()
        and not {".", ".."}.intersection(path.parts)
        # Drive letters, alternate streams and separators of other systems.
        and not set(name) & set('\\:*?"<>|')
        and name.isprintable()
    )
    if not plain:
        raise BundleError(
            f"the file name {name!r} is not a plain relative path inside the bundle; "
            "do not use this bundle unless you know where it comes from"
        )
