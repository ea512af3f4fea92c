"""The host's loop of uniform diffusion: encode, denoise a canvas, commit it, go on to the next.

It moves small arrays between a model's layers and head, and counts; it sees no logits, no weights
and no text, and needs no torch. Semantics: `generate` of transformers 5.23,
`models/diffusion_gemma/generation_diffusion_gemma.py`, batch 1, with the random numbers of
`export.philox`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from export import philox
from export.bundle import ModelInfo, SpecialTokens
from export.process import peak_rss_bytes
from quantize.errors import InputError

FinishReason = Literal["eos", "length", "cancelled"]


@dataclass(frozen=True)
class HeadOutput:
    """What one denoising step leaves, arrays `[T]`.

    `signal` (`[1, T, H]`, of whatever kind the model takes back) is the soft embedding for the next
    step's self-conditioning. Entropies are in nats, of the processed logits.
    """

    next_canvas: np.ndarray
    argmax: np.ndarray
    entropy: np.ndarray
    accepted: np.ndarray
    stable_steps: int
    finished: bool
    target_log_prob: np.ndarray
    signal: Any


class UniformDiffusionModel(Protocol):
    """A model as the loop sees it. Arrays are `[T]`: int64 tokens, fp32 numbers."""

    info: ModelInfo

    def zero_signal(self) -> Any:
        """The self-conditioning signal of a canvas's first step."""

    def layers(self, tokens: np.ndarray, start: int, denoise: bool, signal: Any) -> Any:
        """Run T tokens at positions start .. start + T; returns the hidden states for `head`.

        Encoding is causal and commits keys and values; denoising is bidirectional over the context
        before `start` and the canvas, and leaves its keys and values as scratch.
        """

    def head(
        self,
        hidden: Any,
        canvas: np.ndarray,
        previous_argmax: np.ndarray,
        stable_steps: int,
        step: int,
        settings: np.ndarray,
        uniform: np.ndarray,
        random_tokens: np.ndarray,
        targets: np.ndarray,
    ) -> HeadOutput:
        """Sample, accept, renoise and test for the end; `step` counts the steps remaining."""


@dataclass(frozen=True)
class UniformDiffusionSettings:
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
        for name in ("max_steps", "stability_threshold"):
            value = getattr(self, name)
            if not math.isfinite(value) or value != int(value):
                raise InputError(f"{name} is {value!r}; give a whole number")
            object.__setattr__(self, name, int(value))
        _require(self.max_steps >= 1, "max_steps", self.max_steps, "at least 1")
        _require(self.stability_threshold >= 0, "stability_threshold", self.stability_threshold,
                 "at least 0")  # fmt: skip
        _require(self.t_min >= 0 and math.isfinite(self.t_min), "t_min", self.t_min, "at least 0")
        _require(self.t_max >= self.t_min and self.t_max > 0 and math.isfinite(self.t_max),
                 "t_max", self.t_max, f"more than 0 and at least t_min ({self.t_min})")  # fmt: skip
        _require(self.entropy_bound >= 0, "entropy_bound", self.entropy_bound, "at least 0")
        _require(self.confidence_threshold >= 0, "confidence_threshold",
                 self.confidence_threshold, "at least 0")  # fmt: skip

    def as_array(self) -> np.ndarray:
        """The head's `settings` input, `[6]` fp32 in the order of the fields."""
        return np.array(list(asdict(self).values()), dtype=np.float32)


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} is {value}; give {expected}")


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


