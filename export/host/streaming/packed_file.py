"""The file of a bundle's packed weights: where it lies, what is in it, whether it can be trusted.

XNNPACK reads the file (XNNWeightsCache.cpp of ExecuTorch 1.5.1): packed weights, then an index,
then a footer. Nothing here loads a program; `pack_weights` makes the file.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from export.contract.bundle import Bundle
from export.contract.manifest import MANIFEST_FILE
from quantize.errors import InputError, OutputError

MAGIC, FORMAT_VERSION = 0x58505743, 2
# XNNWeightsCache::save_packed_index: of an entry its name's length; behind the name where its bytes
# are, how many, and the seed, which differs between kernels that pack differently.
_NAME = struct.Struct("<I")
_PLACE = struct.Struct("<QQI")
_FOOTER = struct.Struct("<QIII")
_CHUNK_BYTES = 8 << 20
STAGE_ALIGNMENT = 2 << 20
"""Where a stage begins: no page of the cache, which may be as large, belongs to two stages."""


class DamagedFile(Exception):
    """A file of packed weights that is not whole; it is made again."""


@dataclass(frozen=True)
class Entry:
    """The packed bytes of one operator's weights. name: keys of its weights in the program."""

    name: bytes
    offset: int
    bytes: int
    seed: int


@dataclass(frozen=True)
class Span:
    """Bytes of a file: where they begin and how many they are."""

    offset: int
    bytes: int


@dataclass(frozen=True)
class Packing:
    """What was packed: where each stage's weights lie in the file, and the SHA-256 of the file.

    Weights that two stages have are the first one's; a stage without has a span of 0 bytes.
    """

    sha256: str
    stages: dict[str, Span]

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file's seal."""
        spans = {name: [span.offset, span.bytes] for name, span in self.stages.items()}
        return {"sha256": self.sha256, "stages": spans}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Packing:
        """The reverse. Raises KeyError, TypeError, ValueError for anything else."""
        stages = {
            str(name): Span(int(offset), int(size))
            for name, (offset, size) in document["stages"].items()
        }
        return cls(str(document["sha256"]), stages)


def read_index(path: Path) -> tuple[Entry, ...]:
    """The entries of a file, as they lie in it. Raises DamagedFile, OSError."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < _FOOTER.size:
            raise DamagedFile(f"{size} bytes")
        file.seek(size - _FOOTER.size)
        start, count, magic, version = _FOOTER.unpack(file.read(_FOOTER.size))
        if (magic, version) != (MAGIC, FORMAT_VERSION) or start > size - _FOOTER.size:
            raise DamagedFile("no footer")
        file.seek(start)
        index = file.read(size - _FOOTER.size - start)
    entries, at = [], 0
    try:
        for _ in range(count):
            (length,) = _NAME.unpack_from(index, at)
            at += _NAME.size
            name = index[at : at + length]
            offset, length_, seed = _PLACE.unpack_from(index, at + length)
            at += length + _PLACE.size
            if offset + length_ > start:
                raise DamagedFile("an entry behind the weights")
            entries.append(Entry(name, offset, length_, seed))
    except struct.error as error:
        raise DamagedFile("a cut index") from error
    if at != len(index):
        raise DamagedFile("a longer index than it says")
    return tuple(sorted(entries, key=lambda entry: entry.offset))


def index_bytes(entries: Iterable[Entry], start: int) -> bytes:
    """The index and the footer of weights that end at `start`."""
    entries = tuple(entries)
    parts = [
        _NAME.pack(len(e.name)) + e.name + _PLACE.pack(e.offset, e.bytes, e.seed) for e in entries
    ]
    return b"".join(parts) + _FOOTER.pack(start, len(entries), MAGIC, FORMAT_VERSION)


def default_folder() -> Path:
    """Where packed weights lie unless said otherwise: `pocketdiff/packed` of the user's cache.

    Raises InputError for a user without a home.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "pocketdiff" / "packed"
    except RuntimeError as error:
        raise InputError(
            f"there is no folder for packed weights ({error}); give one with --packed-weights"
        ) from error


