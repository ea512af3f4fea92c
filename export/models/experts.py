"""Mixture-of-experts feed-forward blocks that export without dropping a token.

Which form a model takes is decided by `export.families.expert_choice`; routing belongs to the
model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from export.models.weights import integers_like


@torch.library.custom_op(
    "pocket_diffusion::chosen_rows", mutates_args=(), schema="(Tensor weights) -> Tensor"
)
def chosen_rows(weights: Tensor) -> Tensor:
    """Where `weights` `[R, 1]` is not zero, as `[n, 2]` int64 in ascending order: `aten::nonzero`.

    Under tracing the result has all R rows. So a graph is exported with static shapes, which are
    upper bounds, and every later row must come from its own row alone. A backend that makes use of
    it replaces this operator by `nonzero` and checks that: see
    export/backends/xnnpack/dynamic_rows.py.
    """
    return torch.nonzero(weights)


@chosen_rows.register_fake
def _(weights: Tensor) -> Tensor:
    return weights.new_empty((weights.shape[0], 2), dtype=torch.int64)


@torch.library.custom_op(
    "pocket_diffusion::expert_body",
    mutates_args=(),
    schema="(Tensor rows, Tensor weights, Tensor total, int body) -> Tensor",
)
def expert_body(rows: Tensor, weights: Tensor, total: Tensor, body: int) -> Tensor:
    """`WeightedExpert` number `body` of those set apart from a graph, for tracing only.

    See export/backends/xnnpack/experts.py, which puts a lowered expert in its place.
    """
    raise RuntimeError("an expert set apart cannot be computed; leave `set_apart` first")


@expert_body.register_fake
def _(rows: Tensor, weights: Tensor, total: Tensor, body: int) -> Tensor:
    return torch.empty_like(total)


class Expert(nn.Module):
    """One gated feed-forward expert; gate and up are one product, as in the checkpoint."""

    def __init__(
        self, hidden_size: int, expert_size: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * expert_size, bias=False, device="meta")
        self.down_proj = nn.Linear(expert_size, hidden_size, bias=False, device="meta")
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map rows `[N, H]` to `[N, H]`."""
        gate_up = self.gate_up_proj(x)
        size = gate_up.shape[-1] // 2
        # Slices are delegated to XNNPACK, a split is not.
        return self.down_proj(self.activation(gate_up[..., :size]) * gate_up[..., size:])


class WeightedExpert(nn.Module):
    """What an expert adds to the running sum of its rows."""

    def __init__(self, expert: Expert) -> None:
        super().__init__()
        self.expert = expert

    def forward(self, rows: Tensor, weights: Tensor, total: Tensor) -> Tensor:
        """Add to `total` `[N, H]` the expert's `rows` `[N, H]` by their `weights` `[N, 1]`."""
        return total + self.expert(rows) * weights


class DenseExperts(nn.Module):
    """Every expert on every row, weighted by the router (zero where not chosen).

    The gate and up products of all experts read the same rows, so they are one product. The down
    products stay apart: one product over all experts would quantize the activations of all of
    them on one scale, which gathered experts do not.
    """

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.num_experts, self.expert_size, self.activation = num_experts, expert_size, activation
        width = num_experts * 2 * expert_size
        self.gate_up_proj = nn.Linear(hidden_size, width, bias=False, device="meta")
        self.down_proj = nn.ModuleList(
            nn.Linear(expert_size, hidden_size, bias=False, device="meta")
            for _ in range(num_experts)
        )
        self.register_buffer("expert_ids", torch.arange(num_experts), persistent=False)

    def forward(self, x: Tensor, top_k_weights: Tensor, top_k_index: Tensor) -> Tensor:
        """Mix experts for rows `x` `[T, H]` by `top_k_weights` and `top_k_index` `[T, K]`."""
        chosen = (top_k_index.unsqueeze(-1) == self.expert_ids).to(x.dtype)
        weights = (chosen * top_k_weights.unsqueeze(-1)).sum(dim=1)  # [T, E]
        size = self.expert_size
        gate_up = self.gate_up_proj(x).view(-1, self.num_experts, 2 * size)
        # Slices are delegated to XNNPACK, a split is not.
        inner = self.activation(gate_up[..., :size]) * gate_up[..., size:]
        inner = inner.view(-1, self.num_experts * size)
        mixed = self.down_proj[0](inner[:, :size]) * weights[:, 0:1]
        for e, down_proj in enumerate(self.down_proj[1:], start=1):
            part = down_proj(inner[:, e * size : (e + 1) * size])
            mixed = mixed + part * weights[:, e : e + 1]
        return mixed


