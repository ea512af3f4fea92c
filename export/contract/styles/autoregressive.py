"""Autoregressive: one token a step, each behind the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from export.contract.styles.base import SamplerSettings, Style, check_truncation, set_whole

if TYPE_CHECKING:
    from export.contract.manifest import Decoding, ModelInfo


@dataclass(frozen=True)
class AutoregressiveSettings(SamplerSettings):
    """How the next token is drawn: temperature 0 is greedy; top_p 1 and top_k 0 cut nothing off.

    Raises InputError for a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        set_whole(self, "top_k")
        check_truncation(self.temperature, self.top_p, self.top_k)


class Autoregressive(Style):
    """See this module."""

    name = "autoregressive"
    sampler = "autoregressive"
    settings = AutoregressiveSettings
    layers_inputs = ("tokens", "start", "block_length")
    head_inputs = ("hidden", "row", "settings", "uniform")
    head_outputs = ("token", "log_prob", "entropy")
    step_is_token = True
    walks_vocabulary = False
    values_per_logit = 10
    held_logits = 8

    def decoding_problem(self, info: ModelInfo, decoding: Decoding | None) -> str | None:
        """See `Style`. A canvas is one token, and the row at p is that of the token at p + 1."""
        if decoding is None:
            return "does not say how (decoding)"
        if info.canvas_length != 1:
            return f"has a canvas of {info.canvas_length} tokens, expected 1"
        if decoding.shift != 1:
            return f"has a token shift of {decoding.shift}, expected 1"
        return None
