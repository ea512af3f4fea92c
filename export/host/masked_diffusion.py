"""The host's loop of masked diffusion: a canvas of masks, filled step by step, then the next.

Two kinds of models. **Block-causal** ones (bd3lm, SDAR, Fast-dLLM v2) see their own block and those
before. Blocks count from position 0, so the end of a prompt sits in the first block that is
denoised. A step runs the rows of one block; a finished block is committed by one pass over its
final tokens and never computed again, and what a step sees of it is exact. **Those that see
everything** (mdlm, Dream, LLaDA) have the whole answer before them as masks from the beginning and
fill it canvas by canvas. With `prefix_cache` 0 each step runs all rows and is exact; with 1 only a
canvas's first step does, and later ones run the rows from the canvas on, against keys and values
of earlier positions that are as old as that first step: the approximation of Fast-dLLM's prefix
cache. Either way the head sees only rows of the canvas that are still masked.

Sources: LLaDA (arXiv 2502.09992) `generate.py`; SDAR (arXiv 2510.06303) `generate.py`; Fast-dLLM
(arXiv 2505.22618) and v2 (arXiv 2509.26328); Dream (arXiv 2508.15487) `generation_utils.py`. Unlike
Fast-dLLM v2's code, which takes the first token of a block from the pass that commits the block
before, whatever its confidence, it is a masked position like the others here.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from export.contract import philox
from export.contract.bundle import Decoding, ModelInfo, SpecialTokens
from export.contract.styles.base import require
from export.contract.styles.masked_diffusion import NO_THRESHOLD, MaskedDiffusionSettings
from export.host.session import (
    CanvasDenoised,
    CanvasResult,
    CanvasStarted,
    GenerationResult,
    Session,
    StepStats,
    Turn,
    ms_since,
)


@dataclass(frozen=True)
class MaskedHeadOutput:
    """What one step finds for M masked positions, arrays `[M]`.

    `token` is what was sampled, `accepted` (bool) whether it is to stay, `score` what decided it,
    `entropy` in nats.
    """

    token: np.ndarray
    accepted: np.ndarray
    score: np.ndarray
    entropy: np.ndarray


class MaskedDiffusionModel(Protocol):
    """A model as the loop sees it."""

    info: ModelInfo
    decoding: Decoding

    def layers(self, tokens: np.ndarray, start: int, block_length: int) -> Any:
        """Run tokens `[N]` int64 at positions start .. start + N; returns hidden states for `head`.

        A position sees the block of `block_length` that it is in, and all blocks before, up to
        start + N; the keys and values of the N positions are kept until they are run again.
        """

    def head(
        self, hidden: Any, rows: np.ndarray, settings: np.ndarray, quota: int, uniform: np.ndarray
    ) -> MaskedHeadOutput:
        """Sample at the hidden states `rows` `[M]` int64 and accept some of them.

        Accepted are the `quota` best scores and all above the threshold. `settings` `[5]` fp32,
        `uniform` `[M]` fp32.
        """


def split_evenly(positions: int, steps: int) -> list[int]:
    """How many of so many positions each step accepts, the remainder first.

    LLaDA's `get_num_transfer_tokens`, without steps that would accept none.
    """
    share, remainder = divmod(positions, steps)
    return [share + (step < remainder) for step in range(min(steps, positions))]


def spread_evenly(positions: int, steps: int) -> list[int]:
    """The same for exactly `steps` steps: where they are more than positions, the last accepts."""
    if steps <= positions:
        return split_evenly(positions, steps)
    ends = [step * positions // steps for step in range(steps + 1)]
    return [after - before for before, after in itertools.pairwise(ends)]


class MaskedDiffusionTurn(Turn):
    """One call's work."""

    def __init__(self, session: Session, seed: int, settings: Any, *rest: Any) -> None:
        super().__init__(session, seed, settings, *rest)
        if self.force_steps is not None:
            require(self.force_steps >= 1, "force_steps", self.force_steps, "at least 1")
            self.settings = replace(
                settings, steps_per_canvas=self.force_steps, threshold=NO_THRESHOLD
            )
        self.settings_array = self.settings.as_array()
        self.decoding: Decoding = self.model.decoding
        self._end = 0

    def run(self, prompt_tokens: int, canvas_count: int) -> GenerationResult:
        """See `Turn`."""
        # What a model that sees everything has before it.
        self._end = len(self.session._tokens) + canvas_count * self.info.canvas_length
        return super().run(prompt_tokens, canvas_count)

    def encode(self) -> None:
        """Commit all whole blocks of known tokens, several in a call.

        Keys and values of a model that sees everything depend on what comes, so it keeps none.
        """
        session, block = self.session, self.decoding.block_length
        if block == 0:
            return
        most = self.decoding.prefill_length // block * block
        end = len(session._tokens) // block * block
        total = end - session._cached
        done = 0
        while done < total:
            self.stop_if_cancelled()
            start = session._cached
            chunk = np.array(session._tokens[start : min(start + most, end)], dtype=np.int64)
            began = time.perf_counter()
            self.model.layers(chunk, start, block)
            done += len(chunk)
            self.encoded(len(chunk), done, total, ms_since(began))

    def denoise_canvas(self, is_final: bool) -> tuple[CanvasResult, bool]:
        """Fill one canvas from the first unknown position on; also whether the text ended."""
        session, block, shift = self.session, self.decoding.block_length, self.decoding.shift
        size = self.info.canvas_length
        index, known = session._canvases, len(session._tokens)
        if block:
            begin, end = known // block * block, (known // block + 1) * block
            count = size - known % size
        else:
            begin, end, count = 0, self._end, size
        text = np.full(end, self.decoding.mask_token, dtype=np.int64)
        text[:known] = session._tokens
        canvas = text[known : known + count]  # a view: what is set in it is in the text
        is_masked = np.ones(count, dtype=bool)
        self.on_event(CanvasStarted(index, canvas.copy()))
        draft = canvas.copy()
        if self.force_steps is None:
            quotas = split_evenly(count, self.settings.steps_per_canvas)
        else:
            quotas = spread_evenly(count, self.settings.steps_per_canvas)
        steps: list[StepStats] = []
        for step, quota in enumerate(quotas, start=1):
            places = np.flatnonzero(is_masked)
            if block == 0 and step > 1 and self.settings.prefix_cache:
                begin = known
            # The row before is the first position's where tokens are shifted. In a block model it
            # belongs to a committed block, and its keys and values are written again unchanged.
            start = max(begin - shift, 0)
            self.stop_if_cancelled()
            began = time.perf_counter()
            hidden = self.model.layers(text[start:], start, block or self.info.maximum_context)
            layers_ms = ms_since(began)
            self.stop_if_cancelled()
            uniform = philox.uniforms(self.seed, index, step, count)
            began = time.perf_counter()
            output = self.model.head(
                hidden,
                places + (known - start - shift),
                self.settings_array,
                quota,
                uniform[places],
            )
            head_ms = ms_since(began)
            draft = canvas.copy()
            draft[places] = output.token
            decided = places[output.accepted]
            canvas[decided] = draft[decided]
            is_masked[decided] = False
            entropy = np.zeros(count, dtype=np.float32)
            entropy[places] = output.entropy
            finished = not is_masked.any()
            steps.append(StepStats(layers_ms, head_ms, len(decided), float(entropy.mean())))
            self.drafted()
            self.on_event(
                CanvasDenoised(
                    index,
                    step,
                    len(quotas),
                    canvas.copy(),
                    draft,
                    ~is_masked,
                    entropy,
                    layers_ms,
                    head_ms,
                    finished,
                )
            )
            if finished:
                break
        # The quotas add up to the canvas, so the last draft has no masks left.
        committed, has_ended = self.padded(draft)
        is_last = has_ended or is_final
        return self.commit(committed, steps, converged=finished, is_last=is_last), has_ended


