"""What a generation reports, whatever the style: events while it runs, then its result."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

import numpy as np

from export.contract.manifest import SpecialTokens

FinishReason = Literal["eos", "length", "cancelled"]


@dataclass(frozen=True)
class PromptEncoded:
    """`done` of `total` tokens that were not yet cached are encoded; `ms` is this chunk's time."""

    done: int
    total: int
    ms: float


@dataclass(frozen=True)
class CanvasStarted:
    """A canvas begins with the random `tokens` `[T]`; `canvas` counts since the session began."""

    canvas: int
    tokens: np.ndarray


@dataclass(frozen=True)
class CanvasDenoised:
    """One denoising step is done; `step` counts up from 1 to at most `max_steps`.

    `tokens` is the next, partly random canvas, `draft` the argmax canvas, `accepted` (bool) where
    `tokens` was sampled and not random, `entropy` in nats; all `[T]`.
    """

    canvas: int
    step: int
    max_steps: int
    tokens: np.ndarray
    draft: np.ndarray
    accepted: np.ndarray
    entropy: np.ndarray
    layers_ms: float
    head_ms: float
    finished: bool


@dataclass(frozen=True)
class CanvasCommitted:
    """A canvas is final: `tokens` `[T]` with padding after the first end token; `is_last`: it ends
    the text."""

    canvas: int
    tokens: np.ndarray
    steps: int
    is_last: bool


Event = PromptEncoded | CanvasStarted | CanvasDenoised | CanvasCommitted


@dataclass(frozen=True)
class StepStats:
    """Times of one denoising step, how many positions it accepted, and their mean entropy (nats,
    over the whole canvas)."""

    layers_ms: float
    head_ms: float
    accepted: int
    mean_entropy: float

    @property
    def ms(self) -> float:
        """Layers and head together."""
        return self.layers_ms + self.head_ms


@dataclass(frozen=True)
class CanvasResult:
    """A committed canvas: its tokens (padding after the first end token) and its steps.

    `converged` tells a canvas that was finished from one that ran out of steps.
    """

    canvas: int
    tokens: tuple[int, ...]
    steps: tuple[StepStats, ...]
    converged: bool


@dataclass(frozen=True)
class GenerationResult:
    """One turn: the committed canvases and what they took.

    `prompt_ms` is the encoding of what was not cached when the turn began, `encode_ms` that of
    committed canvases between one canvas and the next. Times in ms since the call, without what
    `on_event` took: `first_draft_ms` to the end of the first denoising step, `first_commit_ms` to
    the first canvas committed, None where it did not come so far.
    """

    prompt_tokens: int
    canvases: tuple[CanvasResult, ...]
    finish_reason: FinishReason
    special_tokens: SpecialTokens
    prompt_ms: float
    encode_ms: float
    total_ms: float
    first_draft_ms: float | None
    first_commit_ms: float | None
    peak_rss_bytes: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """All committed tokens, whole canvases, as transformers returns them."""
        return tuple(token for canvas in self.canvases for token in canvas.tokens)

    @property
    def answer_tokens(self) -> tuple[int, ...]:
        """The tokens before the first end token."""
        tokens = self.tokens
        ends = (i for i, token in enumerate(tokens) if token in self.special_tokens.eos)
        return tokens[: next(ends, len(tokens))]

    @property
    def new_tokens(self) -> int:
        """Committed tokens that are not padding."""
        return sum(token != self.special_tokens.pad for token in self.tokens)

    @property
    def steps(self) -> tuple[StepStats, ...]:
        """The denoising steps of all committed canvases."""
        return tuple(step for canvas in self.canvases for step in canvas.steps)

    @property
    def steps_per_canvas(self) -> float | None:
        """Mean number of denoising steps of a canvas."""
        return len(self.steps) / len(self.canvases) if self.canvases else None

    @property
    def median_step_ms(self) -> float | None:
        """Median time of a denoising step, layers and head."""
        return statistics.median(step.ms for step in self.steps) if self.steps else None

    @property
    def tokens_per_forward(self) -> float | None:
        """Tokens that are not padding by denoising steps, as transformers defines it."""
        return self.new_tokens / len(self.steps) if self.steps else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens that are not padding by the whole time of the call, encoding included."""
        return 1000 * self.new_tokens / self.total_ms if self.canvases else None
