"""Muon for matrices and AdamW for the rest, with one schedule of the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.training.rounding import Weights, is_matrix


@dataclass(frozen=True)
class Recipe:
    """What decides the training run, with the seed.

    The learning rate warms up, holds, and falls linearly to zero over the last `decay_share` of
    the steps. From the share `int4_from` on, every second step sees its weights rounded to int4
    (straight-through gradients), so that the result is good in fp32 and in int4.
    """

    seed: int = 0
    steps: int = 2000
    warmup_steps: int = 100
    decay_share: float = 0.3
    int4_from: float = 0.6
    matrix_rate: float = 3e-3
    vector_rate: float = 3e-3
    weight_decay: float = 0.05


def orthogonalized(update: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return the nearest semi-orthogonal matrices [N, R, C] by Newton-Schulz (Muon, 2024)."""
    x = update.to(dtype)
    flipped = x.shape[-2] > x.shape[-1]
    x = x.mT if flipped else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if flipped else x).float()


class Optimizer:
    """Muon for matrices, AdamW for everything else, with one learning-rate factor for both.

    `dtype` is that of Muon's products: without bf16 instructions a CPU is faster in fp32.
    """

    def __init__(
        self, weights: Weights, recipe: Recipe, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.recipe, self.dtype = recipe, dtype
        self.matrices: dict[tuple[int, ...], list[str]] = {}
        self.vectors = []
        for name, value in weights.items():
            if is_matrix(name, value):
                self.matrices.setdefault(tuple(value.shape[-2:]), []).append(name)
            else:
                self.vectors.append(name)
        self.momentum = {name: torch.zeros_like(value) for name, value in weights.items()}
        self.square = {name: torch.zeros_like(weights[name]) for name in self.vectors}

    @torch.no_grad()
    def update(self, weights: Weights, step: int, factor: float) -> None:
        """Change the weights in place from their gradients; `step` counts from 0."""
        recipe = self.recipe
        for shape, names in self.matrices.items():
            stack = []
            for name in names:
                grad, momentum = weights[name].grad, self.momentum[name]
                momentum.lerp_(grad, 0.05)
                stack.append(grad.lerp(momentum, 0.95).view(-1, *shape))
            direction = orthogonalized(torch.cat(stack), self.dtype)
            direction = direction * (0.2 * math.sqrt(max(shape)))
            rate = recipe.matrix_rate * factor
            for name, change in zip(names, direction.split([len(s) for s in stack]), strict=True):
                weights[name].mul_(1 - rate * recipe.weight_decay)
                weights[name].sub_(change.view(weights[name].shape), alpha=rate)
        rate = recipe.vector_rate * factor
        for name in self.vectors:
            grad, momentum, square = weights[name].grad, self.momentum[name], self.square[name]
            if grad is None:  # the last layer's scalar in encoder mode reaches no output
                continue
            momentum.lerp_(grad, 0.1)
            square.lerp_(grad * grad, 0.02)
            corrected = momentum / (1 - 0.9 ** (step + 1))
            spread = (square / (1 - 0.98 ** (step + 1))).sqrt() + 1e-8
            weights[name].sub_(corrected / spread, alpha=rate)


def rate_factor(step: int, recipe: Recipe) -> float:
    """Warm up, hold, then decay linearly to zero over the last `decay_share` of the run."""
    left = (recipe.steps - step) / max(1, recipe.steps * recipe.decay_share)
    return min(1.0, (step + 1) / recipe.warmup_steps, left)