class MaskedDiffusionSession(Session):
    """A conversation with a masked-diffusion model; its settings are MaskedDiffusionSettings.

    The canvas that a prompt ends in has only the positions behind it. `force_steps` of `generate`
    runs exactly so many steps a canvas, evenly split, without a threshold.
    """

    turn_class = MaskedDiffusionTurn

    def __init__(
        self,
        model: MaskedDiffusionModel,
        special_tokens: SpecialTokens | None = None,
        settings: MaskedDiffusionSettings | None = None,
    ) -> None:
        super().__init__(
            model,
            special_tokens or SpecialTokens(),
            settings or MaskedDiffusionSettings(model.info.canvas_length),
        )

    def truncate(self, length: int) -> None:
        """See `Session`. Of a block that is cut nothing stays cached: its positions saw the end."""
        super().truncate(length)
        block = self.model.decoding.block_length
        if block:
            self._cached -= self._cached % block

    def room(self, prompt_tokens: int = 0) -> int:
        """New tokens that fit behind a prompt of so many tokens.

        Whole canvases; where blocks count from position 0, also what is left of the first one.
        """
        decoding, info = self.model.decoding, self.model.info
        known = len(self._tokens) + prompt_tokens
        if decoding.block_length:
            whole_blocks = info.maximum_context // decoding.block_length * decoding.block_length
            return max(0, whole_blocks - known)
        # All rows go through one call.
        free = min(info.maximum_context, decoding.prefill_length) - known
        return max(0, free // info.canvas_length) * info.canvas_length

    def _canvas_count(self, known: int, max_new_tokens: int) -> int:
        size = self.model.info.canvas_length
        begun = known % size if self.model.decoding.block_length else 0
        return -(-(begun + max_new_tokens) // size)
