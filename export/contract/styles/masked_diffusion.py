"""Masked diffusion: a canvas of masks, whose positions are accepted once and stay.

Sources of the samplers: LLaDA (arXiv 2502.09992), SDAR (arXiv 2510.06303), Fast-dLLM
(arXiv 2505.22618), Dream (arXiv 2508.15487).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from export.contract.styles.base import (
    SamplerSettings,
    Style,
    check_truncation,
    require,
    set_whole,
)

if TYPE_CHECKING:
    from export.contract.manifest import Decoding, ModelInfo

NO_THRESHOLD = 2.0
"""Above every score: the number of tokens a step is fixed."""


@dataclass(frozen=True)
class MaskedDiffusionSettings(SamplerSettings):
    """How a canvas is filled.

    `steps_per_canvas` steps accept equally many positions each (LLaDA's `get_num_transfer_tokens`),
    those of the best score; and a step accepts all positions whose score is above `threshold`, as
    SDAR and Fast-dLLM do (2: none). `order` says what the score is: 0 the sampled token's
    probability, 1 minus the entropy, 2 the margin between the two best probabilities. Temperature 0
    is greedy; top_p 1 and top_k 0 cut nothing off. prefix_cache: whether a model that sees
    everything keeps the keys and values of a canvas's first step (1) or runs all rows in each (0).
    Raises InputError for a value out of range.
    """

    steps_per_canvas: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    threshold: float = NO_THRESHOLD
    order: int = 0
    prefix_cache: int = 1

    def __post_init__(self) -> None:
        set_whole(self, "steps_per_canvas", "top_k", "order", "prefix_cache")
        require(self.steps_per_canvas >= 1, "steps_per_canvas", self.steps_per_canvas, "at least 1")
        check_truncation(self.temperature, self.top_p, self.top_k)
        require(math.isfinite(self.threshold), "threshold", self.threshold,
                f"a number ({NO_THRESHOLD}: off)")  # fmt: skip
        require(self.order in (0, 1, 2), "order", self.order,
                "0 (confidence), 1 (entropy) or 2 (margin)")  # fmt: skip
        require(self.prefix_cache in (0, 1), "prefix_cache", self.prefix_cache, "0 or 1")

    @classmethod
    def array_fields(cls) -> tuple[str, ...]:
        """See `SamplerSettings`; the loop keeps the others to itself."""
        return super().array_fields()[1:6]


class MaskedDiffusion(Style):
    """See this module."""

    name = "masked_diffusion"
    sampler = "masked"
    masks = True
    settings = MaskedDiffusionSettings
    layers_inputs = ("tokens", "start", "block_length")
    head_inputs = ("hidden", "rows", "settings", "quota", "uniform")
    head_outputs = ("token", "accepted", "score", "entropy")
    loads_head_whole = False
    head_rows_beyond_canvas = 1
    values_per_logit = 7

    def decoding_problem(self, info: ModelInfo, decoding: Decoding | None) -> str | None:
        """See `Style`. A step's rows fit in one call, and canvases divide blocks."""
        if decoding is None:
            return "does not say how (decoding)"
        if decoding.mask_token is None:
            return "names no mask token"
        block = decoding.block_length
        if block % info.canvas_length:
            return (
                f"has a canvas of {info.canvas_length} tokens, which does not divide its block of "
                f"{block}"
            )
        needed = block + decoding.shift if block else info.maximum_context
        if decoding.prefill_length < min(needed, info.maximum_context):
            return (
                f"takes {decoding.prefill_length} tokens in one call of its layers, and a "
                f"denoising step needs {needed}"
            )
        return None
