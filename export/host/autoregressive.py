"""The host's loop of autoregressive models: encode the prompt in chunks, then token by token.

A canvas is one token and a step is one pass of the layers over one token, so that results and
events read as those of diffusion.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from export.contract import philox
from export.contract.bundle import Decoding, ModelInfo, SpecialTokens
from export.contract.styles.autoregressive import AutoregressiveSettings
from export.contract.styles.base import require
from export.host.session import (
    CanvasDenoised,
    CanvasResult,
    Session,
    StepStats,
    Turn,
    ms_since,
)
from quantize.errors import InputError


@dataclass(frozen=True)
class AutoregressiveHeadOutput:
    """One token, its log probability and the entropy of its distribution (nats, temperature 1)."""

    token: int
    log_prob: float
    entropy: float


class AutoregressiveModel(Protocol):
    """A model as the loop sees it."""

    info: ModelInfo
    decoding: Decoding

    def layers(self, tokens: np.ndarray, start: int, block_length: int) -> Any:
        """Run tokens `[N]` int64 at positions start .. start + N; returns hidden states for `head`.

        A position sees the block of `block_length` that it is in, and all blocks before; the keys
        and values of the N positions are kept.
        """

    def head(
        self, hidden: Any, row: int, settings: np.ndarray, uniform: np.ndarray
    ) -> AutoregressiveHeadOutput:
        """Sample what follows the hidden state `row`; `settings` `[3]`, `uniform` `[1]` fp32."""


_UNUSED = np.zeros(1, dtype=np.float32)


class AutoregressiveTurn(Turn):
    """One call's work."""

    def __init__(self, session: Session, seed: int, settings: Any, *rest: Any) -> None:
        super().__init__(session, seed, settings, *rest)
        if self.force_steps is not None:
            require(self.force_steps >= 1, "force_steps", self.force_steps, "at least 1")
        self.settings_array = settings.as_array()
        self._last_hidden: tuple[Any, int] | None = None

    def encode(self) -> None:
        """Commit all tokens but the last, which the next step runs.

        A prompt that is to be bidirectional is committed whole, and its last row is kept for the
        first step.
        """
        session, decoding = self.session, self.model.decoding
        if decoding.bidirectional_prompt and session._cached == 0:
            block, end, most = self.info.maximum_context, len(session._tokens), len(session._tokens)
        else:
            block, end, most = 1, len(session._tokens) - 1, decoding.prefill_length
        total = end - session._cached
        done = 0
        while done < total:
            self.stop_if_cancelled()
            start = session._cached
            chunk = np.array(session._tokens[start : min(start + most, end)], dtype=np.int64)
            began = time.perf_counter()
            hidden = self.model.layers(chunk, start, block)
            done += len(chunk)
            if block != 1:
                session._prefix = len(chunk)
                self._last_hidden = hidden, len(chunk) - 1
            self.encoded(len(chunk), done, total, ms_since(began))

    def denoise_canvas(self, is_final: bool) -> tuple[CanvasResult, bool]:
        """One token behind the last one known; also whether it ends the text."""
        session = self.session
        index = session._canvases
        layers_ms = 0.0
        if self._last_hidden is None:
            self.stop_if_cancelled()
            # Also where the cache holds the last token already, as after a cancelled step: its row
            # is computed again, to the same keys and values.
            start = len(session._tokens) - 1
            last = np.array(session._tokens[start:], dtype=np.int64)
            began = time.perf_counter()
            self._last_hidden = self.model.layers(last, start, 1), 0
            layers_ms = ms_since(began)
            session._cached = start + 1
        self.stop_if_cancelled()
        hidden, row = self._last_hidden
        # A tenth of a millisecond that greedy decoding need not pay.
        is_random = self.settings.temperature > 0
        uniform = philox.uniforms(self.seed, index, 1, 1) if is_random else _UNUSED
        began = time.perf_counter()
        output = self.model.head(hidden, row, self.settings_array, uniform)
        head_ms = ms_since(began)
        self._last_hidden = None
        step = StepStats(layers_ms, head_ms, 1, output.entropy)
        self.drafted()
        token = np.array([output.token], dtype=np.int64)
        self.on_event(
            CanvasDenoised(
                index,
                1,
                1,
                token,
                token,
                np.ones(1, dtype=bool),
                np.array([output.entropy], dtype=np.float32),
                layers_ms,
                head_ms,
                True,
            )
        )
        has_ended = self.force_steps is None and output.token in session.special_tokens.eos
        is_last = has_ended or is_final
        return self.commit(token, [step], converged=True, is_last=is_last), has_ended


class AutoregressiveSession(Session):
    """A conversation with an autoregressive model; its settings are AutoregressiveSettings.

    `force_steps` of `generate` makes it go on behind end tokens (for timing); its number does not
    matter, since each token takes one step.
    """

    turn_class = AutoregressiveTurn

    def __init__(
        self,
        model: AutoregressiveModel,
        special_tokens: SpecialTokens | None = None,
        settings: AutoregressiveSettings | None = None,
    ) -> None:
        super().__init__(
            model, special_tokens or SpecialTokens(), settings or AutoregressiveSettings()
        )
        self._prefix = 0
        """Tokens at the beginning that were encoded seeing each other."""

    def truncate(self, length: int) -> None:
        """See `Session`. Nothing stays cached of a bidirectional prompt that is cut: its keys and
        values depend on the tokens that go.
        """
        super().truncate(length)
        if length < self._prefix:
            self._cached = self._prefix = 0

    def _check(self, prompt: list[int], max_new_tokens: int, seed: int) -> int:
        canvas_count = super()._check(prompt, max_new_tokens, seed)
        decoding = self.model.decoding
        first = len(self._tokens) + len(prompt)
        if decoding.bidirectional_prompt and self._cached == 0 and first > decoding.prefill_length:
            raise InputError(
                f"the prompt has {first} tokens, and the model sees at most "
                f"{decoding.prefill_length} of the first turn at once; shorten it, or give what is "
                "left in a second turn"
            )
        return canvas_count