class UniformDiffusionSession:
    """A conversation with one model: which tokens there are, and how many the KV cache holds.

    One session at a time per model, since the cache is the model's.
    """

    def __init__(
        self,
        model: UniformDiffusionModel,
        special_tokens: SpecialTokens | None = None,
        settings: UniformDiffusionSettings | None = None,
    ) -> None:
        self.model = model
        self.special_tokens = special_tokens or SpecialTokens()
        self.settings = settings or UniformDiffusionSettings()
        self._tokens: list[int] = []
        self._cached = 0
        self._canvases = 0

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
        settings: UniformDiffusionSettings | None = None,
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
        if force_steps is not None:
            settings = replace(settings, max_steps=force_steps)
        prompt = [int(token) for token in prompt]
        canvas_count = self._check(prompt, max_new_tokens, seed)
        before = len(self._tokens), self._canvases
        self._tokens.extend(prompt)
        turn = _Turn(
            self, seed, settings, force_steps is not None, on_event or _ignore, cancel or _never
        )
        try:
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
        canvas_count = -(-max_new_tokens // info.canvas_length)
        if canvas_count * info.canvas_length > room:
            raise InputError(
                f"{max_new_tokens} new tokens were asked for, and only {room} fit in the context "
                f"of {info.maximum_context} after {len(self._tokens) + len(prompt)} tokens; "
                "ask for fewer, or export with a larger --maximum-context"
            )
        return canvas_count


class _Cancelled(Exception):
    pass


class _Turn:
    """The work and the clock of one `generate` call."""

    def __init__(
        self,
        session: UniformDiffusionSession,
        seed: int,
        settings: UniformDiffusionSettings,
        is_forced: bool,
        on_event: Callable[[Event], None],
        cancel: Callable[[], bool],
    ) -> None:
        self.session = session
        self.model = session.model
        self.info = session.model.info
        self.seed = seed
        self.settings = settings
        self.settings_array = settings.as_array()
        self.is_forced = is_forced
        self.listener = on_event
        self.cancel = cancel
        self.began = time.perf_counter()
        self.prompt_ms = 0.0
        self.encode_ms = 0.0
        self.first_draft_ms: float | None = None
        self.first_commit_ms: float | None = None

    def on_event(self, event: Event) -> None:
        began = time.perf_counter()
        self.listener(event)
        # Whoever watches takes time that is not the model's: move the beginning.
        self.began += time.perf_counter() - began

    def run(self, prompt_tokens: int, canvas_count: int) -> GenerationResult:
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
        except _Cancelled:
            reason = "cancelled"
        return GenerationResult(
            prompt_tokens=prompt_tokens,
            canvases=tuple(canvases),
            finish_reason=reason,
            special_tokens=self.session.special_tokens,
            prompt_ms=self.prompt_ms,
            encode_ms=self.encode_ms,
            total_ms=_ms_since(self.began),
            first_draft_ms=self.first_draft_ms,
            first_commit_ms=self.first_commit_ms,
            peak_rss_bytes=peak_rss_bytes(),
        )

    def encode(self) -> None:
        """Commit all uncached tokens, a canvas length at a time."""
        session, size = self.session, self.info.canvas_length
        total = len(session._tokens) - session._cached
        signal = self.model.zero_signal()
        done = 0
        while done < total:
            self.stop_if_cancelled()
            start = session._cached
            known = session._tokens[start : start + size]
            # A short chunk is padded. The canvas that follows overwrites what is behind its end,
            # and fits in the context, so the padding does too.
            chunk = np.zeros(size, dtype=np.int64)
            chunk[: len(known)] = known
            began = time.perf_counter()
            self.model.layers(chunk, start, False, signal)
            ms = _ms_since(began)
            session._cached += len(known)
            done += len(known)
            if self.first_commit_ms is None:
                self.prompt_ms += ms
            else:
                self.encode_ms += ms
            self.on_event(PromptEncoded(done, total, ms))

    def denoise_canvas(self, is_final: bool) -> tuple[CanvasResult, bool]:
        """Denoise and commit one canvas behind the cached tokens; also whether the text ended."""
        session, size, vocabulary = (
            self.session,
            self.info.canvas_length,
            self.info.vocabulary_size,
        )
        index, start, max_steps = session._canvases, session._cached, self.settings.max_steps
        canvas = philox.random_tokens(self.seed, index, 0, size, vocabulary)
        self.on_event(CanvasStarted(index, canvas))
        argmax = np.full(size, -1, dtype=np.int64)
        targets = np.zeros(size, dtype=np.int64)
        signal, stable_steps, finished = self.model.zero_signal(), 0, False
        steps: list[StepStats] = []
        for step in range(1, max_steps + 1):
            self.stop_if_cancelled()
            uniform = philox.uniforms(self.seed, index, step, size)
            random_tokens = philox.random_tokens(self.seed, index, step, size, vocabulary)
            began = time.perf_counter()
            hidden = self.model.layers(canvas, start, True, signal)
            layers_ms = _ms_since(began)
            began = time.perf_counter()
            output = self.model.head(
                hidden,
                canvas,
                argmax,
                stable_steps,
                max_steps - step + 1,
                self.settings_array,
                uniform,
                random_tokens,
                targets,
            )
            head_ms = _ms_since(began)
            canvas, argmax, signal = output.next_canvas, output.argmax, output.signal
            stable_steps, finished = output.stable_steps, output.finished
            steps.append(
                StepStats(
                    layers_ms, head_ms, int(output.accepted.sum()), float(output.entropy.mean())
                )
            )
            if self.first_draft_ms is None:
                self.first_draft_ms = _ms_since(self.began)
            self.on_event(
                CanvasDenoised(
                    index,
                    step,
                    max_steps,
                    canvas,
                    argmax,
                    output.accepted,
                    output.entropy,
                    layers_ms,
                    head_ms,
                    finished,
                )
            )
            if finished and not self.is_forced:
                break
        committed, has_ended = self.finalize(argmax)
        session._tokens.extend(committed.tolist())
        session._canvases += 1
        if self.first_commit_ms is None:
            self.first_commit_ms = _ms_since(self.began)
        self.on_event(CanvasCommitted(index, committed, len(steps), has_ended or is_final))
        result = CanvasResult(index, tuple(committed.tolist()), tuple(steps), finished)
        return result, has_ended

    def finalize(self, argmax: np.ndarray) -> tuple[np.ndarray, bool]:
        """Pad behind the first end token, if there is one and a padding token."""
        special = self.session.special_tokens
        ends = np.flatnonzero(np.isin(argmax, special.eos))
        committed = argmax.copy()
        if ends.size and special.pad is not None:
            committed[ends[0] + 1 :] = special.pad
        return committed, bool(ends.size)

    def stop_if_cancelled(self) -> None:
        if self.cancel():
            raise _Cancelled


def score(
    model: UniformDiffusionModel,
    prompt: Sequence[int],
    noisy_canvas: Sequence[int],
    targets: Sequence[int],
) -> np.ndarray:
    """Log probabilities `[T]` (nats, temperature 1) of `targets` after one step on a noisy canvas.

    Encodes `prompt` from position 0 and denoises once without a self-conditioning signal: the
    architecture's own loss is minus their mean. Any session of the model is overwritten. Raises
    InputError as `generate` does.
    """
    size = model.info.canvas_length
    if len(noisy_canvas) != size or len(targets) != size:
        raise InputError(
            f"a canvas of {len(noisy_canvas)} and {len(targets)} targets were given; give "
            f"{size} tokens each"
        )
    settings = UniformDiffusionSettings(max_steps=1, t_min=1.0, t_max=1.0)
    session = UniformDiffusionSession(model, settings=settings)
    for tokens in (noisy_canvas, targets, prompt):
        session._check(list(tokens), size, 0)
    session._tokens.extend(int(token) for token in prompt)
    _Turn(session, 0, settings, True, _ignore, _never).encode()
    canvas = np.asarray(noisy_canvas, dtype=np.int64)
    hidden = model.layers(canvas, len(prompt), True, model.zero_signal())
    output = model.head(
        hidden,
        canvas,
        np.full(size, -1, dtype=np.int64),
        0,
        1,
        settings.as_array(),
        philox.uniforms(0, 0, 1, size),
        philox.random_tokens(0, 0, 1, size, model.info.vocabulary_size),
        np.asarray(targets, dtype=np.int64),
    )
    return output.target_log_prob


def _ms_since(began: float) -> float:
    return 1000 * (time.perf_counter() - began)


def _ignore(event: Event) -> None:
    pass


def _never() -> bool:
    return False
