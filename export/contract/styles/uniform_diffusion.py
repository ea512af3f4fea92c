"""Uniform diffusion: every position of a canvas stays open, noise is a random token.

Source of the sampler and its defaults: transformers 5.23,
`models/diffusion_gemma/generation_diffusion_gemma.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from export.contract.styles.base import SamplerSettings, Style, require, set_whole

if TYPE_CHECKING:
    from export.contract.manifest import Decoding, ModelInfo


@dataclass(frozen=True)
class UniformDiffusionSettings(SamplerSettings):
    """The entropy-bound sampler's settings; the defaults are those of transformers.

    Temperature falls linearly from `t_max` to `t_min` over `max_steps`; positions are accepted in
    the order of their entropy while its running sum stays within `entropy_bound` nats; a canvas is
    finished when its argmax did not change for `stability_threshold` steps and its mean entropy is
    below `confidence_threshold` nats (0 never stops early). Raises InputError for a value out of
    range.
    """

    max_steps: int = 48
    t_min: float = 0.4
    t_max: float = 0.8
    entropy_bound: float = 0.1
    stability_threshold: int = 1
    confidence_threshold: float = 0.005

    def __post_init__(self) -> None:
        set_whole(self, "max_steps", "stability_threshold")
        require(self.max_steps >= 1, "max_steps", self.max_steps, "at least 1")
        require(self.stability_threshold >= 0, "stability_threshold", self.stability_threshold,
                "at least 0")  # fmt: skip
        require(self.t_min >= 0 and math.isfinite(self.t_min), "t_min", self.t_min, "at least 0")
        require(self.t_max >= self.t_min and self.t_max > 0 and math.isfinite(self.t_max),
                "t_max", self.t_max, f"more than 0 and at least t_min ({self.t_min})")  # fmt: skip
        require(self.entropy_bound >= 0, "entropy_bound", self.entropy_bound, "at least 0")
        require(self.confidence_threshold >= 0, "confidence_threshold",
                self.confidence_threshold, "at least 0")  # fmt: skip


class UniformDiffusion(Style):
    """See this module."""

    name = "uniform_diffusion"
    sampler = "entropy_bound"
    settings = UniformDiffusionSettings
    layers_inputs = ("tokens", "start", "denoise", "signal")
    head_inputs = (
        "hidden",
        "canvas",
        "previous_argmax",
        "stable_steps",
        "step",
        "settings",
        "uniform",
        "random_tokens",
        "targets",
    )
    head_outputs = (
        "next_canvas",
        "argmax",
        "entropy",
        "accepted",
        "stable_steps",
        "finished",
        "target_log_prob",
        "signal",
    )
    has_fixed_rows = True
    values_per_logit = 8
    live_rows = 9.0

    def usual_canvases(self, new_tokens: int, canvas_length: int) -> int:
        """See `Style`. One: its canvases are long."""
        return 1

    def usual_steps(self, steps: int, canvas_length: int) -> int:
        """See `Style`. It denoises any position in any step."""
        return steps

    def decoding_problem(self, info: ModelInfo, decoding: Decoding | None) -> str | None:
        """See `Style`. Its lengths are those of the programs."""
        return None
