"""A conversation with one model (`Session`), and the loop that every style shares (`Turn`).

What a style adds is in `export.host.loops`. Nothing here knows logits, weights or text, and
nothing needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, ClassVar

import numpy as np

from export.contract.manifest import ModelInfo, SpecialTokens
from export.host.generation import (
    CanvasCommitted,
    CanvasDenoised,
    CanvasResult,
    CanvasStarted,
    Event,
    FinishReason,
    GenerationResult,
    PromptEncoded,
    StepStats,
)
from export.host.loop_model import LoopModel
from export.host.process import peak_rss_bytes
from quantize.errors import InputError


def _ignore(event: Event) -> None:
    pass


def _never() -> bool:
    return False


class Cancelled(Exception):
    """Raised inside a turn when the caller wants no more; `Turn.run` returns what is committed."""


class Turn:
    """The work and the clock of one `generate` call; a style adds `encode` and `denoise_canvas`."""

    def __init__(
        self,
        session: Session,
        seed: int,
        settings: Any,
        canvas_count: int = 1,
        force_steps: int | None = None,
        on_event: Callable[[Event], None] = _ignore,
        cancel: Callable[[], bool] = _never,
    ) -> None:
        self.session = session
        self.model = session.model
        self.info = session.info
        self.seed = seed
        self.settings = settings
        self.settings_array = settings.as_array()
        self.canvas_count = canvas_count
        self.force_steps = force_steps
        # The end of all canvases that were asked for.
        self.end = session.length + canvas_count * self.info.canvas_length
        self._listener = on_event
        self._cancel = cancel
        self._began = perf_counter()
        self._layers_ms = 0.0
        self._head_ms = 0.0
        self._steps: list[StepStats] = []
        self._prompt_ms = 0.0
        self._encode_ms = 0.0
        self._first_draft_ms: float | None = None
        self._first_commit_ms: float | None = None

    # --- what a style adds

    def encode(self) -> None:
        """Bring the known tokens into the KV cache, as far as the next canvas needs them."""
        raise NotImplementedError

    def denoise_canvas(self) -> tuple[np.ndarray, bool]:
        """One canvas behind the known tokens: its tokens, and whether it was finished."""
        raise NotImplementedError

    def first_end(self, tokens: np.ndarray) -> int | None:
        """Index of the first end token in a canvas; None if the text goes on."""
        ends = np.flatnonzero(np.isin(tokens, self.session.special_tokens.eos))
        return int(ends[0]) if ends.size else None

    # --- the loop

    def run(self, prompt_tokens: int) -> GenerationResult:
        """Encode and denoise, canvas by canvas, until an end token or the last canvas."""
        canvases: list[CanvasResult] = []
        reason: FinishReason = "length"
        try:
            for number in range(1, self.canvas_count + 1):
                self.encode()
                tokens, converged = self.denoise_canvas()
                end = self.first_end(tokens)
                is_last = end is not None or number == self.canvas_count
                canvases.append(self._commit(tokens, end, converged, is_last))
                if end is not None:
                    reason = "eos"
                    break
        except Cancelled:
            reason = "cancelled"
        return GenerationResult(
            prompt_tokens=prompt_tokens,
            canvases=tuple(canvases),
            finish_reason=reason,
            special_tokens=self.session.special_tokens,
            prompt_ms=self._prompt_ms,
            encode_ms=self._encode_ms,
            total_ms=_ms_since(self._began),
            first_draft_ms=self._first_draft_ms,
            first_commit_ms=self._first_commit_ms,
            peak_rss_bytes=peak_rss_bytes(),
        )

    def _commit(
        self, tokens: np.ndarray, end: int | None, converged: bool, is_last: bool
    ) -> CanvasResult:
        """Append a canvas to the session, padded behind its end token if there is padding."""
        pad = self.session.special_tokens.pad
        if end is not None and pad is not None:
            tokens = tokens.copy()
            tokens[end + 1 :] = pad
        index = self.session.canvases
        self.session.append_canvas(tokens)
        if self._first_commit_ms is None:
            self._first_commit_ms = _ms_since(self._began)
        steps, self._steps = tuple(self._steps), []
        self.emit(CanvasCommitted(index, tokens, len(steps), is_last))
        return CanvasResult(index, tuple(tokens.tolist()), steps, converged)

    # --- what a style's methods are written with

    def encode_up_to(
        self, end: int, chunk_length: int, run: Callable[[np.ndarray, int], Any]
    ) -> Any:
        """Bring the tokens before `end` into the KV cache, `chunk_length` of them in a call.

        `run` takes tokens `[N]` int64 and the position of the first. Returns what its last call
        returned; None where all are cached.
        """
        session = self.session
        begin, hidden = session.cached, None
        while (start := session.cached) < end:
            self._stop_if_cancelled()
            tokens = session.span(start, min(start + chunk_length, end))
            began = perf_counter()
            hidden = run(tokens, start)
            ms = _ms_since(began)
            session.set_cached(start + len(tokens))
            if self._first_commit_ms is None:
                self._prompt_ms += ms
            else:
                self._encode_ms += ms
            self.emit(PromptEncoded(session.cached - begin, end - begin, ms))
        return hidden

    def begin_canvas(self, tokens: np.ndarray) -> None:
        """Report the canvas `[T]` that denoising begins with."""
        self.emit(CanvasStarted(self.session.canvases, tokens))

    def run_layers(self, *inputs: Any) -> Any:
        """The model's layers by the clock, as one step's; returns hidden states."""
        self._stop_if_cancelled()
        began = perf_counter()
        hidden = self.model.layers(*inputs)
        self._layers_ms = _ms_since(began)
        return hidden

    def run_head(self, hidden: Any, *inputs: Any) -> Any:
        """The model's head by the clock, as one step's; returns what the style's head returns."""
        self._stop_if_cancelled()
        began = perf_counter()
        output = self.model.head(hidden, *inputs)
        self._head_ms = _ms_since(began)
        return output

    def end_step(
        self,
        step: int,
        max_steps: int,
        tokens: np.ndarray,
        draft: np.ndarray,
        accepted: np.ndarray,
        entropy: np.ndarray,
        finished: bool,
        newly_accepted: int | None = None,
    ) -> None:
        """Count and report a step that `run_layers` and `run_head` were called for.

        Arrays as in `CanvasDenoised`; newly_accepted: positions that this step accepted, where
        `accepted` holds those of earlier steps too.
        """
        if newly_accepted is None:
            newly_accepted = int(accepted.sum())
        layers_ms, self._layers_ms = self._layers_ms, 0.0
        stats = StepStats(layers_ms, self._head_ms, newly_accepted, float(entropy.mean()))
        self._steps.append(stats)
        if self._first_draft_ms is None:
            self._first_draft_ms = _ms_since(self._began)
        self.emit(
            CanvasDenoised(
                self.session.canvases, step, max_steps, tokens, draft, accepted, entropy,
                layers_ms, self._head_ms, finished,
            )
        )  # fmt: skip

    def emit(self, event: Event) -> None:
        """Pass an event to the caller; the time that this takes does not count."""
        began = perf_counter()
        self._listener(event)
        self._began += perf_counter() - began

    def _stop_if_cancelled(self) -> None:
        if self._cancel():
            raise Cancelled


