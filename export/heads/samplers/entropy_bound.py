"""The entropy-bound sampler: what of a canvas to keep, what to draw again, when to stop.

It sees entropies and tokens, never logits; how they are computed is the head's business. Everything
here exports without `sort` (ExecuTorch has no kernel for it): the order of T positions is a T x T
comparison. Source: `EntropyBoundSampler`, `StableAndConfidentStoppingCriteria` and
`LinearTemperatureScheduleLogitsProcessor` of transformers
(`models/diffusion_gemma/generation_diffusion_gemma.py`); the bound is from arXiv 2505.24857.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SETTINGS = (
    "max_steps",
    "t_min",
    "t_max",
    "entropy_bound",
    "stability_threshold",
    "confidence_threshold",
)
"""Order of the entries of the `settings` [6] fp32 input of the head, which is that of the fields of
`export.contract.styles.uniform_diffusion.UniformDiffusionSettings`."""


class SamplerDecision(NamedTuple):
    """What one denoising step decides for a canvas."""

    next_canvas: Tensor  # [1, T] int64
    accepted: Tensor  # [1, T] int64, 0 or 1
    stable_steps: Tensor  # [1] int64
    finished: Tensor  # [1] int64, 0 or 1


def temperature(settings: Tensor, step: Tensor) -> Tensor:
    """Temperature of a step [1] fp32; `step` [1] int64 counts the steps that REMAIN, N..1."""
    max_steps, t_min, t_max = settings[0:1], settings[1:2], settings[2:3]
    return t_min + (t_max - t_min) * (step.to(torch.float32) / max_steps)


def accept(entropy: Tensor, entropy_bound: Tensor) -> Tensor:
    """Positions whose joint mutual information is within the bound, [1, T] bool.

    With the positions in ascending order of entropy (ties: lower position first), a position is
    accepted when the entropies before it sum to at most `entropy_bound`: transformers'
    `cumsum(sorted) - sorted <= bound`.

    entropy: [1, T] nats; entropy_bound: [1].
    """
    own = entropy.reshape(-1, 1)
    other = entropy.reshape(1, -1)
    positions = torch.arange(entropy.shape[-1])
    earlier = positions.reshape(1, -1) < positions.reshape(-1, 1)
    comes_before = (other < own) | ((other == own) & earlier)
    sum_before = torch.where(comes_before, other, torch.zeros_like(other)).sum(dim=1)
    return (sum_before <= entropy_bound).reshape(1, -1)


def decide(
    sample: Tensor,
    argmax: Tensor,
    entropy: Tensor,
    previous_argmax: Tensor,
    stable_steps: Tensor,
    settings: Tensor,
    random_tokens: Tensor,
) -> SamplerDecision:
    """One step of acceptance, renoising and the stable-and-confident stop.

    All of [1, T] (int64 but for `entropy`, fp32 nats), `stable_steps` [1] int64, `settings` [6].
    `stable_steps` counts the steps in a row whose argmax canvas equals the one before: transformers
    compares with a history of `stability_threshold` canvases, which is the same condition.
    """
    accepted = accept(entropy, settings[3:4])
    next_canvas = torch.where(accepted, sample, random_tokens)
    unchanged = (argmax != previous_argmax).to(torch.int64).sum(dim=1) == 0
    stable = torch.where(unchanged, stable_steps + 1, torch.zeros_like(stable_steps))
    is_stable = stable.to(torch.float32) >= settings[4:5]
    is_confident = entropy.mean(dim=1) < settings[5:6]
    return SamplerDecision(
        next_canvas=next_canvas,
        accepted=accepted.to(torch.int64),
        stable_steps=stable,
        finished=(is_stable & is_confident).to(torch.int64),
    )
