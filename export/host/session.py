"""What a generation is, whatever the model's style: sessions, turns, events, results.

A session is the host's loop over a model: it moves small arrays between layers and head, and
counts; it sees no logits, no weights and no text, and needs no torch. The loops are
`export.host.uniform_diffusion`, `export.host.masked_diffusion` and `export.host.autoregressive`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from export.contract.bundle import ModelInfo, SpecialTokens
from export.host.process import peak_rss_bytes
from quantize.errors import InputError

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


class Session:
    """A conversation with one model: which tokens there are, and how many the KV cache holds.

    One session at a time per model, since the cache is the model's. What a style adds is its
    settings (a dataclass) and its `Turn`. `can_set` names the settings that its program heeds.
    """

    turn_class: type[Turn]

    def __init__(self, model: Any, special_tokens: SpecialTokens, settings: Any) -> None:
        self.model = model
        self.special_tokens = special_tokens
        self.settings = settings
        self.can_set = frozenset(vars(settings))
        self._tokens: list[int] = []
        self._cached = 0
        self._canvases = 0

    @property
    def info(self) -> ModelInfo:
        """The model's sizes."""
        return self.model.info

    @property
    def tokens(self) -> tuple[int, ...]:
        """Every prompt and committed token so far, padding included."""
        return tuple(self._tokens)

    @property
    def cached(self) -> int:
        """How many of `tokens` the KV cache holds: all but the last canvas of the last turn."""
        return self._cached

    @property
    def canvases(self) -> int:
        """Canvases committed since the session began: the random numbers' next canvas index."""
        return self._canvases

    def settings_with(self, changes: Mapping[str, float]) -> Any:
        """The session's settings with some replaced; InputError for an unknown one or its value."""
        if unknown := sorted(changes.keys() - self.can_set):
            raise InputError(
                f"the sampler of this model has no setting {', '.join(unknown)}; it has "
                f"{', '.join(name for name in vars(self.settings) if name in self.can_set)}"
                + "; export it with --truncation for top_p and top_k"
                * hasattr(self.settings, "top_p")
            )
        return replace(self.settings, **changes)

    def truncate(self, length: int) -> None:
        """Forget the tokens behind the first `length`, for instance padding before a next turn.

        Raises InputError if the session is shorter.
        """
        if not 0 <= length <= len(self._tokens):
            raise InputError(f"the session has {len(self._tokens)} tokens; cannot keep {length}")
        del self._tokens[length:]
        self._cached = min(self._cached, length)

    def room(self, prompt_tokens: int = 0) -> int:
        """New tokens, in whole canvases, that fit behind a prompt of so many tokens."""
        info = self.model.info
        free = info.maximum_context - len(self._tokens) - prompt_tokens
        return max(0, free // info.canvas_length) * info.canvas_length

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        seed: int = 0,
        *,
        settings: Any = None,
        force_steps: int | None = None,
        on_event: Callable[[Event], None] | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> GenerationResult:
        """Append `prompt` to the session and generate ceil(max_new_tokens / T) canvases at most.

        Generation ends early after a canvas with an end token. The last canvas is not encoded: the
        next turn does that together with its prompt. `cancel` is asked before every run of the
        model; on True the canvas at work is dropped and what was committed is returned.
        `force_steps` runs exactly so many steps a canvas whatever the stop test says (for timing).
        Any exception leaves the session as it was before the call. Raises InputError, before
        anything runs, for ids out of the vocabulary and for what does not fit in the context.
        """
        settings = settings or self.settings
        prompt = [int(token) for token in prompt]
        canvas_count = self._check(prompt, max_new_tokens, seed)
        before = len(self._tokens), self._canvases
        self._tokens.extend(prompt)
        try:
            turn = self.turn_class(
                self, seed, settings, force_steps, on_event or _ignore, cancel or _never
            )
            return turn.run(len(prompt), canvas_count)
        except BaseException:
            self.truncate(before[0])
            self._canvases = before[1]
            raise

    def _check(self, prompt: list[int], max_new_tokens: int, seed: int) -> int:
        """Returns the number of canvases."""
        info = self.model.info
        for position, token in enumerate(prompt):
            if not 0 <= token < info.vocabulary_size:
                raise InputError(
                    f"token {position} of the prompt has id {token}, the vocabulary ends at "
                    f"{info.vocabulary_size - 1}; use the tokenizer that belongs to the model"
                )
        if not prompt and not self._tokens:
            raise InputError("the prompt is empty; give at least one token")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; give at least 1")
        if not 0 <= seed < 1 << 64:
            raise InputError(f"the seed is {seed}; give an integer from 0 to 2**64 - 1")
        room = self.room(len(prompt))
        if room == 0:
            held = f" after {len(self._tokens)} of earlier turns" if self._tokens else ""
            raise InputError(
                f"the prompt has {len(prompt)} tokens{held}, and with a canvas of "
                f"{info.canvas_length} it exceeds the context of {info.maximum_context}; shorten "
                "it, or export with a larger --maximum-context"
            )
        if max_new_tokens > room:
            raise InputError(
                f"{max_new_tokens} new tokens were asked for, and only {room} fit in the context "
                f"of {info.maximum_context} after {len(self._tokens) + len(prompt)} tokens; "
                "ask for fewer, or export with a larger --maximum-context"
            )
        return self._canvas_count(len(self._tokens) + len(prompt), max_new_tokens)

    def _canvas_count(self, known: int, max_new_tokens: int) -> int:
        """Canvases for so many new tokens behind `known` ones."""
        return -(-max_new_tokens // self.model.info.canvas_length)


class Cancelled(Exception):
    """Raised inside a turn when the caller wants no more; `Turn.run` ends with what there is."""


class Turn:
    """The work and the clock of one `generate` call; a style adds `encode` and `denoise_canvas`."""

    def __init__(
        self,
        session: Session,
        seed: int,
        settings: Any,
        force_steps: int | None,
        on_event: Callable[[Event], None],
        cancel: Callable[[], bool],
    ) -> None:
        self.session = session
        self.model = session.model
        self.info = session.info
        self.seed = seed
        self.settings = settings
        self.can_set = frozenset(vars(settings))
        self.force_steps = force_steps
        self.listener = on_event
        self.cancel = cancel
        self.began = time.perf_counter()
        self.prompt_ms = 0.0
        self.encode_ms = 0.0
        self.first_draft_ms: float | None = None
        self.first_commit_ms: float | None = None

    def encode(self) -> None:
        """Bring what is committed into the KV cache, as far as the next canvas needs it."""
        raise NotImplementedError

    def denoise_canvas(self, is_final: bool) -> tuple[CanvasResult, bool]:
        """Make and `commit` one canvas behind the cached tokens; also whether the text ended.

        is_final: no further canvas was asked for.
        """
        raise NotImplementedError

    def run(self, prompt_tokens: int, canvas_count: int) -> GenerationResult:
        """Encode and denoise, canvas by canvas, until the end or `canvas_count`."""
        canvases: list[CanvasResult] = []
        reason: FinishReason = "length"
        try:
            for remaining in reversed(range(canvas_count)):
                self.encode()
                canvas, has_ended = self.denoise_canvas(remaining == 0)
                canvases.append(canvas)
                if has_ended:
                    reason = "eos"
                    break
        except Cancelled:
            reason = "cancelled"
        return GenerationResult(
            prompt_tokens=prompt_tokens,
            canvases=tuple(canvases),
            finish_reason=reason,
            special_tokens=self.session.special_tokens,
            prompt_ms=self.prompt_ms,
            encode_ms=self.encode_ms,
            total_ms=ms_since(self.began),
            first_draft_ms=self.first_draft_ms,
            first_commit_ms=self.first_commit_ms,
            peak_rss_bytes=peak_rss_bytes(),
        )

    def on_event(self, event: Event) -> None:
        """Tell the caller; the time that takes does not count."""
        began = time.perf_counter()
        self.listener(event)
        # Whoever watches takes time that is not the model's: move the beginning.
        self.began += time.perf_counter() - began

    def encoded(self, tokens: int, done: int, total: int, ms: float) -> None:
        """`tokens` more are in the KV cache: `done` of `total`, the last ones in `ms`."""
        self.session._cached += tokens
        if self.first_commit_ms is None:
            self.prompt_ms += ms
        else:
            self.encode_ms += ms
        self.on_event(PromptEncoded(done, total, ms))

    def drafted(self) -> None:
        """A denoising step is done."""
        if self.first_draft_ms is None:
            self.first_draft_ms = ms_since(self.began)

    def commit(
        self, tokens: np.ndarray, steps: Sequence[StepStats], *, converged: bool, is_last: bool
    ) -> CanvasResult:
        """Append `tokens` to the session as its next canvas, and tell."""
        session = self.session
        index = session._canvases
        session._tokens.extend(tokens.tolist())
        session._canvases += 1
        if self.first_commit_ms is None:
            self.first_commit_ms = ms_since(self.began)
        self.on_event(CanvasCommitted(index, tokens, len(steps), is_last))
        return CanvasResult(index, tuple(tokens.tolist()), tuple(steps), converged)

    def padded(self, tokens: np.ndarray) -> tuple[np.ndarray, bool]:
        """Pad behind the first end token, if there is one and a padding token; is there one?"""
        special = self.session.special_tokens
        ends = np.flatnonzero(np.isin(tokens, special.eos))
        committed = tokens.copy()
        if ends.size and special.pad is not None:
            committed[ends[0] + 1 :] = special.pad
        return committed, bool(ends.size)

    def stop_if_cancelled(self) -> None:
        """To be called before every run of the model."""
        if self.cancel():
            raise Cancelled


def ms_since(began: float) -> float:
    """Milliseconds since `began` of time.perf_counter."""
    return 1000 * (time.perf_counter() - began)


def _ignore(event: Event) -> None:
    pass


def _never() -> bool:
    return False