class Session:
    """A conversation with one model: which tokens there are, and how many the KV cache holds.

    One at a time per model, since the cache is the model's. `Engine.session` begins one.
    """

    turn_class: ClassVar[type[Turn]]
    model_class: ClassVar[type[LoopModel]]

    def __init__(self, model: Any, special_tokens: SpecialTokens, settings: Any) -> None:
        """settings: of the style's sampler, the default of `generate`."""
        self.model = model
        self.special_tokens = special_tokens
        self.settings = settings
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
    def length(self) -> int:
        """How many tokens there are."""
        return len(self._tokens)

    @property
    def cached(self) -> int:
        """How many of them the KV cache holds: all but the last canvas of the last turn."""
        return self._cached

    @property
    def canvases(self) -> int:
        """Canvases committed since the session began: the random numbers' next canvas index."""
        return self._canvases

    def span(self, begin: int = 0, end: int | None = None) -> np.ndarray:
        """The tokens from position `begin` up to `end` (None: the last), int64."""
        return np.array(self._tokens[begin:end], dtype=np.int64)

    def set_cached(self, length: int) -> None:
        """For turns: the KV cache holds the first `length` tokens from now on."""
        self._cached = length

    def append(self, tokens: Sequence[int]) -> None:
        """For turns: a prompt's tokens follow, which are not cached yet."""
        self._tokens.extend(int(token) for token in tokens)

    def append_canvas(self, tokens: np.ndarray) -> None:
        """For turns: a committed canvas follows."""
        self._tokens.extend(tokens.tolist())
        self._canvases += 1

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
        free = self.info.maximum_context - self.length - prompt_tokens
        return max(0, free // self.info.canvas_length) * self.info.canvas_length

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
        if force_steps is not None:
            settings = self.settings_of_forced(settings, force_steps)
        canvas_count = self.check(prompt, max_new_tokens, seed)
        before, canvases = self.length, self._canvases
        self.append(prompt)
        try:
            turn = self.turn_class(
                self, seed, settings, canvas_count, force_steps, on_event or _ignore,
                cancel or _never,
            )  # fmt: skip
            return turn.run(len(prompt))
        except BaseException:
            self.truncate(before)
            self._canvases = canvases
            raise

    def check(self, prompt: Sequence[int], max_new_tokens: int, seed: int) -> int:
        """The number of canvases of such a call of `generate`; raises InputError as it does."""
        info = self.info
        for position, token in enumerate(prompt):
            if not 0 <= token < info.vocabulary_size:
                raise InputError(
                    f"token {position} of the prompt has id {token}, the vocabulary ends at "
                    f"{info.vocabulary_size - 1}; use the tokenizer that belongs to the model"
                )
        if not len(prompt) and not self.length:
            raise InputError("the prompt is empty; give at least one token")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; give at least 1")
        if not 0 <= seed < 1 << 64:
            raise InputError(f"the seed is {seed}; give an integer from 0 to 2**64 - 1")
        room = self.room(len(prompt))
        if room == 0:
            held = f" after {self.length} of earlier turns" if self.length else ""
            raise InputError(
                f"the prompt has {len(prompt)} tokens{held}, and with a canvas of "
                f"{info.canvas_length} it exceeds the context of {info.maximum_context}; shorten "
                "it, or export with a larger --context"
            )
        known = self.length + len(prompt)
        if max_new_tokens > room:
            raise InputError(
                f"{max_new_tokens} new tokens were asked for, and only {room} fit in the context "
                f"of {info.maximum_context} after {known} tokens; "
                "ask for fewer, or export with a larger --context"
            )
        return self.canvas_count(known, max_new_tokens)

    # --- what a style may state otherwise

    def canvas_count(self, known: int, max_new_tokens: int) -> int:
        """Canvases for so many new tokens behind `known` ones."""
        return -(-max_new_tokens // self.info.canvas_length)

    def settings_of_forced(self, settings: Any, steps: int) -> Any:
        """The settings that run exactly `steps` steps a canvas; InputError for less than one."""
        if steps < 1:
            raise InputError(f"force_steps is {steps}; give at least 1")
        return settings

    def target_length(self, answer_tokens: int) -> int:
        """Positions of a target for `denoising_loss` of such an answer, in whole canvases."""
        return self.canvas_count(0, answer_tokens) * self.info.canvas_length

    def denoising_loss(self, prompt: Sequence[int], target: np.ndarray, seed: int) -> float | None:
        """Minus the mean log probability (nats) of `target` `[T]` int64 from a corrupted one.

        None for a style whose noise has no such loss. Whatever a session of the model has cached
        is overwritten.
        """
        return None


def _ms_since(began: float) -> float:
    return 1000 * (perf_counter() - began)
