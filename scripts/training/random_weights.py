"""Random bf16 values of any part of any weight, from a seed, the weight's name and the place in it.

It knows no files, and of models only what a weight's name says about its usual values.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch
from scipy.special import ndtri

CHUNK = 2**22
"""Values that are drawn at once, and on their own: those of a weight do not depend on its file."""


def chunks(elements: int) -> range:
    """The numbers of a weight's chunks, the last of which may be shorter."""
    return range(-(-elements // CHUNK))


def values(seed: int, name: str, shape: tuple[int, ...], chunk: int, *, std: float) -> torch.Tensor:
    """Chunk number `chunk` of the flattened weight, bf16 `[CHUNK]` or what is left of it.

    Norms and scales are near one, a layer's scalar is one, a router's logits have a standard
    deviation of one (its inputs have the length one), all else has mean 0 and `std`.
    """
    elements = int(np.prod(shape))
    count = min(CHUNK, elements - chunk * CHUNK)
    mean, spread = _distribution(name, len(shape), std)
    digest = hashlib.sha256(f"{seed}/{name}/{chunk}".encode()).digest()
    # The fastest generator of numpy; sixteen bits of it choose one of the 65,536 quantiles.
    generator = np.random.Generator(np.random.SFC64(np.frombuffer(digest, np.uint32)))
    drawn = generator.integers(0, 2**16, count, dtype=np.uint16)
    return torch.from_numpy(_quantiles(mean, spread)[drawn].view(np.int16)).view(torch.bfloat16)


def _distribution(name: str, axes: int, std: float) -> tuple[float, float]:
    if name.endswith(("layer_scalar", "position_embedding_table")):
        return 1.0, 0.0
    if name.endswith("router.proj.weight"):
        return 0.0, 1.0
    is_gain = "norm" in name or name.endswith((".scale", ".per_expert_scale", ".ln_f.weight"))
    return (1.0, 0.05) if axes == 1 and is_gain else (0.0, std)


@functools.cache
def _quantiles(mean: float, std: float) -> np.ndarray:
    """The normal distribution's quantiles at (i + 1/2) / 65,536, as the bits of bf16."""
    exact = mean + std * ndtri((np.arange(2**16) + 0.5) / 2**16)
    return torch.from_numpy(exact).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
