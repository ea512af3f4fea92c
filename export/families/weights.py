"""The weights of a model as a list: names, shapes, and what each is multiplied by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

Part = Literal[
    "embedding", "per-layer embedding", "attention", "mlp", "experts", "router", "head", "other"
]
PARTS: tuple[Part, ...] = (
    "embedding", "per-layer embedding", "attention", "mlp", "experts", "router", "head", "other",
)  # fmt: skip

Use = Literal["lookup", "product", "experts", "elementwise"]
"""lookup: rows are read by token. product: multiplies every row. experts: `[E, N, K]`, of which a
row is multiplied by some. elementwise: norms, scales, biases."""


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint.

    name: as the checkpoint has it. shape: `[..., out, in]`. kind: the type of layer that it is of,
    such as `sliding_attention`; empty for what is not of a layer. runs: how often it is multiplied
    in one pass. active: of experts, how many a row goes through.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    use: Use
    kind: str = ""
    runs: int = 1
    active: int = 0

    @property
    def parameters(self) -> int:
        """Numbers in it."""
        return prod(self.shape)

    @property
    def active_parameters(self) -> int:
        """Numbers that one token is multiplied by: of experts, those of the chosen ones."""
        if self.use != "experts":
            return self.parameters
        return self.parameters // self.shape[0] * self.active


def linear(
    name: str,
    shape: tuple[int, int],
    part: Part,
    kind: str = "",
    *,
    bias: bool = False,
    runs: int = 1,
) -> list[Weight]:
    """The weight `[out, in]` of a linear layer, and its bias if it has one."""
    found = [Weight(f"{name}.weight", shape, part, "product", kind, runs)]
    if bias:
        found.append(Weight(f"{name}.bias", shape[:1], part, "elementwise", kind))
    return found


def norms(
    prefix: str, names: Sequence[str], size: int, kind: str = "", part: Part = "other"
) -> list[Weight]:
    """The weights `[size]` of norms."""
    return [Weight(f"{prefix}{name}.weight", (size,), part, "elementwise", kind) for name in names]


def gated_mlp(prefix: str, hidden: int, inner: int, kind: str) -> list[Weight]:
    """The three products of a gated feed-forward block."""
    found: list[Weight] = []
    for name in ("gate_proj", "up_proj"):
        found += linear(f"{prefix}{name}", (inner, hidden), "mlp", kind)
    return found + linear(f"{prefix}down_proj", (hidden, inner), "mlp", kind)
