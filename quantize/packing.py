"""Quantized integers in memory: four bits packed two a byte, and weights with other parts.

Of two four-bit integers in a byte, element 2i is in the low nibble and 2i+1 in the high one.
"""

from __future__ import annotations

from typing import Any

import torch

_PARTS = (
    "qdata",
    "scale",
    "zero_point",
    "target_dtype",
    "block_size",
    "dtype",
    "activation_quantization",
)


def with_parts(weight: torch.Tensor, **changed: Any) -> torch.Tensor:
    """Return torchao's IntxUnpackedToInt8Tensor with some of its parts (`qdata`, ...) changed."""
    return type(weight)(**{part: getattr(weight, part) for part in _PARTS} | changed)


def packed_width(width: int) -> int:
    """Bytes that a row of `width` four-bit integers takes; an odd row ends in an empty nibble."""
    return (width + 1) // 2


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Packs int8 values in [-8, 7], `[..., K]`, to uint8 `[..., (K + 1) // 2]`."""
    if values.shape[-1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    nibbles = values.view(torch.uint8) & 0x0F
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor, width: int) -> torch.Tensor:
    """The inverse of pack_int4: uint8 `[..., (width + 1) // 2]` to int8 `[..., width]`."""
    values = torch.empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=torch.int8)
    # Shifting left and back by four as signed integers extends the sign of a nibble.
    values[..., 0::2] = (packed << 4).view(torch.int8) >> 4
    values[..., 1::2] = packed.view(torch.int8) >> 4
    return values[..., :width].contiguous()
