"""The named tensors of one folder of safetensors files, memory-mapped.

It knows shards, their index and headers; it knows nothing of quantization or of models.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from quantize.errors import CheckpointError
from quantize.files.json_files import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Bytes per element of the types that safetensors files name; sub-byte types are not read.
ELEMENT_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


# Pages that were read stay in the process's memory as long as their file is mapped: after so many
# bytes the files are mapped anew. What was read is a view, which keeps its mapping while it lives.
_MAPPED_BYTES = 256 * 2**20


class SafetensorsFolder:
    """Every tensor of a folder by name; opening it checks all headers against the files' sizes.

    With `partial`, files that the index names may be missing: `missing` has their names in order,
    and their tensors are not among `names`. Several threads may read.
    """

    def __init__(self, folder: Path, *, partial: bool = False):
        self.folder = folder
        self._file_of: dict[str, str] = {}
        self._handles: dict[str, safe_open] = {}
        self._bytes_read: Counter[str] = Counter()
        self._reading = threading.Lock()
        self.missing: tuple[str, ...] = ()
        single, index = folder / SINGLE_FILE, folder / INDEX_FILE
        if single.exists():
            self._file_of = {name: SINGLE_FILE for name in self._open(SINGLE_FILE)}
        elif index.exists():
            self._file_of = _read_index(index)
            files = sorted(set(self._file_of.values()))
            if partial:
                self.missing = tuple(file for file in files if not (folder / file).exists())
                self._file_of = {n: f for n, f in self._file_of.items() if f not in self.missing}
            present = {file: self._open(file) for file in files if file not in self.missing}
            for name, file in self._file_of.items():
                if name not in present[file]:
                    raise CheckpointError(
                        f"{index} places tensor {name} in {file}, which does not hold it; "
                        "fetch both files again."
                    )
        else:
            raise CheckpointError(_nothing_to_read(folder))
        refuse_unprintable_names(folder, self._file_of)

    def _open(self, file: str) -> set[str]:
        path = self.folder / file
        try:
            handle = safe_open(str(path), framework="pt")
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} is missing, though {INDEX_FILE} names it; fetch the missing file."
            ) from None
        except SafetensorError as error:
            size = path.stat().st_size
            raise CheckpointError(
                f"{path} ({size:,} bytes) is truncated or damaged ({error}); fetch it again."
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be opened ({error}); check that it is a readable file."
            ) from error
        self._handles[file] = handle
        return set(handle.keys())

    def names(self) -> set[str]:
        """All tensor names."""
        return set(self._file_of)

    def file(self, name: str) -> str:
        """Name of the file that holds a tensor; raises KeyError if there is none."""
        return self._file_of[name]

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise CheckpointError(
                f"{self.folder} holds no tensor {name} (it holds {len(self._file_of)} others); "
                "check that the checkpoint is of the architecture its config.json names."
            )
        return self._handles[self._file_of[name]].get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Stored type of a tensor as safetensors spells it (`BF16`, `F32`, `U8`, ...)."""
        return self._slice(name).get_dtype()

    def stored_bytes(self, name: str) -> int:
        """Bytes a tensor takes in its file."""
        dtype = self.dtype(name)
        if dtype not in ELEMENT_BYTES:
            raise CheckpointError(
                f"Tensor {name} of {self.folder} is stored as {dtype}, which is not supported; "
                "convert it to bfloat16, float16 or float32."
            )
        elements = 1
        for size in self.shape(name):
            elements *= size
        return elements * ELEMENT_BYTES[dtype]

    def read(
        self,
        name: str,
        index: int | None = None,
        rows: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """The tensor as stored, or the part `[index]` or `[rows[0]:rows[1]]` of its first axis."""
        part = self._slice(name)
        file = self._file_of[name]
        try:
            if index is not None:
                tensor = part[index]
            elif rows is not None:
                tensor = part[rows[0] : rows[1]]
            else:
                tensor = self._handles[file].get_tensor(name)
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"Tensor {name} of {self.folder / file} cannot be read ({error}); "
                "fetch the file again."
            ) from error
        with self._reading:
            self._bytes_read[file] += tensor.nbytes
            if self._bytes_read.total() > _MAPPED_BYTES:
                for read in self._bytes_read:
                    self._open(read)
                self._bytes_read.clear()
        return tensor


def refuse_unprintable_names(path: Path, names: Iterable[str]) -> None:
    """Raises CheckpointError for a name that could not be shown in a message as it is."""
    for name in names:
        if not name.isprintable():
            raise CheckpointError(
                f"{path} has a tensor named {name!r}, which no model has; "
                "take the checkpoint from a source you trust."
            )


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path} has no table weight_map of tensor names to files; fetch the file again."
        )
    for name, file in weight_map.items():
        # A plain file name: an index must not reach outside its own folder.
        plain = isinstance(file, str) and file.endswith(".safetensors")
        if not plain or not file.isprintable() or "/" in file or "\\" in file:
            raise CheckpointError(
                f"{path} places tensor {name} in {file!r}, which is not a safetensors file of "
                "the same folder; take the checkpoint from a source you trust."
            )
    return weight_map


def _nothing_to_read(folder: Path) -> str:
    with contextlib.suppress(OSError):
        files = sorted(entry.name for entry in folder.iterdir())
        shards = [file for file in files if file.endswith(".safetensors")]
        if shards:
            return (
                f"{folder} holds {shards[0]} but neither {SINGLE_FILE} nor {INDEX_FILE}; "
                "fetch the index of the shards."
            )
        pickles = [file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if pickles:
            return (
                f"{folder} holds weights only as {pickles[0]}, a pickle file that could run code; "
                f"convert them to {SINGLE_FILE}."
            )
    return f"{folder} has no {SINGLE_FILE}; name a folder that holds a whole checkpoint."
