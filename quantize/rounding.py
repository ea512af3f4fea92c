"""Quantizes one matrix as torchao does, and pieces of large weights side by side.

Which weight gets which scheme is the recipe's business; how integers lie on disk is `packing`'s.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from quantize.checkpoint import Checkpoint
from quantize.errors import CheckpointError
from quantize.packing import pack_int4
from quantize.planning import PlannedWeight
from quantize.recipe import Scheme

# Rows of a matrix are quantized this many elements at a time, 16 MiB in fp32 (an expert of
# DiffusionGemma 26B-A4B has as many), and no more than so many are in work or wait to be written,
# however many processors there are. Quantizing a piece takes some 120 MB.
_PIECE_ELEMENTS = 2**22
ELEMENTS_IN_ALL = 32 * _PIECE_ELEMENTS


def quantize_weight(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Quantizes one fp32 matrix `[out, in]` as torchao does, to an IntxUnpackedToInt8Tensor."""
    from torchao.quantization import quantize_

    out_features, in_features = weight.shape
    linear = torch.nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    quantize_(linear, _torchao_config(scheme))
    return linear.weight.data


@functools.cache
def _torchao_config(scheme: Scheme) -> Any:
    # Imported here: it takes seconds, and the command line's --help must not.
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
    )
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    weight_dtype = {4: torch.int4, 8: torch.int8}[scheme.bits]
    granularity = PerAxis(0) if scheme.group_size is None else PerGroup(scheme.group_size)
    scale_dtype = getattr(torch, scheme.scale_dtype)
    algorithm = {
        "minmax": IntxChooseQParamsAlgorithm.AFFINE,
        "hqq": IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
    }[scheme.scale_algorithm]
    if scheme.activation == "int8_dynamic":
        return Int8DynamicActivationIntxWeightConfig(
            weight_dtype=weight_dtype,
            weight_granularity=granularity,
            weight_scale_dtype=scale_dtype,
            intx_choose_qparams_algorithm=algorithm,
        )
    return IntxWeightOnlyConfig(
        weight_dtype=weight_dtype,
        granularity=granularity,
        scale_dtype=scale_dtype,
        intx_choose_qparams_algorithm=algorithm,
    )


@dataclass(frozen=True)
class Piece:
    """A part of a weight that is worked on at once: an expert, or rows of a matrix; else all."""

    weight: PlannedWeight
    index: int | None = None
    rows: tuple[int, int] | None = None
    is_last: bool = True

    @property
    def elements(self) -> int:
        shape = self.weight.shape
        if self.index is not None:
            return math.prod(shape[1:])
        return (
            self.weight.elements if self.rows is None else shape[1] * (self.rows[1] - self.rows[0])
        )


@dataclass(frozen=True)
class QuantizedPiece:
    """What becomes of a piece: parts of tensors to write, and energies as of `ReportRow`."""

    parts: dict[str, torch.Tensor]
    signal: float = 0.0
    noise: float = 0.0


def pieces_of(weight: PlannedWeight) -> Iterator[Piece]:
    """In order: experts one by one, large matrices by rows."""
    if weight.scheme is None:
        yield Piece(weight)
    elif len(weight.shape) == 3:
        experts = weight.shape[0]
        for index in range(experts):
            yield Piece(weight, index=index, is_last=index == experts - 1)
    elif weight.scheme.scale_algorithm == "hqq":
        # torchao ends its search when no scale of the whole matrix moves any more: pieces
        # could end it at another step and so differ in the last bit.
        yield Piece(weight)
    else:
        rows, width = weight.shape
        step = max(1, _PIECE_ELEMENTS // width)
        for start in range(0, rows, step):
            end = min(start + step, rows)
            yield Piece(weight, rows=(start, end), is_last=end == rows)


def quantize_piece(checkpoint: Checkpoint, piece: Piece) -> QuantizedPiece:
    name, scheme = piece.weight.name, piece.weight.scheme
    if scheme is None:
        return QuantizedPiece({name: checkpoint.get_as_stored(name)})
    if piece.rows is not None:
        matrix = checkpoint.get_rows(name, *piece.rows)
    else:
        matrix = checkpoint.get(name, piece.index)
    if not torch.isfinite(matrix).all():
        raise CheckpointError(
            f"Tensor {name} of {checkpoint.folder} holds values that are not finite; "
            "fetch the checkpoint again."
        )
    quantized = quantize_weight(matrix, scheme)
    packed = pack_int4(quantized.qdata) if scheme.bits == 4 else quantized.qdata
    return QuantizedPiece(
        {f"{name}.qdata": packed, f"{name}.scale": quantized.scale},
        _energy(matrix),
        _energy(matrix - quantized.dequantize()),
    )


def _energy(matrix: torch.Tensor) -> float:
    # Rows in fp32, their sum in fp64: a large matrix in fp64 would double the memory.
    return float(matrix.square().sum(dim=1).sum(dtype=torch.float64))
