"""The bundle: a folder with programs, tokenizer and a `bundle.json` that describes and seals them.

The only thing a device ever sees, so this file imports no torch. What the stages compute and who
runs them is not known here. The format is `bundle.schema.json`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from quantize.errors import BundleError
from quantize.files.atomic_folder import atomic_folder, resumable_folder
from quantize.files.journal import Journal

SCHEMA_VERSION = 2
MANIFEST_FILE = "bundle.json"
MAXIMUM_MANIFEST_BYTES = 16 * 2**20
_CHUNK_BYTES = 1 << 20

StyleName = Literal["uniform_diffusion", "masked_diffusion", "autoregressive"]
Role = Literal["layers", "head"]

Progress = Callable[[int, int, str], None]
"""Called with bytes hashed so far, bytes in all, and the file's name."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a program: its name, its dtype (`float32`, `int64`) and its shape.

    dynamic: axes whose size may be anything from 1 to the one in `shape`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    dynamic: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One program of the model and the tensors that go in and come out, in the method's order.

    role: `layers` owns the KV cache of its layers; `head` is the vocabulary head with the sampler.
    """

    name: str
    role: Role
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    method: str = "forward"
    data_file: str | None = None


@dataclass(frozen=True)
class Call:
    """One run of a `layers` stage within a pass, for models that run a stage several times.

    inputs, outputs: the stage's name of a tensor -> the name of the value that goes in or comes
    out, where they differ. constants: the stage's name of an input -> its value, as [1] int64.
    """

    stage: str
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoding:
    """How the loop of a masked-diffusion or an autoregressive model uses its layers.

    prefill_length: most tokens in one call of the layers. block_length: a position sees the whole
    block that it is in, and all blocks before (blocks count from position 0): 1 is causal, 0 is one
    block of everything. shift: the hidden state at a position is that of the token so many
    positions later (1: autoregressive, and diffusion models made from such). mask_token: None for
    autoregressive models. bidirectional_prompt: the first turn's prompt is one block (PrefixLM).
    """

    prefill_length: int
    block_length: int = 1
    shift: int = 0
    mask_token: int | None = None
    bidirectional_prompt: bool = False


@dataclass(frozen=True)
class ModelInfo:
    """Which model it is; lengths in tokens, `maximum_context` with the canvas included."""

    family: str
    name: str
    vocabulary_size: int
    hidden_size: int
    canvas_length: int
    maximum_context: int


@dataclass(frozen=True)
class Sampler:
    """The sampler inside the program and the defaults of its settings."""

    name: str
    settings: dict[str, float]


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids with a meaning: any of `eos` ends the text."""

    eos: tuple[int, ...] = ()
    pad: int | None = None
    bos: int | None = None


@dataclass(frozen=True)
class Experts:
    """How a mixture of experts is computed, and the estimates (ms per layer) that decided it."""

    computation: Literal["none", "dense", "gather"] = "none"
    estimated_ms_per_layer: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer's file in the bundle, and the chat template as Jinja source."""

    file: str
    chat_template: str | None = None


@dataclass(frozen=True)
class Delegation:
    """Operators of one stage counted by name: inside the backend's delegates, and outside."""

    delegates: int
    delegated: dict[str, int]
    portable: dict[str, int]


@dataclass(frozen=True)
class Random:
    """The generator of the host's random numbers and the stream each use takes."""

    generator: str = "philox4x32-10"
    streams: dict[str, int] = field(default_factory=lambda: {"uniform": 0, "token": 1})


