"""Writes the events of a generation as those of the protocol, those that cost time at a pace."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from export.contract.manifest import SpecialTokens
from export.host.generation import CanvasCommitted, CanvasDenoised, Event, PromptEncoded
from export.host.runner.files import EventsFile
from export.host.runner.machine import read_temperatures
from export.host.tokenizer import TextTokenizer

TEXT_INTERVAL_S = 0.1
"""Between two `text` events: each decodes the whole text, and a canvas may be one token."""
TEMPERATURE_INTERVAL_S = 1.0
"""Between two readings of the thermal zones, which are files."""
BRIEF_INTERVAL_S = 1.0
"""Between two events of the loop while several prompts are answered."""
_MAXIMUM_TEXT = 200_000
"""Characters of a `text` event: four bytes each, and escaped, they fit in a line."""


class Interval:
    """Whether something that costs time is due again."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._last_s = -math.inf

    def is_over(self) -> bool:
        """Whether it is over; if so, another begins."""
        now_s = time.monotonic()
        if now_s - self._last_s < self.seconds:
            return False
        self._last_s = now_s
        return True


class Progress:
    """What is reported while prompts are answered."""

    def __init__(
        self,
        events: EventsFile,
        special_tokens: SpecialTokens,
        tokenizer: TextTokenizer | None,
        thermal_folder: Path,
    ) -> None:
        self.encodings = 0
        """Chunks encoded so far."""
        self._events = events
        self._special_tokens = special_tokens
        self._tokenizer = tokenizer
        self._thermal_folder = thermal_folder
        self._tokens: list[int] = []
        self._text = Interval(TEXT_INTERVAL_S)
        self._temperature = Interval(TEMPERATURE_INTERVAL_S)
        self._brief = Interval(BRIEF_INTERVAL_S)

    def every_event(self, event: Event) -> None:
        """Of the only prompt: write all; the loop's clock does not run meanwhile."""
        match event:
            case PromptEncoded():
                self.encodings += 1
                self._events("prefill", done=event.done, total=event.total, ms=event.ms)
            case CanvasDenoised():
                self._events(
                    "step",
                    canvas=event.canvas,
                    step=event.step,
                    max_steps=event.max_steps,
                    layers_ms=event.layers_ms,
                    head_ms=event.head_ms,
                    accepted=int(event.accepted.sum()),
                    mean_entropy=float(event.entropy.mean()),
                    finished=event.finished,
                )
            case CanvasCommitted():
                tokens = event.tokens.tolist()
                self._events(
                    "canvas",
                    canvas=event.canvas,
                    steps=event.steps,
                    new_tokens=sum(token != self._special_tokens.pad for token in tokens),
                    is_last=event.is_last,
                )
                self._tokens += tokens
                if event.is_last or self._text.is_over():
                    self._write_text(self._special_tokens.eos)
                self.temperature()

    def brief(self, event: Event) -> None:
        """Of one of several prompts: count, and write enough to show that the run is alive."""
        if isinstance(event, PromptEncoded | CanvasDenoised) and self._brief.is_over():
            self.every_event(event)
        else:
            self.encodings += isinstance(event, PromptEncoded)

    def temperature(self) -> None:
        """Write the temperatures, if they are due and there are any."""
        if self._temperature.is_over() and (zones := read_temperatures(self._thermal_folder)):
            self._events("temperature", zones=zones)

    def _write_text(self, eos: Sequence[int]) -> None:
        if self._tokenizer is None:
            return
        ends = (i for i, token in enumerate(self._tokens) if token in eos)
        text = self._tokenizer.decode(self._tokens[: next(ends, len(self._tokens))])
        if len(text) <= _MAXIMUM_TEXT:
            self._events("text", text=text)
