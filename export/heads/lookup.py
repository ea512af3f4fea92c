"""An embedding table in the form that the runtime's lookup kernels read rightly."""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization import IntxUnpackedToInt8Tensor


def lookup_table(table: Tensor) -> Tensor:
    """The table `[V, H]` for looking rows up: weight-only, with fp32 scales.

    ExecuTorch's 4-bit embedding kernel reads bf16 scales as if they were fp32 and gives garbage.
    """
    if not isinstance(table, IntxUnpackedToInt8Tensor):
        return table
    return IntxUnpackedToInt8Tensor(
        qdata=table.qdata,
        scale=table.scale.to(torch.float32),
        zero_point=table.zero_point,
        target_dtype=table.target_dtype,
        block_size=table.block_size,
        dtype=table.dtype,
        activation_quantization=None,
    )
