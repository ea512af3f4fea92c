"""Autoregressive models: encode the prompt in chunks, then token by token.

A canvas is one token and a step is one pass of the layers over one token, so that results and
events read as those of diffusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.contract import philox
from export.contract.styles.autoregressive import Autoregressive
from export.host.loop_model import BlockModel
from export.host.session import Session, Turn
from quantize.errors import InputError


@dataclass(frozen=True)
class AutoregressiveHeadOutput:
    """One token, its log probability and the entropy of its distribution (nats, temperature 1)."""

    token: int
    log_prob: float
    entropy: float


class AutoregressiveModel(BlockModel):
    """The model as this loop calls it."""

    style = Autoregressive

    def head(
        self, hidden: Any, row: int, settings: np.ndarray, uniform: np.ndarray
    ) -> AutoregressiveHeadOutput:
        """Sample what follows the hidden state `row`; `settings` `[3]`, `uniform` `[1]` fp32."""
        named = self.run_head(hidden, np.array([row]), settings, uniform)
        return AutoregressiveHeadOutput(
            token=int(named["token"]),
            log_prob=float(named["log_prob"]),
            entropy=float(named["entropy"]),
        )


_UNUSED = np.zeros(1, dtype=np.float32)
_ACCEPTED = np.ones(1, dtype=bool)


class AutoregressiveTurn(Turn):
    """One call's work."""

    session: AutoregressiveSession
    _encoded: tuple[Any, int] | None = None
    """Hidden states and the row behind which the first token comes, if encoding made it."""

    def encode(self) -> None:
        """Commit all tokens but the last, which the next step runs.

        A prompt that is to be bidirectional is committed whole, and its last row is kept for the
        first step.
        """
        session, decoding = self.session, self.model.decoding
        length, layers = session.length, self.model.layers
        if decoding.bidirectional_prompt and session.cached == 0:
            session.bidirectional_tokens = length
            whole = self.info.maximum_context
            hidden = self.encode_up_to(length, length, lambda t, start: layers(t, start, whole))
            self._encoded = hidden, length - 1
        else:
            self.encode_up_to(
                length - 1, decoding.prefill_length, lambda t, start: layers(t, start, 1)
            )

    def denoise_canvas(self) -> tuple[np.ndarray, bool]:
        """See `Turn`. One token behind the last one known."""
        session = self.session
        if self._encoded is None:
            # Also where the cache holds the last token already, as after a cancelled step: its row
            # is computed again, to the same keys and values.
            last = session.length - 1
            hidden, row = self.run_layers(session.span(last), last, 1), 0
            session.set_cached(session.length)
        else:
            (hidden, row), self._encoded = self._encoded, None
        # A tenth of a millisecond that greedy decoding need not pay.
        is_random = self.settings.temperature > 0
        uniform = philox.uniforms(self.seed, session.canvases, 1, 1) if is_random else _UNUSED
        output: AutoregressiveHeadOutput = self.run_head(hidden, row, self.settings_array, uniform)
        token = np.array([output.token], dtype=np.int64)
        entropy = np.array([output.entropy], dtype=np.float32)
        self.end_step(1, 1, token, token, _ACCEPTED, entropy, True)
        return token, True

    def first_end(self, tokens: np.ndarray) -> int | None:
        """See `Turn`. Forced steps go on behind end tokens."""
        return super().first_end(tokens) if self.force_steps is None else None


class AutoregressiveSession(Session):
    """A conversation with an autoregressive model; its settings are AutoregressiveSettings.

    `force_steps` of `generate` makes it go on behind end tokens (for timing); its number does not
    matter, since each token takes one step.
    """

    turn_class = AutoregressiveTurn
    model_class = AutoregressiveModel
    bidirectional_tokens = 0
    """Tokens at the beginning that were encoded seeing each other."""

    def truncate(self, length: int) -> None:
        """See `Session`. Nothing stays cached of a bidirectional prompt that is cut: its keys and
        values depend on the tokens that go.
        """
        super().truncate(length)
        if length < self.bidirectional_tokens:
            self.bidirectional_tokens = 0
            self.set_cached(0)

    def check(self, prompt: Sequence[int], max_new_tokens: int, seed: int) -> int:
        """See `Session`. A bidirectional prompt goes through one call."""
        canvas_count = super().check(prompt, max_new_tokens, seed)
        decoding = self.model.decoding
        first = self.length + len(prompt)
        if decoding.bidirectional_prompt and self.cached == 0 and first > decoding.prefill_length:
            raise InputError(
                f"the prompt has {first} tokens, and the model sees at most "
                f"{decoding.prefill_length} of the first turn at once; shorten it, or give what is "
                "left in a second turn"
            )
        return canvas_count
