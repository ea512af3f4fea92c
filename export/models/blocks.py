"""What the model graphs are put together from: norms, rotary embedding, activations, masks.

Written so that XNNPACK takes all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MASKED = -1e9  # added to a score before softmax; exp underflows to an exact zero in fp32


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


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding at fixed positions, in the half-split convention.

    cos, sin: of the angles, `[T, 1, head size / 2]`.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, frequencies: Tensor) -> Rotary:
        """That of `positions` `[T]` under `frequencies` `[head size / 2]`."""
        angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
        return cls(torch.cos(angles).unsqueeze(1), torch.sin(angles).unsqueeze(1))

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate `[T, heads, head size]`."""
        half = x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]  # slices are delegated, a split is not
        return torch.cat(
            [first * self.cos - second * self.sin, second * self.cos + first * self.sin], dim=-1
        )


def rotary_frequencies(head_dim: int, theta: float, fraction: float = 1.0) -> Tensor:
    """Rotary frequencies `[head_dim / 2]`: of the first `fraction` of the pairs, zero beyond.

    Source: `_compute_default_rope_parameters` and `_compute_proportional_rope_parameters` in
    transformers' `modeling_rope_utils.py`; proportional ones are padded, not compressed.
    """
    rotated = int(fraction * head_dim // 2)
    exponents = torch.arange(0, 2 * rotated, 2, dtype=torch.float) / head_dim
    frequencies = torch.zeros(head_dim // 2)
    frequencies[:rotated] = 1.0 / theta**exponents
    return frequencies
