"""The host's loop of uniform diffusion: encode, denoise a canvas, commit it, go on to the next.

Semantics: `generate` of transformers 5.23,
`models/diffusion_gemma/generation_diffusion_gemma.py`, batch 1, with the random numbers of
`export.contract.philox`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from export.contract import philox
from export.contract.bundle import ModelInfo, SpecialTokens
from export.contract.styles.uniform_diffusion import UniformDiffusionSettings
from export.host.session import (
    CanvasDenoised,
    CanvasResult,
    CanvasStarted,
    Session,
    StepStats,
    Turn,
    ms_since,
)
from quantize.errors import InputError


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


class UniformDiffusionTurn(Turn):
    """One call's work."""

    def __init__(self, session: Session, seed: int, settings: Any, *rest: Any) -> None:
        super().__init__(session, seed, settings, *rest)
        if self.force_steps is not None:
            self.settings = replace(settings, max_steps=self.force_steps)
        self.settings_array = self.settings.as_array()

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
            done += len(known)
            self.encoded(len(known), done, total, ms_since(began))

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
            layers_ms = ms_since(began)
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
            head_ms = ms_since(began)
            canvas, argmax, signal = output.next_canvas, output.argmax, output.signal
            stable_steps, finished = output.stable_steps, output.finished
            steps.append(
                StepStats(
                    layers_ms, head_ms, int(output.accepted.sum()), float(output.entropy.mean())
                )
            )
            self.drafted()
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
            if finished and self.force_steps is None:
                break
        committed, has_ended = self.padded(argmax)
        is_last = has_ended or is_final
        return self.commit(committed, steps, converged=finished, is_last=is_last), has_ended


class UniformDiffusionSession(Session):
    """A conversation with a model of uniform diffusion; its settings are UniformDiffusionSettings.

    `force_steps` of `generate` runs exactly so many steps a canvas, whatever the stop test says.
    """

    turn_class = UniformDiffusionTurn

    def __init__(
        self,
        model: UniformDiffusionModel,
        special_tokens: SpecialTokens | None = None,
        settings: UniformDiffusionSettings | None = None,
    ) -> None:
        super().__init__(
            model, special_tokens or SpecialTokens(), settings or UniformDiffusionSettings()
        )


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
    UniformDiffusionTurn(session, 0, settings, None, lambda event: None, lambda: False).encode()
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
