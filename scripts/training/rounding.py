"""Rounding to integers in training and measuring, as int4 checkpoints and dynamic int8 do it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Weights = dict[str, Tensor]


def is_matrix(name: str, value: Tensor) -> bool:
    """Say whether a tensor is a linear layer's or the experts' (what int4 will quantize)."""
    return value.ndim >= 2 and "router" not in name and "embed_tokens" not in name


def fake_int(weight: Tensor, bits: int, group: int) -> Tensor:
    """Round to symmetric integers per group along the last axis; gradients pass straight through.

    The rule is torchao's `MappingType.SYMMETRIC` with a bf16 scale.
    """
    grouped = weight.detach().unflatten(-1, (-1, group))
    largest = grouped.abs().amax(-1, keepdim=True)
    scale = (largest / ((2**bits - 1) / 2)).clamp_min(1e-9).bfloat16().float()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rounded = (grouped / scale).round().clamp(low, high) * scale
    return weight + (rounded.flatten(-2) - weight.detach())


def quantized_weights(weights: Weights) -> Weights:
    """The weights as int4 (linears, experts; group 32) and int8 (embedding) round them."""
    result = dict(weights)
    for name, value in weights.items():
        if is_matrix(name, value):
            result[name] = fake_int(value, 4, 32)
        elif name == "embed_tokens.weight":
            result[name] = fake_int(value, 8, value.shape[-1])
    return result


class Int8Activations(TorchFunctionMode):
    """Round the input of every linear to int8 per token, asymmetric, as torchao's dynamic int8.

    Linears whose weight is in `spared` (router and head) keep their input.
    """

    def __init__(self, spared: list[Tensor]) -> None:
        super().__init__()
        self.spared = {id(weight) for weight in spared}

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is F.linear and id(args[1]) not in self.spared:
            args = (fake_int8_per_token(args[0]), *args[1:])
        return function(*args, **(kwargs or {}))


def fake_int8_per_token(x: Tensor) -> Tensor:
    """Round to 256 levels between each token's smallest and largest value (zero included)."""
    low, high = (x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0))
    scale = ((high - low) / 255).clamp_min(1e-9)
    zero = -128 - (low / scale).round()
    return ((x / scale).round() + zero).clamp(-128, 127).sub(zero) * scale