class PackedFile:
    """The file of one bundle for this processor and this ExecuTorch, in a folder of such files.

    Beside it lies a JSON file that says what it is, written last; a file without one, or another
    one than it says, counts as none.
    """

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        manifest = (bundle.folder / MANIFEST_FILE).read_bytes()
        self._identity = {
            "bundle_sha256": hashlib.sha256(manifest).hexdigest(),
            "executorch": importlib.metadata.version("executorch"),
            "machine": platform.machine(),
            "processor": processor(),
        }
        told = json.dumps(self._identity, sort_keys=True).encode()
        name = f"{self._identity['bundle_sha256'][:16]}-{hashlib.sha256(told).hexdigest()[:16]}"
        self.folder = folder
        self.path = folder / f"{name}.packed"
        self._seal = folder / f"{name}.json"
        self._lock = folder / f"{name}.lock"

    @property
    def partial(self) -> Path:
        """Where the file is made."""
        return self.path.with_suffix(".partial")

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Wait until no other process makes or opens the file, and keep them waiting.

        Gives the descriptor of the lock: a process that inherits it holds the lock as long as it
        runs.

        Raises OutputError for a folder that cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise OutputError(
                f"{self.folder} cannot be written ({error.strerror}); give another folder with "
                "--packed-weights"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def packing(self, *, verify: bool) -> Packing | None:
        """What is in the file if it is there, whole and the one that was made; None otherwise.

        verify: compare its SHA-256 too. Else a file that was changed is known by its size and time.
        """
        try:
            seal = json.loads(self._seal.read_bytes())
            status = self.path.stat()
            known = {"size": status.st_size, "modified_ns": status.st_mtime_ns}
            packing = Packing.from_json(seal)
            if seal != self._identity | known | packing.to_json():
                return None
            if status.st_uid != os.geteuid():
                return None
            read_index(self.path)
            if verify and sha256_of(self.path) != packing.sha256:
                return None
            return packing
        except (OSError, ValueError, KeyError, TypeError, AttributeError, DamagedFile):
            return None

    def discard(self) -> None:
        """Remove whatever is there of it."""
        for path in (self._seal, self.path, self.partial):
            path.unlink(missing_ok=True)

    def seal(self, packing: Packing) -> None:
        """The partial file becomes the file, with `packing` in it."""
        os.replace(self.partial, self.path)
        status = self.path.stat()
        known = {"size": status.st_size, "modified_ns": status.st_mtime_ns}
        seal = self._identity | known | packing.to_json()
        part = self._seal.with_suffix(".json-partial")
        with part.open("w", encoding="utf-8") as file:
            json.dump(seal, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._seal)


def sha256_of(path: Path) -> str:
    """Of the whole file, whose pages are not kept in the page cache."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in chunks(file, 0, os.fstat(file.fileno()).st_size):
            digest.update(chunk)
    return digest.hexdigest()


def chunks(file: IO[bytes], offset: int, size: int) -> Iterator[bytes]:
    """`size` bytes of a file from `offset`, in pieces, which the page cache forgets behind it."""
    end = offset + size
    while offset < end:
        piece = os.pread(file.fileno(), min(_CHUNK_BYTES, end - offset), offset)
        if not piece:
            raise DamagedFile("it is shorter than it says")
        yield piece
        os.posix_fadvise(file.fileno(), offset, len(piece), os.POSIX_FADV_DONTNEED)
        offset += len(piece)


def processor() -> str:
    """What decides how weights are packed: the processor's model and what it can do."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    told: dict[str, set[str]] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            told.setdefault(name.strip().lower(), set()).add(value.strip())
    names = ("model name", "cpu implementer", "cpu part", "features", "flags", "hardware")
    return hashlib.sha256(repr([sorted(told.get(n, ())) for n in names]).encode()).hexdigest()
