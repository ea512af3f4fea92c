"""A loaded model (`Engine`) that conversations (`Session`) are begun with; the place to read first.

    engine = open_engine(open_bundle(folder))    # export.host.bundle_engine; loads the programs
    session = engine.session()
    result = session.generate(prompt_tokens, max_new_tokens=256, seed=1)

The engine owns the programs, their weights and the one KV cache, so one session at a time is in
use; a session owns its tokens. The loop of `generate`, whatever the style:

    tokens += prompt
    for each canvas that was asked for:
        layers(tokens that the KV cache does not hold yet)           # encode, in chunks
        canvas = random tokens | masks | nothing
        until the canvas is finished, or max_steps:
            hidden = layers(canvas)                                  # reads all weights once
            canvas, draft, finished = head(hidden, random numbers)   # the sampler is in the graph
        tokens += draft                                              # commit; an end token ends

The steps of each style are in `export.host.loops`, the loop is `Turn.run` of
`export.host.session`. No logits, weights or text are seen here, and no torch is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from export.contract.manifest import Decoding, ModelInfo, Sampler, SpecialTokens
from export.contract.styles import STYLES
from export.host.loop_model import Stages
from export.host.loops import SESSIONS
from export.host.session import Session
from quantize.errors import BundleError, InputError


class StreamedWeights(Protocol):
    """Weights that are mapped from a file, as `export.host.streaming.mapped_weights` does it."""

    def report(self, since: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """What is kept and what was streamed since an earlier report; None without a budget."""


@dataclass(frozen=True)
class Engine:
    """A loaded model with the settings of its sampler.

    model: as the style's loop calls it. settings: what the bundle states, the default of every
    session. settable: names of the settings that its program heeds; None: all. threads: of
    ExecuTorch; None for eager modules. weights: None unless they are mapped from a file.
    """

    session_class: type[Session]
    model: Any
    special_tokens: SpecialTokens
    settings: Any
    settable: frozenset[str] | None = None
    threads: int | None = None
    weights: StreamedWeights | None = None

    @property
    def info(self) -> ModelInfo:
        """The model's sizes."""
        return self.model.info

    def session(self) -> Session:
        """A conversation that knows nothing yet."""
        return self.session_class(self.model, self.special_tokens, self.settings)

    def settings_with(self, changes: Mapping[str, float]) -> Any:
        """The engine's settings with some replaced.

        Raises InputError for one that the program does not heed, and for its value.
        """
        names = [n for n in vars(self.settings) if self.settable is None or n in self.settable]
        if unknown := sorted(changes.keys() - set(names)):
            hint = "; export it with --truncation for top_p and top_k"
            raise InputError(
                f"the sampler of this model has no setting {', '.join(unknown)}; it has "
                f"{', '.join(names)}{hint if hasattr(self.settings, 'top_p') else ''}"
            )
        return replace(self.settings, **changes)


def check_style(what: object, style: str, info: ModelInfo, decoding: Decoding | None) -> None:
    """Raise BundleError for a style that is not run here, or lengths its loop cannot work with."""
    if style not in SESSIONS:
        raise BundleError(
            f"{what} generates by {style}, this program runs {', '.join(SESSIONS)}; "
            "update the program"
        )
    STYLES[style].check_decoding(what, info, decoding)


def engine_of(
    stages: Stages,
    style: str,
    sampler: Sampler,
    special_tokens: SpecialTokens,
    threads: int | None = None,
    weights: StreamedWeights | None = None,
) -> Engine:
    """The engine of loaded stages; BundleError for a sampler or settings that cannot be used."""
    settings = STYLES[style].read_settings(stages.info.name, sampler)
    session = SESSIONS[style]
    return Engine(
        session, session.model_class(stages), special_tokens, settings,
        frozenset(sampler.settings), threads, weights,
    )  # fmt: skip