@dataclass(frozen=True)
class FileEntry:
    """Size and lower-case hexadecimal SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything `bundle.json` says except the list of files, which writing fills in.

    decoding: None for uniform diffusion. schedule: the runs of the `layers` stages in a pass; if
    empty, each once and in their order.
    """

    model: ModelInfo
    style: StyleName
    sampler: Sampler
    special_tokens: SpecialTokens
    stages: tuple[Stage, ...]
    backend: str
    versions: dict[str, str]
    experts: Experts = field(default_factory=Experts)
    tokenizer: TokenizerInfo | None = None
    recipe: dict[str, Any] | None = None
    delegation: dict[str, Delegation] = field(default_factory=dict)
    random: Random = field(default_factory=Random)
    notes: tuple[str, ...] = ()
    decoding: Decoding | None = None
    schedule: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; `verified` says whether every file's SHA-256 was compared."""

    folder: Path
    manifest: Manifest
    files: dict[str, FileEntry]
    verified: bool

    def path(self, name: str) -> Path:
        """Where the listed file `name` lies. Raises BundleError for a name that is not listed."""
        if name not in self.files:
            raise BundleError(
                f"{self.folder} lists no file {name!r}; it has {', '.join(sorted(self.files))}"
            )
        return self.folder / name

    @property
    def total_bytes(self) -> int:
        """Bytes of all listed files."""
        return sum(entry.bytes for entry in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """The manifest as it stands in `bundle.json`."""
        return _document(self.manifest, self.files)


class BundleWriter:
    """A bundle in the making: files go under `folder`, then `finish` describes and seals them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.finished = False

    def path(self, name: str) -> Path:
        """Where the file `name` is to be written; its parent folder exists afterwards."""
        _check_name(name)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self, manifest: Manifest, progress: Progress | None = None) -> None:
        """Hash every file of `folder` and write `bundle.json`.

        Raises BundleError if the manifest breaks the schema or names a file that is not there.
        """
        names = sorted(
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if not path.is_dir()
        )
        total = sum((self.folder / name).stat().st_size for name in names)
        files: dict[str, FileEntry] = {}
        done = 0
        for name in names:
            path = self.folder / name
            files[name] = FileEntry(
                path.stat().st_size, _sha256(path, _offset(progress, done, total, name))
            )
            done += files[name].bytes
        document = _document(manifest, files)
        _check_document(document, "the manifest to be written")
        _check_references(manifest, files, self.folder)
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
        (self.folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
        self.finished = True


@contextmanager
def stage_bundle(
    destination: str | os.PathLike[str], *, overwrite: bool = False
) -> Iterator[BundleWriter]:
    """Give a writer whose folder becomes `destination` when the block ends, or not at all.

    Whatever goes wrong inside (an error, a full disk, Ctrl-C), the temporary folder is removed and
    `destination` is as it was. `overwrite` replaces an existing bundle, and nothing else. Raises
    OutputError if the destination is taken or cannot be written, BundleError if `finish` was not
    called.
    """
    with atomic_folder(destination, overwrite=overwrite, is_ours=_is_bundle) as folder:
        writer = BundleWriter(folder)
        yield writer
        if not writer.finished:
            raise BundleError(f"{destination} was left without a manifest; call finish")


@contextmanager
def resumable_bundle(
    destination: str | os.PathLike[str], work: str, *, overwrite: bool = False
) -> Iterator[tuple[BundleWriter, Journal]]:
    """`stage_bundle` for long work: a later call finds what an interrupted one had done.

    See `quantize.files.atomic_folder.resumable_folder` for the journal, for `work`, and for when
    the unfinished folder is kept.
    """
    with resumable_folder(destination, work, overwrite=overwrite, is_ours=_is_bundle) as (
        folder,
        journal,
    ):
        writer = BundleWriter(folder)
        yield writer, journal
        if not writer.finished:
            raise BundleError(f"{destination} was left without a manifest; call finish")


def write_bundle(
    destination: str | os.PathLike[str],
    manifest: Manifest,
    files: Mapping[str, bytes | Path],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Write a whole bundle from files that exist already (by path) or are small (as bytes).

    Raises what `stage_bundle` and `BundleWriter.finish` raise.
    """
    with stage_bundle(destination, overwrite=overwrite) as writer:
        for name, content in files.items():
            if isinstance(content, bytes):
                writer.path(name).write_bytes(content)
            else:
                shutil.copyfile(content, writer.path(name))
        writer.finish(manifest, progress)
    return open_bundle(destination, verify=False)


def open_bundle(
    folder: str | os.PathLike[str], *, verify: bool = True, progress: Progress | None = None
) -> Bundle:
    """Read `bundle.json` and check the files it lists: presence and size, with `verify` SHA-256.

    Raises BundleError, in one sentence, for anything missing, damaged, outside the folder, newer
    than this program, or not understood.
    """
    folder = Path(folder)
    document = _read_manifest(folder)
    manifest, files = _parse(document)
    _check_references(manifest, files, folder)
    total = sum(entry.bytes for entry in files.values())
    done = 0
    for name, entry in files.items():
        _check_file(folder, name, entry, verify, _offset(progress, done, total, name))
        done += entry.bytes
    return Bundle(folder=folder, manifest=manifest, files=files, verified=verify)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder; give the folder that holds {MANIFEST_FILE}")
    try:
        size = path.stat().st_size
        if size > MAXIMUM_MANIFEST_BYTES:
            raise BundleError(
                f"{path} has {size} bytes, at most {MAXIMUM_MANIFEST_BYTES} are read; "
                "export the bundle again"
            )
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise BundleError(
            f"{folder} holds no {MANIFEST_FILE}; give a folder that `pocketdiff export` wrote"
        ) from None
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read ({error.strerror}); check its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{path} is not valid JSON ({error}); copy or export the bundle again"
        ) from error
    if not isinstance(document, dict):
        raise BundleError(
            f"{path} holds a JSON {type(document).__name__}, expected an object; "
            "export the bundle again"
        )
    version = document.get("schema_version")
    if type(version) is not int:
        raise BundleError(
            f"{path} has schema_version {version!r}, expected an integer; export the bundle again"
        )
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version}, this program reads up to {SCHEMA_VERSION}; "
            "update the program"
        )
    _check_document(document, str(path))
    return document


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number in JSON")


