"""Masked diffusion: a canvas of masks, filled step by step, then the next.

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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from export.contract import philox
from export.contract.styles.masked_diffusion import NO_THRESHOLD, MaskedDiffusion
from export.host.loop_model import BlockModel
from export.host.session import Session, Turn


@dataclass(frozen=True)
class MaskedHeadOutput:
    """What one step returns for M masked positions, arrays `[M]`.

    `token` is what was sampled, `accepted` (bool) whether it is to stay, `score` what decided it,
    `entropy` in nats.
    """

    token: np.ndarray
    accepted: np.ndarray
    score: np.ndarray
    entropy: np.ndarray


class MaskedDiffusionModel(BlockModel):
    """The model as this loop calls it."""

    style = MaskedDiffusion

    def head(
        self, hidden: Any, rows: np.ndarray, settings: np.ndarray, quota: int, uniform: np.ndarray
    ) -> MaskedHeadOutput:
        """Sample at the hidden states `rows` `[M]` int64 and accept some of them.

        Accepted are the `quota` best scores and all above the threshold. `settings` `[5]` fp32,
        `uniform` `[M]` fp32.
        """
        named = self.run_head(hidden, rows, settings, np.array([quota]), uniform)
        return MaskedHeadOutput(
            token=named["token"].numpy(),
            accepted=named["accepted"].numpy().astype(bool),
            score=named["score"].numpy(),
            entropy=named["entropy"].numpy(),
        )


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

    def encode(self) -> None:
        """Commit all whole blocks of known tokens, several in a call.

        Keys and values of a model that sees everything depend on what comes, so it keeps none.
        """
        decoding = self.model.decoding
        if block := decoding.block_length:
            self.encode_up_to(
                self.session.length // block * block,
                decoding.prefill_length // block * block,
                lambda tokens, start: self.model.layers(tokens, start, block),
            )

    def denoise_canvas(self) -> tuple[np.ndarray, bool]:
        """See `Turn`. Fills the canvas from the first unknown position on."""
        decoding, size = self.model.decoding, self.info.canvas_length
        block, shift = decoding.block_length, decoding.shift
        index, known = self.session.canvases, self.session.length
        if block:
            begin, end = known // block * block, (known // block + 1) * block
            count = size - known % size
        else:
            begin, end, count = 0, self.end, size
        text = np.full(end, decoding.mask_token, dtype=np.int64)
        text[:known] = self.session.span()
        canvas = text[known : known + count]  # a view: what is set in it is in the text
        is_masked = np.ones(count, dtype=bool)
        self.begin_canvas(canvas.copy())
        split = split_evenly if self.force_steps is None else spread_evenly
        quotas = split(count, self.settings.steps_per_canvas)
        for step, quota in enumerate(quotas, start=1):
            places = np.flatnonzero(is_masked)
            if block == 0 and step > 1 and self.settings.prefix_cache:
                begin = known
            # The row before is the first position's where tokens are shifted. In a block model it
            # belongs to a committed block, and its keys and values are written again unchanged.
            start = max(begin - shift, 0)
            uniform = philox.uniforms(self.seed, index, step, count)
            hidden = self.run_layers(text[start:], start, block or self.info.maximum_context)
            output: MaskedHeadOutput = self.run_head(
                hidden, places + (known - start - shift), self.settings_array, quota,
                uniform[places],
            )  # fmt: skip
            draft = canvas.copy()
            draft[places] = output.token
            decided = places[output.accepted]
            canvas[decided] = draft[decided]
            is_masked[decided] = False
            entropy = np.zeros(count, dtype=np.float32)
            entropy[places] = output.entropy
            finished = not is_masked.any()
            self.end_step(
                step, len(quotas), canvas.copy(), draft, ~is_masked, entropy, finished,
                newly_accepted=len(decided),
            )  # fmt: skip
            if finished:
                break
        # The quotas add up to the canvas, so the last draft has no masks left.
        return draft, finished


class MaskedDiffusionSession(Session):
    """A conversation with a masked-diffusion model; its settings are MaskedDiffusionSettings.

    The canvas that a prompt ends in has only the positions behind it. `force_steps` of `generate`
    runs exactly so many steps a canvas, evenly split, without a threshold.
    """

    turn_class = MaskedDiffusionTurn
    model_class = MaskedDiffusionModel

    def truncate(self, length: int) -> None:
        """See `Session`. Of a block that is cut nothing stays cached: its positions saw the end."""
        super().truncate(length)
        if block := self.model.decoding.block_length:
            self.set_cached(self.cached // block * block)

    def room(self, prompt_tokens: int = 0) -> int:
        """See `Session`. Where blocks count from position 0, also what is left of the first one."""
        decoding, info = self.model.decoding, self.info
        known = self.length + prompt_tokens
        if block := decoding.block_length:
            return max(0, info.maximum_context // block * block - known)
        # All rows go through one call.
        free = min(info.maximum_context, decoding.prefill_length) - known
        return max(0, free // info.canvas_length) * info.canvas_length

    def canvas_count(self, known: int, max_new_tokens: int) -> int:
        """See `Session`."""
        begun = known % self.info.canvas_length if self.model.decoding.block_length else 0
        return super().canvas_count(known, begun + max_new_tokens)

    def settings_of_forced(self, settings: Any, steps: int) -> Any:
        """See `Session`."""
        settings = super().settings_of_forced(settings, steps)
        return replace(settings, steps_per_canvas=steps, threshold=NO_THRESHOLD)
