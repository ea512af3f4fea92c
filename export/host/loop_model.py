"""A model as the loops call it: arrays go in and come out, what passes between stages is opaque.

A style's class is in its file of `export.host.loops`; the stages behind it are a bundle's programs
(`bundle_engine`) or eager modules (`eager`). Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np

from export.contract.manifest import Decoding, ModelInfo
from export.contract.styles import Style


class Stages(Protocol):
    """The stages of one model, as `export.host.stages.LoadedStages`. They own its KV cache."""

    info: ModelInfo
    decoding: Decoding | None

    def layers(self, named: Mapping[str, Any]) -> Any:
        """One pass on the loop's arrays by name; returns hidden states `[1, N, H]`."""

    def head(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """The head on its inputs by name; returns its outputs by name, as tensors."""


class LoopModel:
    """Base of the styles' models, which have methods `layers` and `head` for their loops."""

    style: ClassVar[type[Style]]
    """What states the names of the tensors."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self.info = stages.info

    @property
    def decoding(self) -> Decoding:
        """How the loop uses the layers; uniform diffusion has none and does not ask."""
        assert self.stages.decoding is not None  # `Style.check_decoding` saw to it
        return self.stages.decoding

    def run_layers(self, *inputs: Any) -> Any:
        """A pass on the style's `layers_inputs`, in order; returns hidden states `[1, N, H]`."""
        return self.stages.layers(dict(zip(self.style.layers_inputs, inputs, strict=True)))

    def run_head(self, *inputs: Any) -> dict[str, Any]:
        """The head on the style's `head_inputs`, in order; returns its outputs by name."""
        return self.stages.head(dict(zip(self.style.head_inputs, inputs, strict=True)))


class BlockModel(LoopModel):
    """What masked diffusion and autoregressive models share: layers that see blocks."""

    def layers(self, tokens: np.ndarray, start: int, block_length: int) -> Any:
        """Run tokens `[N]` int64 at positions start .. start + N; returns hidden states for `head`.

        A position sees the block of `block_length` that it is in, and all blocks before, up to
        start + N; the keys and values of the N positions are kept until they are run again.
        """
        return self.run_layers(tokens[None], np.array([start]), np.array([block_length]))
