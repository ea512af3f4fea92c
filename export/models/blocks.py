"""What the model graphs are put together from: norms, rotary embedding, activations, masks.

Written so that XNNPACK takes all of it; config readers raise in one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import CheckpointError

MASKED = -1e9  # added to a score before softmax; exp underflows to an exact zero in fp32


def field(section: dict[str, Any], path: str, kind: type | tuple[type, ...]) -> Any:
    """The entry of config.json that the last part of `path` names; CheckpointError if it is not
    there or of another type."""
    value = section.get(path.rsplit(".", 1)[-1])
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CheckpointError(
            f"config.json has {path} = {value!r}; a checkpoint of this model must state it"
        )
    return value


def positive(section: dict[str, Any], path: str) -> int:
    """The same for a size."""
    value = field(section, path, int)
    if value <= 0:
        raise CheckpointError(f"config.json has {path} = {value}; it must be positive")
    return value


def positive_number(section: dict[str, Any], path: str) -> float:
    """The same for a number that need not be whole; finite."""
    value = field(section, path, (int, float))
    if not 0 < value < math.inf:
        raise CheckpointError(f"config.json has {path} = {value}; it must be positive")
    return float(value)


def refuse_variant(
    section: dict[str, Any], path: str, allowed: set[Any], *, default: Any = None
) -> None:
    """Raise CheckpointError for a variant that the graph does not have."""
    value = section.get(path.rsplit(".", 1)[-1], default)
    if isinstance(value, list | dict) or value not in allowed:
        raise CheckpointError(
            f"config.json has {path} = {value!r}; supported: {sorted(map(repr, allowed))}"
        )


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh approximation through a sigmoid, equal to 5e-7 in fp32.

    XNNPACK lowers `gelu(approximate="tanh")` as the erf form, which is 4.7e-4 off; and
    0.5 * (1 + tanh(z)) = sigmoid(2 z) with z = sqrt(2 / pi) * (x + 0.044715 x^3).
    """
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), which XNNPACK takes in these two parts."""
    return x * torch.sigmoid(x)


class RMSNorm(nn.Module):
    """Root-mean-square normalization over the last dimension, with or without a weight.

    The mean is a product with a constant row, which every backend delegates; XNNPACK refuses a
    `mean` over one dimension, and that would cut a layer into a dozen delegates.
    """

    def __init__(self, size: int, eps: float, *, weighted: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, device="meta")) if weighted else None
        self.register_buffer("mean_row", torch.full((1, size), 1.0 / size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `[..., size]`."""
        mean_square = nn.functional.linear(x * x, self.mean_row)
        normed = x * torch.rsqrt(mean_square + self.eps)
        return normed if self.weight is None else normed * self.weight


class FinalNorm(nn.Module):
    """The norm behind the last layer, as a stage of its own."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(size, eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalize `[1, N, size]`."""
        return self.norm(hidden)


class GatedMLP(nn.Module):
    """The gated feed-forward block: down(activation(gate(x)) * up(x))."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: Callable[[Tensor], Tensor] = gelu_tanh,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False, device="meta")
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False, device="meta")
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., H]` to `[..., H]`."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Rotary:
    """Rotary embedding at fixed positions, in the half-split convention."""

    def __init__(self, positions: Tensor, frequencies: Tensor) -> None:
        angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
        self.cos, self.sin = torch.cos(angles).unsqueeze(1), torch.sin(angles).unsqueeze(1)

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor) -> Rotary:
        """The same from its cosines and sines, `[T, 1, head size / 2]`."""
        rotary = cls.__new__(cls)
        rotary.cos, rotary.sin = cos, sin
        return rotary

    def turn(self, x: Tensor) -> Tensor:
        """Rotate `[T, heads, head size]`."""
        half = x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]  # slices are delegated, a split is not
        return torch.cat(
            [first * self.cos - second * self.sin, second * self.cos + first * self.sin], dim=-1
        )
