"""Shows a canvas being denoised, live in a terminal or as plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from export.host.generation import (
    CanvasCommitted,
    CanvasDenoised,
    CanvasStarted,
    Event,
    PromptEncoded,
)

BAR_WIDTH = 16
SHOWN_STEP_S = 0.08
"""A step stays on the screen at least this long; a small model's would flicker past."""


class LiveCanvas:
    """A context manager whose `on_event` redraws the canvas in place.

    Accepted positions stand in bold, the noise around them dim; committed text is plain, and the
    token `padding` is a dot.
    """

    def __init__(
        self,
        console: Console,
        token_texts: Callable[[Sequence[int]], list[str]],
        padding: int | None = None,
    ) -> None:
        self._token_texts = token_texts
        self._padding = padding
        self._committed = Text()
        self._live = Live(console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> LiveCanvas:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def on_event(self, event: Event) -> None:
        """Draw what happened."""
        if isinstance(event, PromptEncoded):
            self._draw(Text(f"prompt: {event.done} of {event.total} tokens encoded", style="cyan"))
        elif isinstance(event, CanvasStarted):
            noise = self._styled(event.tokens.tolist(), [False] * len(event.tokens))
            self._draw(Text(f"canvas {event.canvas + 1}, all noise", style="cyan"), noise)
        elif isinstance(event, CanvasDenoised):
            self._draw(_status(event), self._styled(event.tokens.tolist(), event.accepted.tolist()))
            if len(event.tokens) == 1:
                return  # a token at a time needs no help to be seen
            time.sleep(max(0.0, SHOWN_STEP_S - (event.layers_ms + event.head_ms) / 1000))
        elif isinstance(event, CanvasCommitted):
            self._committed.append("".join(self._pieces(event.tokens.tolist())))
            self._draw()

    def _styled(self, tokens: Sequence[int], accepted: Sequence[bool]) -> Text:
        text = Text()
        for piece, is_accepted in zip(self._pieces(tokens), accepted, strict=True):
            text.append(piece, style="bold" if is_accepted else "dim")
        return text

    def _pieces(self, tokens: Sequence[int]) -> list[str]:
        return [
            "·" if token == self._padding else _visible(piece)
            for token, piece in zip(tokens, self._token_texts(tokens), strict=True)
        ]

    def _draw(self, status: Text | None = None, canvas: Text | None = None) -> None:
        lines: list[RenderableType] = [status] if status is not None else []
        lines.append(self._committed + canvas if canvas is not None else self._committed)
        self._live.update(Group(*lines), refresh=True)


class PlainSteps:
    """The same for a place that is no terminal: one line a step, none for canvases of one token."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> PlainSteps:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def on_event(self, event: Event) -> None:
        """Print a line about a finished step or canvas."""
        if isinstance(event, CanvasDenoised | CanvasCommitted) and len(event.tokens) == 1:
            return
        if isinstance(event, CanvasDenoised):
            self._console.print(_status(event), soft_wrap=True)
        elif isinstance(event, CanvasCommitted):
            self._console.print(
                f"canvas {event.canvas + 1} committed after {event.steps} steps", highlight=False
            )


def _status(event: CanvasDenoised) -> Text:
    size, accepted = len(event.tokens), int(event.accepted.sum())
    entropy = float(event.entropy.mean())
    return Text(
        f"canvas {event.canvas + 1} step {event.step:>2}/{event.max_steps} "
        f"{_bar(accepted / size)} {accepted:>3}/{size} accepted  "
        f"{entropy:5.3f} nats  {event.layers_ms + event.head_ms:6.1f} ms",
        style="cyan",
        no_wrap=True,
    )


def _bar(share: float) -> str:
    filled = math.floor(share * BAR_WIDTH)
    return "█" * filled + "░" * (BAR_WIDTH - filled)


def _visible(piece: str) -> str:
    """A token's text without what would move the terminal's cursor."""
    return "".join("↵" if c == "\n" else c if c.isprintable() else "·" for c in piece)
