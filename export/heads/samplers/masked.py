"""Which positions of a masked canvas are filled in a step: by confidence, entropy or margin.

It sees one probability, one entropy and one margin per position, never logits. Everything exports
without `sort` (ExecuTorch has no kernel for it): the rank among M positions is an M x M comparison.
Sources: low-confidence remasking of LLaDA (`generate.py`, arXiv 2502.09992); `alg` = maskgit_plus,
entropy, topk_margin of Dream (`generation_utils.py`, arXiv 2508.15487); the confidence threshold
of Fast-dLLM (arXiv 2505.22618) and SDAR (`low_confidence_dynamic`).
"""

import torch
from torch import Tensor

SETTINGS = ("temperature", "top_p", "top_k", "threshold", "order")
"""Order of the entries of the `settings` [5] fp32 input of the masked head."""

CONFIDENCE, ENTROPY, MARGIN = 0, 1, 2
"""Values of `order`."""


def score(confidence: Tensor, entropy: Tensor, margin: Tensor, order: Tensor) -> Tensor:
    """What positions are ranked by, [M] fp32, higher is surer.

    confidence, entropy (nats), margin (difference of the two largest probabilities): [M] fp32;
    order: [1] fp32, see `CONFIDENCE`, `ENTROPY`, `MARGIN`.
    """
    by_entropy = torch.where(order == float(ENTROPY), -entropy, confidence)
    return torch.where(order == float(MARGIN), margin, by_entropy)


def accept(score: Tensor, quota: Tensor, threshold: Tensor) -> Tensor:
    """The `quota` positions of the highest score, and all with a score over `threshold`.

    Equal scores: the lower index first. score: [M] fp32; quota: [1] int64; threshold: [1] fp32.
    Returns [M] bool.
    """
    rows = score.shape[0]
    own = score.view(rows, 1)
    other = score.view(1, rows)
    positions = torch.arange(rows)
    earlier = positions.view(1, rows) < positions.view(rows, 1)
    comes_before = (other > own) | ((other == own) & earlier)
    rank = comes_before.to(torch.int64).sum(dim=1)
    return (rank < quota) | (score > threshold)