@functools.cache
def _validator() -> Any:
    # Imported here: a tenth of a second that `--help` need not pay.
    from jsonschema import Draft202012Validator

    schema = Path(__file__).with_name("bundle.schema.json").read_text(encoding="utf-8")
    return Draft202012Validator(json.loads(schema))


def _check_document(document: dict[str, Any], where: str) -> None:
    from jsonschema.exceptions import best_match

    error = best_match(_validator().iter_errors(document))
    if error is not None:
        field_name = ".".join(str(part) for part in error.absolute_path) or "the top level"
        # The schema's own sentence quotes the offending value, which may be long.
        reason = error.message if len(error.message) <= 200 else error.message[:200] + "..."
        raise BundleError(
            f"{where} breaks the bundle format at {field_name} ({reason}); export the bundle "
            "again with a matching version of the program"
        )


def _parse(document: dict[str, Any]) -> tuple[Manifest, dict[str, FileEntry]]:
    """Turn a document that the schema accepts into typed objects."""
    special, sampler, tokenizer = (
        document["special_tokens"],
        document["sampler"],
        document["tokenizer"],
    )
    manifest = Manifest(
        model=ModelInfo(**document["model"]),
        style=document["style"],
        sampler=Sampler(name=sampler["name"], settings=dict(sampler["settings"])),
        special_tokens=SpecialTokens(
            eos=tuple(special["eos"]), pad=special["pad"], bos=special["bos"]
        ),
        stages=tuple(parse_stage(stage) for stage in document["stages"]),
        backend=document["backend"],
        versions=dict(document["versions"]),
        experts=Experts(**document["experts"]),
        tokenizer=None if tokenizer is None else TokenizerInfo(**tokenizer),
        recipe=document["recipe"],
        delegation={name: Delegation(**entry) for name, entry in document["delegation"].items()},
        random=Random(**document["random"]),
        notes=tuple(document["notes"]),
        decoding=None if document.get("decoding") is None else Decoding(**document["decoding"]),
        schedule=tuple(Call(**call) for call in document.get("schedule", ())),
    )
    files = {name: FileEntry(**entry) for name, entry in document["files"].items()}
    return manifest, files


def parse_stage(stage: dict[str, Any]) -> Stage:
    """The inverse of `dataclasses.asdict`, also from JSON."""
    tensors = {
        side: tuple(
            TensorSpec(
                name=spec["name"],
                dtype=spec["dtype"],
                shape=tuple(spec["shape"]),
                dynamic=tuple(spec.get("dynamic", ())),
            )
            for spec in stage[side]
        )
        for side in ("inputs", "outputs")
    }
    return Stage(**(stage | tensors))


