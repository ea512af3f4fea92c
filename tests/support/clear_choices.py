"""Tokens compared on any machine: no near tie may decide between them.

fp32 sums in another order differ, and which order a product takes depends on the processor, the
number of rows and of threads. A reference asserts that each of its choices is clear, so that tokens
that differ are an error and never a rounding. A case that fails on this needs another prompt or
seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CLEAR = 1e-5
"""Least distance of a probability or logit of a tiny model from another outcome. Between fp32 with
AVX-512, with AVX2, without either and fp64 they differ by 1e-6 and less in 99 of 100 cases."""


def assert_clear(margins: Tensor) -> None:
    """margins: how far each choice is from another outcome."""
    assert bool((margins > CLEAR).all()), f"a near tie decides, by {float(margins.min())}"


def highest(scores: Tensor, count: int) -> Tensor:
    """Positions `[count]` of the highest scores; those not to be chosen are at minus infinity."""
    ordered = scores.sort(descending=True).values
    if 0 < count < len(ordered):
        assert_clear(ordered[count - 1] - ordered[count])
    return scores.topk(count).indices


def greedy(model: Any, prompt: Tensor, count: int, **options: Any) -> list[int]:
    """The new tokens of a transformers model's greedy `generate()` for `prompt` `[1, T]`."""
    output = model.generate(
        prompt, do_sample=False, max_new_tokens=count, return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip
    first, second = torch.cat(output.logits).topk(2).values.unbind(-1)
    assert_clear(first - second)
    return output.sequences[0, prompt.shape[1] :].tolist()


def over(scores: Tensor, threshold: float) -> Tensor:
    """Which scores are higher, bool."""
    assert_clear((scores - threshold).abs())
    return scores > threshold
