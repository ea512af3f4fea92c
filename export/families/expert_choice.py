"""How a mixture of experts is computed: chosen by estimated time, without torch.

The two ways themselves are `export.models.experts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ExpertComputation = Literal["dense", "gather"]

# Fitted by eye to benchmarks/results/experts.txt (2 threads of a shared x86 machine, XNNPACK, int4
# of group 32), where they are right within 40 %: what both forms spend on products, and the passes
# beside them over values of hidden size, which a gathered value takes part in more of.
INT4_FLOP_PER_MS = 400e6
DENSE_MS_PER_VALUE = 1.3e-6
GATHER_MS_PER_VALUE = 2.0e-6
GATHER_MS_PER_EXPERT = 0.0055


@dataclass(frozen=True)
class ExpertChoice:
    """How the experts are computed, and the estimate that decided it (ms for each layer)."""

    computation: ExpertComputation
    dense_ms: float
    gather_ms: float


def choose_expert_computation(
    *, tokens: int, hidden_size: int, expert_size: int, num_experts: int, top_k: int
) -> ExpertChoice:
    """Pick dense or gathered experts by estimated time of one layer over `tokens` positions.

    dense_ms  = tokens * num_experts * hidden_size
                * (6 * expert_size / INT4_FLOP_PER_MS + DENSE_MS_PER_VALUE)
    gather_ms = tokens * top_k * hidden_size
                * (6 * expert_size / INT4_FLOP_PER_MS + GATHER_MS_PER_VALUE)
                + num_experts * GATHER_MS_PER_EXPERT
    """
    product_ms = 6 * expert_size / INT4_FLOP_PER_MS
    dense_ms = tokens * num_experts * hidden_size * (product_ms + DENSE_MS_PER_VALUE)
    gather_ms = tokens * top_k * hidden_size * (product_ms + GATHER_MS_PER_VALUE)
    gather_ms += num_experts * GATHER_MS_PER_EXPERT
    return ExpertChoice("dense" if dense_ms <= gather_ms else "gather", dense_ms, gather_ms)
