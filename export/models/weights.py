"""Where a module's weights come from: a checkpoint, another layer's place in it, or nowhere.

Modules are built from anything with these methods, so that layers of one kind can be built from one
another's weights and from random ones.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from export.heads.vocabulary import lookup_table
from quantize.checkpoint import PackedIntegers
from quantize.errors import CheckpointError
from quantize.packing import pack_int4, with_parts


class Weights(Protocol):
    """What building a module needs of `quantize.checkpoint.Checkpoint`, which has all of it."""

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint.shape`."""

    def get(self, name: str, index: int | None = None) -> Tensor:
        """See `Checkpoint.get`."""

    def get_packed(self, name: str, index: int | None = None) -> PackedIntegers | None:
        """See `Checkpoint.get_packed`."""


def integers_like(
    weight: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    block_size: Sequence[int] | None = None,
) -> IntxUnpackedToInt8Tensor:
    """A tensor of other integers, quantized as `weight` is; block_size: None for the same."""
    return with_parts(
        weight,
        qdata=qdata,
        scale=scale,
        zero_point=zero_point,
        block_size=tuple(block_size or weight.block_size),
    )


def read_weight(weights: Weights, name: str, shape: Sequence[int]) -> Tensor:
    """The tensor `name`; raises CheckpointError if it is missing or of another shape."""
    check_shape(weights, name, weights.shape(name), shape)
    return weights.get(name)


def check_shape(
    weights: Weights, name: str, stored: Sequence[int], expected: Sequence[int]
) -> None:
    """Raise CheckpointError for a tensor that is stored in another shape than expected."""
    if tuple(stored) != tuple(expected):
        raise CheckpointError(
            f"tensor {name} has shape {list(weights.shape(name))}, which does not fit config.json: "
            f"config.json says {list(expected)}; take config and weights from one checkpoint"
        )


def set_parameter(module: nn.Module, path: str, weight: Tensor) -> None:
    """Put a weight in the place of the parameter at `path`, a table in the form of look-ups."""
    owner_path, _, leaf = path.rpartition(".")
    owner = module.get_submodule(owner_path)
    if isinstance(owner, nn.Embedding):
        weight = lookup_table(weight)
    setattr(owner, leaf, nn.Parameter(weight, requires_grad=False))


def load_parameters(module: nn.Module, weights: Weights, name_of: Callable[[str], str]) -> None:
    """Give every parameter of a module its weight, found by the checkpoint's name of its path.

    Raises what `read_weight` raises.
    """
    for path, parameter in list(module.named_parameters()):
        set_parameter(module, path, read_weight(weights, name_of(path), parameter.shape))


def from_layer(path: str, first: int) -> str:
    """The path in the whole model of `path` in a group of layers that begins with layer `first`."""
    parts = path.split(".")
    if parts[0] == "layers":
        parts[1] = str(first + int(parts[1]))
    return ".".join(parts)


def unused_note(names: Iterable[str]) -> list[str]:
    """The note about tensors that no graph has; none without any."""
    if not (unused := sorted(names)):
        return []
    return [f"skipped {len(unused)} tensors this architecture does not use: {unused[:3]}"]


class RenamedWeights(Weights):
    """Weights under the names that another layer's have."""

    def __init__(self, weights: Weights, own_name: Callable[[str], str]) -> None:
        self._weights, self._own_name = weights, own_name

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(self._own_name(name))

    def get(self, name: str, index: int | None = None) -> Tensor:
        return self._weights.get(self._own_name(name), index)

    def get_packed(self, name: str, index: int | None = None) -> PackedIntegers | None:
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


class RandomWeights(Weights):
    """Random weights of the form of others: types, shapes, groups, zero points.

    No two tensors are equal, so that each can be found again in a program that was made with them;
    the same name gives the same numbers. `asked` lists what a module was built from.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.asked: list[tuple[str, int | None]] = []

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(name)

    def get(self, name: str, index: int | None = None) -> Tensor:
        self.asked.append((name, index))
        return self._make(name, index)

    def get_packed(self, name: str, index: int | None = None) -> PackedIntegers | None:
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
        return integers_like(
            weight,
            torch.randint(-limit, limit, weight.qdata.shape, dtype=torch.int8, generator=generator),
            scale.to(weight.scale.dtype),
            weight.zero_point,
        )