def _document(manifest: Manifest, files: Mapping[str, FileEntry]) -> dict[str, Any]:
    document = asdict(manifest)
    for stage in document["stages"]:
        if stage["data_file"] is None:
            del stage["data_file"]
        for spec in stage["inputs"] + stage["outputs"]:
            if not spec["dynamic"]:
                del spec["dynamic"]
    for name in ("decoding", "schedule"):
        if not document[name]:
            del document[name]
    document = {"schema_version": SCHEMA_VERSION} | document
    document["files"] = {name: asdict(entry) for name, entry in sorted(files.items())}
    # Tuples become lists, as they will be when the file is read back.
    return json.loads(json.dumps(document))


def _check_references(manifest: Manifest, files: Mapping[str, FileEntry], folder: Path) -> None:
    """Check what the schema cannot: names agree with each other, ids are in the vocabulary."""
    for name in files:
        _check_name(name)
    if MANIFEST_FILE in files:
        raise BundleError(f"{folder} lists {MANIFEST_FILE} among its own files; export it again")
    wanted = [stage.file for stage in manifest.stages]
    wanted += [stage.data_file for stage in manifest.stages if stage.data_file is not None]
    wanted += [manifest.tokenizer.file] if manifest.tokenizer else []
    for name in wanted:
        if name not in files:
            raise BundleError(
                f"{folder} uses the file {name!r}, which is not among its listed files "
                f"({', '.join(sorted(files))}); export the bundle again"
            )
    names = [stage.name for stage in manifest.stages]
    if len(set(names)) != len(names):
        raise BundleError(f"{folder} has two stages of one name ({', '.join(names)})")
    if unknown := set(manifest.delegation) - set(names):
        raise BundleError(f"{folder} reports delegation of {sorted(unknown)}, which are no stages")
    if unknown := {call.stage for call in manifest.schedule} - set(names):
        raise BundleError(f"{folder} schedules {sorted(unknown)}, which are no stages")
    if manifest.decoding is None and manifest.style != "uniform_diffusion":
        raise BundleError(
            f"{folder} generates by {manifest.style} and does not say how (decoding); export the "
            "bundle again"
        )
    model, special = manifest.model, manifest.special_tokens
    ids = [*special.eos, *(i for i in (special.pad, special.bos) if i is not None)]
    if manifest.decoding is not None and manifest.decoding.mask_token is not None:
        ids.append(manifest.decoding.mask_token)
    for token in ids:
        if token >= model.vocabulary_size:
            raise BundleError(
                f"{folder} has a special token with id {token}, the vocabulary has "
                f"{model.vocabulary_size} tokens; export the bundle again"
            )
    if model.canvas_length > model.maximum_context:
        raise BundleError(
            f"{folder} has a canvas of {model.canvas_length} tokens in a context of "
            f"{model.maximum_context}; export the bundle again"
        )


def _check_name(name: str) -> None:
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


def _check_file(
    folder: Path, name: str, entry: FileEntry, verify: bool, progress: Callable[[int], None]
) -> None:
    path = folder / name
    try:
        if not (target := path.resolve()).is_relative_to(folder.resolve()):
            raise BundleError(
                f"{path} leads out of the bundle to {target}; copy the file itself there"
            )
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path} is not a regular file; copy the bundle again")
        if status.st_size != entry.bytes:
            raise BundleError(
                f"{path} has {status.st_size} bytes, expected {entry.bytes}; "
                "copy or export the bundle again"
            )
        if verify and (found := _sha256(path, progress)) != entry.sha256:
            raise BundleError(
                f"{path} is damaged: its SHA-256 begins with {found[:12]}, expected "
                f"{entry.sha256[:12]}; copy or export the bundle again"
            )
    except FileNotFoundError:
        raise BundleError(f"{path} is missing; copy or export the bundle again") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"{path} cannot be read ({reason}); check its permissions") from error


def _sha256(path: Path, progress: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress(done)
    return digest.hexdigest()


def _offset(progress: Progress | None, done: int, total: int, name: str) -> Callable[[int], None]:
    if progress is None:
        return lambda _: None
    return lambda count: progress(done + count, total, name)


def _is_bundle(folder: Path) -> bool:
    """Whether `folder` is a bundle, whole or damaged, of any version."""
    try:
        document = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and "schema_version" in document and "stages" in document