def stack_experts(weight: Tensor) -> Tensor:
    """Turn one 3-D expert weight `[E, N, K]` into the 2-D weight `[E * N, K]`, exactly.

    Rows keep their scales, so this holds for torchao's integer tensors as for plain ones.
    """
    if type(weight) is Tensor:
        return weight.flatten(0, 1)
    parts = (weight.qdata, weight.scale, weight.zero_point)
    qdata, scale, zero_point = (part.flatten(0, 1) for part in parts)
    return integers_like(weight, qdata, scale, zero_point, weight.block_size[1:])


class GatheredExperts(nn.Module):
    """Each expert on the rows routed to it, 0 to T of them, exactly.

    A row of zeros at position T is always chosen, because XNNPACK takes no empty input. An expert's
    result is added to the running sum of its rows, in the order of `DenseExperts`. The sum is a
    registered buffer because the memory planner reuses temporaries under in-place writes; and that
    each expert reads what the one before it wrote keeps a partitioner from merging experts.
    """

    def __init__(self, experts: list[Expert], tokens: int, top_k: int, hidden_size: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.num_experts, self.tokens, self.top_k = len(experts), tokens, top_k
        self._first_apart: int | None = None
        unrouted = torch.zeros(tokens + 1, len(experts))
        unrouted[tokens] = 1.0
        for name, constant in {
            "unrouted": unrouted,
            "zero_row": torch.zeros(1, hidden_size),
            "all_rows": torch.arange(tokens + 1),
            "mixed": torch.zeros(tokens + 1, hidden_size),
        }.items():
            self.register_buffer(name, constant, persistent=False)

    def forward(self, x: Tensor, top_k_weights: Tensor, top_k_index: Tensor) -> Tensor:
        """Mix experts for rows `x` `[T, H]` by `top_k_weights` and `top_k_index` `[T, K]`.

        The experts of one row differ. A weight of zero counts as not chosen, which is the same sum.
        """
        padded = torch.cat([x, self.zero_row])
        weights = torch.scatter(self.unrouted, 1, top_k_index, top_k_weights)
        weights = weights.t().unsqueeze(-1)  # [E, T + 1, 1]
        put = torch.ops.aten.index_put_
        put(self.mixed, [self.all_rows], torch.zeros_like(padded))
        for e in range(self.num_experts):
            own_weights = weights[e]
            rows = chosen_rows(own_weights)[:, 0]
            total = self._add_expert(
                e,
                torch.index_select(padded, 0, rows),
                torch.index_select(own_weights, 0, rows),
                torch.index_select(self.mixed, 0, rows),
            )
            put(self.mixed, [rows], total)
        return self.mixed[: self.tokens].clone()

    def _add_expert(self, e: int, rows: Tensor, weights: Tensor, total: Tensor) -> Tensor:
        if self._first_apart is not None:
            return expert_body(rows, weights, total, self._first_apart + e)
        return WeightedExpert(self.experts[e])(rows, weights, total)

    @contextmanager
    def set_apart(self, first: int) -> Iterator[list[Expert]]:
        """Hide the experts from tracing, each behind an `expert_body` counted from `first`.

        Yields the hidden experts. They are back afterwards.
        """
        experts, self.experts = self.experts, nn.ModuleList()
        self._first_apart = first
        try:
            yield list(experts)
        finally:
            self.experts, self._first_apart = experts, None
