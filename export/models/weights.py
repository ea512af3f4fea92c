"""Where a module's weights come from: a checkpoint, another layer's place in it, or nowhere.

Modules are built from anything with these methods, so that layers of one kind can be built from one
another's weights and from random ones.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torchao.quantization import IntxUnpackedToInt8Tensor

from quantize.checkpoint import PackedIntegers
from quantize.packing import pack_int4


class Weights(Protocol):
    """What building a module needs of `quantize.checkpoint.Checkpoint`, which has all of it."""

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint.shape`."""

    def get(self, name: str, index: int | None = None) -> Tensor:
        """See `Checkpoint.get`."""

    def get_packed(self, name: str, index: int | None = None) -> PackedIntegers | None:
        """See `Checkpoint.get_packed`."""


class RenamedWeights:
    """Weights under the names that another layer's have."""

    def __init__(self, weights: Weights, own_name: Callable[[str], str]) -> None:
        self._weights, self._own_name = weights, own_name

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint.shape`."""
        return self._weights.shape(self._own_name(name))

    def get(self, name: str, index: int | None = None) -> Tensor:
        """See `Checkpoint.get`."""
        return self._weights.get(self._own_name(name), index)

    def get_packed(self, name: str, index: int | None = None) -> PackedIntegers | None:
        """See `Checkpoint.get_packed`."""
        return self._weights.get_packed(self._own_name(name), index)


def other_layers(from_layer: int, to_layer: int) -> Callable[[str], str]:
    """Names of tensors of layer `from_layer` and on -> those as far behind `to_layer`."""

    def rename(name: str) -> str:
        return re.sub(
            r"(?<=\.layers\.)\d+(?=\.)|(?<=\.blocks\.)\d+(?=\.)",
            lambda number: str(int(number.group()) - from_layer + to_layer),
            name,
            count=1,
        )

    return rename


class RandomWeights:
    """Random weights of the form of others: types, shapes, groups, zero points.

    No two tensors are equal, so that each can be found again in a program that was made with them;
    the same name gives the same numbers. `asked` lists what a module was built from.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.asked: list[tuple[str, int | None]] = []

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint.shape`."""
        return self._weights.shape(name)

    def get(self, name: str, index: int | None = None) -> Tensor:
        """See `Checkpoint.get`."""
        self.asked.append((name, index))
        return self._make(name, index)

    def get_packed(self, name: str, index: int | None = None) -> PackedIntegers | None:
        """See `Checkpoint.get_packed`."""
        weight = self._make(name, index)
        if not isinstance(weight, IntxUnpackedToInt8Tensor):
            return None
        bits = 4 if weight.target_dtype == torch.int4 else 8
        qdata = pack_int4(weight.qdata) if bits == 4 else weight.qdata
        return PackedIntegers(bits, qdata, weight.scale)

    def _make(self, name: str, index: int | None) -> Tensor:
        digest = hashlib.sha256(f"{name} {index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        weight = self._weights.get(name, index)
        if not isinstance(weight, IntxUnpackedToInt8Tensor):
            return torch.rand(weight.shape, generator=generator) + 0.5
        limit = 8 if weight.target_dtype == torch.int4 else 128
        scale = torch.rand(weight.scale.shape, generator=generator) * 0.01 + 0.001
        return IntxUnpackedToInt8Tensor(
            qdata=torch.randint(
                -limit, limit, weight.qdata.shape, dtype=torch.int8, generator=generator
            ),
            scale=scale.to(weight.scale.dtype),
            zero_point=weight.zero_point,
            target_dtype=weight.target_dtype,
            block_size=weight.block_size,
            dtype=weight.dtype,
            activation_quantization=weight.activation_quantization,
        )
