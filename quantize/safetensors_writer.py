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

from quantize.safetensors_folder import ELEMENT_BYTES


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

    Reserving finds a full disk before the work and not after it. Raises OSError.
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
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close())
        try:
            total = self._data_start + offset
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, total)
            else:
                self._file.truncate(total)
            self._file.write(len(text).to_bytes(8, "little") + text)
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
        self._file.seek(self._data_start + start)
        self._file.write(data)
        self._next[name] = start + data.nbytes

    def close(self) -> None:
        """Flushes to the disk; raises ValueError if a tensor is not whole."""
        try:
            for name, end in self._end.items():
                if self._next[name] != end:
                    raise ValueError(f"{name} lacks {end - self._next[name]} bytes")
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def abandon(self) -> None:
        """Closes the unfinished file."""
        # What is still buffered may not fit on the disk; the file is thrown away anyway.
        try:
            self._file.close()
        except OSError:
            return
