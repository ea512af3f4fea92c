"""A safetensors file written piece by piece, so that no more than a piece is ever in memory.

The format (https://github.com/huggingface/safetensors): eight bytes of little-endian header
length, a JSON header with each tensor's type, shape and byte range, then the bytes without gaps.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from quantize.files.safetensors_folder import ELEMENT_BYTES


@dataclass(frozen=True)
class TensorSpec:
    """Type (as safetensors spells it) and shape of a tensor to be written."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes the tensor takes."""
        return ELEMENT_BYTES[self.dtype] * math.prod(self.shape)


class SafetensorsWriter:
    """Reserves the whole file at once, then takes each tensor's bytes in order.

    Reserving finds a full disk before the work and not after it. A file that is there already, of
    an interrupted process with the same `specs`, keeps its bytes: `skip` the tensors that are
    whole in it. Raises OSError.
    """

    def __init__(self, path: Path, specs: dict[str, TensorSpec]):
        self._path = path
        self._next: dict[str, int] = {}
        self._end: dict[str, int] = {}
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # Wide types first, so that every tensor is aligned to its own type.
        by_width = sorted(specs.items(), key=lambda item: (-ELEMENT_BYTES[item[1].dtype], item[0]))
        for name, spec in by_width:
            end = offset + spec.nbytes
            header[name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [offset, end],
            }
            self._next[name], self._end[name] = offset, end
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self._unflushed = True
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._file = open(descriptor, "wb", buffering=0)  # noqa: SIM115 (closed by close())
        try:
            total = self._data_start + offset
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, total)
            else:
                self._file.truncate(total)
            self._write(0, memoryview(len(text).to_bytes(8, "little") + text))
        except BaseException:
            self._file.close()
            raise

    def append(self, name: str, piece: torch.Tensor) -> None:
        """Writes the next bytes of tensor `name`: the pieces, in order, make up the tensor."""
        data = piece.contiguous().reshape(-1).view(torch.uint8).numpy()
        start = self._next[name]
        if start + data.nbytes > self._end[name]:
            raise ValueError(
                f"{name} takes {self._end[name] - start} more bytes, not {data.nbytes}"
            )
        self._write(self._data_start + start, memoryview(data))
        self._next[name] = start + data.nbytes

    def skip(self, name: str) -> None:
        """Leaves tensor `name` as it lies in the file."""
        self._next[name] = self._end[name]

    def flush(self) -> None:
        """Returns when all that was written is on the disk."""
        if self._unflushed:
            os.fsync(self._file.fileno())
            self._unflushed = False

    def close(self) -> None:
        """Flushes and closes; raises ValueError if a tensor is not whole."""
        try:
            for name, end in self._end.items():
                if self._next[name] != end:
                    raise ValueError(f"{name} lacks {end - self._next[name]} bytes")
            self.flush()
        finally:
            self._file.close()

    def abandon(self) -> None:
        """Closes the unfinished file."""
        self._file.close()

    def _write(self, position: int, data: memoryview) -> None:
        self._unflushed = True
        while data:
            written = os.pwrite(self._file.fileno(), data, position)
            data, position = data[written:], position + written
