"""Uniform diffusion: a canvas of random tokens, denoised until it is stable, then the next.

Semantics: `generate` of transformers 5.23,
`models/diffusion_gemma/generation_diffusion_gemma.py`, batch 1, with the random numbers of
`export.contract.philox`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from export.contract import philox
from export.contract.manifest import SpecialTokens
from export.contract.styles.uniform_diffusion import UniformDiffusion, UniformDiffusionSettings
from export.host.loop_model import LoopModel
from export.host.session import Session, Turn
from quantize.errors import InputError


@dataclass(frozen=True)
class HeadOutput:
    """What one denoising step returns, arrays `[T]`.

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


class UniformDiffusionModel(LoopModel):
    """The model as this loop calls it. Arrays are `[T]`: int64 tokens, fp32 numbers."""

    style = UniformDiffusion

    def zero_signal(self) -> Any:
        """The self-conditioning signal of a canvas's first step: zeros `[1, T, H]` fp32."""
        return np.zeros((1, self.info.canvas_length, self.info.hidden_size), dtype=np.float32)

    def layers(self, tokens: np.ndarray, start: int, denoise: bool, signal: Any) -> Any:
        """Run T tokens at positions start .. start + T; returns hidden states `[1, T, H]`.

        Encoding is causal and commits keys and values; denoising is bidirectional over the context
        before `start` and the canvas, and leaves its keys and values as scratch.
        """
        return self.run_layers(tokens[None], np.array([start]), np.array([int(denoise)]), signal)

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
        named = self.run_head(
            hidden,
            canvas[None],
            previous_argmax[None],
            np.array([stable_steps]),
            np.array([step]),
            settings,
            uniform[None],
            random_tokens[None],
            targets[None],
        )
        return HeadOutput(
            next_canvas=named["next_canvas"].squeeze(0).numpy(),
            argmax=named["argmax"].squeeze(0).numpy(),
            entropy=named["entropy"].squeeze(0).numpy(),
            accepted=named["accepted"].squeeze(0).numpy().astype(bool),
            stable_steps=int(named["stable_steps"]),
            finished=bool(named["finished"]),
            target_log_prob=named["target_log_prob"].squeeze(0).numpy(),
            signal=named["signal"],
        )


class UniformDiffusionTurn(Turn):
    """One call's work."""

    def encode(self) -> None:
        """Commit all uncached tokens, a canvas length at a time."""
        size, signal = self.info.canvas_length, self.model.zero_signal()

        def run(tokens: np.ndarray, start: int) -> Any:
            # A short chunk is padded. The canvas that follows overwrites what is behind its end,
            # and fits in the context, so the padding does too.
            chunk = np.zeros(size, dtype=np.int64)
            chunk[: len(tokens)] = tokens
            return self.model.layers(chunk, start, False, signal)

        self.encode_up_to(self.session.length, size, run)

    def denoise_canvas(self) -> tuple[np.ndarray, bool]:
        """See `Turn`."""
        size, vocabulary = self.info.canvas_length, self.info.vocabulary_size
        index, start = self.session.canvases, self.session.cached
        max_steps = self.settings.max_steps
        canvas = philox.random_tokens(self.seed, index, 0, size, vocabulary)
        self.begin_canvas(canvas)
        argmax = np.full(size, -1, dtype=np.int64)
        targets = np.zeros(size, dtype=np.int64)
        signal, stable_steps, finished = self.model.zero_signal(), 0, False
        for step in range(1, max_steps + 1):
            uniform = philox.uniforms(self.seed, index, step, size)
            random_tokens = philox.random_tokens(self.seed, index, step, size, vocabulary)
            hidden = self.run_layers(canvas, start, True, signal)
            output: HeadOutput = self.run_head(
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
            canvas, argmax, signal = output.next_canvas, output.argmax, output.signal
            stable_steps, finished = output.stable_steps, output.finished
            self.end_step(
                step, max_steps, canvas, argmax, output.accepted, output.entropy, finished
            )
            if finished and self.force_steps is None:
                break
        return argmax, finished


class UniformDiffusionSession(Session):
    """A conversation with a model of uniform diffusion; its settings are UniformDiffusionSettings.

    `force_steps` of `generate` runs exactly so many steps a canvas, whatever the stop test says.
    """

    turn_class = UniformDiffusionTurn
    model_class = UniformDiffusionModel

    def settings_of_forced(self, settings: Any, steps: int) -> Any:
        """See `Session`. The temperature falls over these steps."""
        return replace(settings, max_steps=steps)

    def target_length(self, answer_tokens: int) -> int:
        """See `Session`. A loss is that of one canvas."""
        return self.info.canvas_length

    def denoising_loss(self, prompt: Sequence[int], target: np.ndarray, seed: int) -> float:
        """See `Session`. The noise level is drawn uniformly; the loss is the architecture's own."""
        noisy = corrupt(target, self.info.vocabulary_size, seed)
        return -float(np.mean(score(self.model, prompt, noisy, target), dtype=np.float64))


def score(
    model: UniformDiffusionModel,
    prompt: Sequence[int],
    noisy_canvas: Sequence[int] | np.ndarray,
    targets: Sequence[int] | np.ndarray,
) -> np.ndarray:
    """Log probabilities `[T]` (nats, temperature 1) of `targets` after one step on a noisy canvas.

    Encodes `prompt` from position 0 and denoises once without a self-conditioning signal. Any
    session of the model is overwritten. Raises InputError as `generate` does.
    """
    size = model.info.canvas_length
    if len(noisy_canvas) != size or len(targets) != size:
        raise InputError(
            f"a canvas of {len(noisy_canvas)} and {len(targets)} targets were given; give "
            f"{size} tokens each"
        )
    settings = UniformDiffusionSettings(max_steps=1, t_min=1.0, t_max=1.0)
    session = UniformDiffusionSession(model, SpecialTokens(), settings)
    for tokens in (noisy_canvas, targets, prompt):
        session.check([int(token) for token in tokens], size, 0)
    session.append(prompt)
    UniformDiffusionTurn(session, 0, settings).encode()
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


def corrupt(canvas: np.ndarray, vocabulary_size: int, seed: int) -> np.ndarray:
    """Replace each token by a uniformly random one with a probability drawn from [0, 1)."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    level = generator.random()
    is_replaced = generator.random(canvas.shape) < level
    noise = generator.integers(0, vocabulary_size, canvas.shape, dtype=np.int64)
    return np.where(is_replaced, noise, canvas)
