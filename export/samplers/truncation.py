"""Top-k and top-p without `sort`: the lowest logit that either keeps, found by bisection.

It sees logits of a whole vocabulary and knows nothing of sampling. ExecuTorch has no kernel for
`sort`; the number (or the mass) of tokens at or above a threshold is one pass. Definitions:
`TopKLogitsWarper` and `TopPLogitsWarper` of transformers (`generation/logits_process.py`).
"""

import torch
from torch import Tensor

STEPS = 26
"""Halvings of the range that is searched: 40 nats / 2^26 are 6e-7, the rounding of a logit."""

RANGE_NATS = 40.0
"""What lies farther under the best token has no mass: exp(-40) = 4e-18."""


def distances_kept(distance: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Largest distance from the best logit that top-k, then top-p keep, [M, 1].

    Tokens closer to one another than the resolution (6e-7 nats) are kept or dropped together, as
    ties are by top-k; tokens more than 40 nats under the best, which have no mass, may be kept.

    Args:
        distance: [M, V] fp32, how far each (tempered) logit lies under its row's largest, nats.
        top_p: [1] fp32; the smallest set of the likeliest tokens whose mass reaches it is kept.
            1 or more: off.
        top_k: [1] fp32; as many of the likeliest tokens are kept. 0 or less: off.
    """
    ones = torch.ones_like(distance)
    by_count = _reach(distance, ones, torch.clamp(top_k, min=1.0).reshape(1, 1))
    by_count = torch.where(top_k > 0.0, by_count, torch.full_like(by_count, float("inf")))
    mass = torch.where(distance <= by_count, torch.exp(-distance), torch.zeros_like(distance))
    by_mass = _reach(distance, mass, top_p.reshape(1, 1) * mass.sum(dim=1, keepdim=True))
    by_mass = torch.where(top_p < 1.0, by_mass, torch.full_like(by_mass, float("inf")))
    return torch.minimum(by_count, by_mass)


def _reach(distance: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
    """The least distance within which the weights sum to at least `wanted`, [M, 1]."""
    low = torch.zeros_like(distance[:, :1])
    high = low + RANGE_NATS
    for _ in range(STEPS):
        middle = (low + high) * 0.5
        inside = torch.where(distance <= middle, weight, torch.zeros_like(weight))
        reached = inside.sum(dim=1, keepdim=True) >= wanted
        high = torch.where(reached, middle, high)
        low = torch.where(reached, low, middle)
    return high
