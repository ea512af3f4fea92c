"""The bundle: a folder with programs, tokenizer and a `bundle.json` that describes and seals them.

The only thing a device ever sees, so this file imports no torch. What the manifest says is
`export.contract.manifest`'s.
"""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct

from export.contract.manifest import (
    MANIFEST_FILE,
    MAXIMUM_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    check_file_name,
    check_references,
    parse,
    serialize,
)
from quantize.errors import BundleError
from quantize.files.atomic_folder import atomic_folder, resumable_folder
from quantize.files.durable import sha256_of
from quantize.files.journal import Journal

Progress = Callable[[int, int, str], None]
"""Called with bytes hashed so far, bytes in all, and the file's name."""


class Bundle(Struct, frozen=True):
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
        return json.loads(serialize(self.manifest, self.files))


class BundleWriter:
    """A bundle in the making: files go under `folder`, then `finish` describes and seals them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.finished = False

    def path(self, name: str) -> Path:
        """Where the file `name` is to be written; its parent folder exists afterwards."""
        check_file_name(name)
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
                path.stat().st_size, sha256_of(path, progress=_offset(progress, done, total, name))
            )
            done += files[name].bytes
        content = serialize(manifest, files)
        check_references(manifest, files, self.folder)
        (self.folder / MANIFEST_FILE).write_text(content.decode(), encoding="utf-8")
        self.finished = True


@contextmanager
def stage_bundle(destination: str | Path, *, overwrite: bool = False) -> Iterator[BundleWriter]:
    """Yields a writer whose folder becomes `destination` when the block ends, or not at all.

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
    destination: str | Path, work: str, *, overwrite: bool = False
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
    destination: str | Path,
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
    folder: str | Path, *, verify: bool = True, progress: Progress | None = None
) -> Bundle:
    """Read `bundle.json` and check the files it lists: presence and size, with `verify` SHA-256.

    Raises BundleError, in one sentence, for anything missing, damaged, outside the folder, of
    another version, or not understood.
    """
    folder = Path(folder)
    manifest, files = parse(_read_manifest(folder), str(folder / MANIFEST_FILE))
    check_references(manifest, files, folder)
    total = sum(entry.bytes for entry in files.values())
    done = 0
    for name, entry in files.items():
        _check_file(folder, name, entry, verify, _offset(progress, done, total, name))
        done += entry.bytes
    return Bundle(folder=folder, manifest=manifest, files=files, verified=verify)


def _read_manifest(folder: Path) -> bytes:
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder; give the folder that holds {MANIFEST_FILE}")
    path = folder / MANIFEST_FILE
    try:
        with path.open("rb") as file:
            return file.read(MAXIMUM_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise BundleError(
            f"{folder} holds no {MANIFEST_FILE}; give a folder that `pocketdiff export` wrote"
        ) from None
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read ({error.strerror}); check its permissions"
        ) from error


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
        if verify and (found := sha256_of(path, progress=progress)) != entry.sha256:
            raise BundleError(
                f"{path} is damaged: its SHA-256 begins with {found[:12]}, expected "
                f"{entry.sha256[:12]}; copy or export the bundle again"
            )
    except FileNotFoundError:
        raise BundleError(f"{path} is missing; copy or export the bundle again") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"{path} cannot be read ({reason}); check its permissions") from error


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
