"""Top-k and top-p without `sort`: the least weight that both keep, found by bisection.

It sees the weights of a whole vocabulary and knows nothing of sampling. ExecuTorch has no kernel
for `sort`; how many tokens weigh at least so much, and their sum, is one pass. Every operation over
the vocabulary is one that XNNPACK has. Definitions: `TopKLogitsWarper`, then `TopPLogitsWarper`, of
transformers (`generation/logits_process.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 24
"""Halvings of the searched range: 30 nats / 2^24 are 2e-6, the rounding of a logit of 30."""

RANGE_NATS = 30.0
"""What lies farther under the best token is kept or not without effect: exp(-30) = 1e-13."""

_STEEP = 1.0e30
"""Turns a difference of two weights, however small, into more than 1, to be cut there."""


def truncate(weights: Tensor, top_p: Tensor, top_k: Tensor, ones: Tensor) -> Tensor:
    """The weights that top-k, then top-p keep; 0 in place of the others. [M, V] -> [M, V].

    Tokens whose logits differ by less than 2e-6 nats are kept or dropped together, as `TopK` keeps
    ties; the best token is always kept.

    Args:
        weights: [M, V] fp32, exp of the (tempered) logits over the largest of the row: the largest
            weight is 1.
        top_p: [1] fp32; the smallest set of the likeliest tokens whose mass reaches it is kept.
            1 or more: off.
        top_k: [1] fp32; as many of the likeliest tokens are kept, and ties. 0 or less: off.
        ones: [1, V] fp32, a buffer of ones: sums are products, which are delegated.
    """
    count = torch.where(top_k > 0.0, top_k, torch.full_like(top_k, 1e9)).view(1, 1)
    weights = weights * _indicator(weights, _threshold(weights, count, ones, by_mass=False))
    share = torch.where(top_p < 1.0, top_p, torch.full_like(top_p, 2.0)).view(1, 1)
    mass = F.linear(weights, ones) * share
    return weights * _indicator(weights, _threshold(weights, mass, ones, by_mass=True))


def _threshold(weights: Tensor, wanted: Tensor, ones: Tensor, *, by_mass: bool) -> Tensor:
    """The largest threshold [M, 1] that leaves `wanted` tokens, or so much mass; 0 if none does."""
    high = F.linear(weights, ones) * 0.0  # logarithms of the threshold, [M, 1]
    lowest = high - RANGE_NATS
    low = lowest
    for _ in range(STEPS):
        middle = (low + high) * 0.5
        kept = _indicator(weights, torch.exp(middle))
        if by_mass:
            kept = kept * weights
        reached = F.hardtanh((F.linear(kept, ones) - wanted) * _STEEP + 1.0, 0.0, 1.0)
        low = low + (middle - low) * reached
        high = middle + (high - middle) * reached
    # Where nothing was reached, `low` has not moved, and all is kept.
    moved = F.hardtanh((low - lowest) * _STEEP, 0.0, 1.0)
    return torch.exp(low) * moved


def _indicator(weights: Tensor, threshold: Tensor) -> Tensor:
    """1 where a weight is at least the threshold, else 0."""
    return F.hardtanh((weights - threshold) * _STEEP + 1.0, 0.0, 1.0)
