"""What a family's builder of stages is given, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from torch import Tensor

from export.contract.manifest import Experts, Sampler
from export.families.description import Description, Sizes
from export.families.samplers import TRUNCATION
from export.models.head_stages import autoregressive_head_stage, masked_head_stage
from export.models.staging import StageModule
from quantize.checkpoint import Checkpoint

Config = TypeVar("Config", bound=Sizes)


@dataclass(frozen=True)
class BuildRequest(Generic[Config]):
    """A checkpoint, its description, and what was asked for.

    sampler: with the settings that the graph heeds. mask_token: None where nothing is masked.
    experts: how a mixture of experts is computed; `auto` takes the cheaper by estimate.
    layers_per_stage: None for all layers in one stage.
    """

    checkpoint: Checkpoint
    description: Description[Config]
    sampler: Sampler
    mask_token: int | None
    experts: Literal["auto", "dense", "gather"]
    layers_per_stage: int | None

    @property
    def config(self) -> Config:
        """What the graphs are built from."""
        return self.description.config

    @property
    def context(self) -> int:
        """Positions of the KV cache."""
        return self.description.shape.default_context

    @property
    def prefill_length(self) -> int:
        """Most rows of one call of the layers."""
        return self.description.shape.prefill_length(self.context)

    def unused_names(self) -> set[str]:
        """The checkpoint's tensors that the family does not list among its weights."""
        used = {weight.name for weight in self.description.shape.weights}
        return self.checkpoint.names() - used

    def token_head(self, table: Tensor) -> StageModule:
        """The stage `head` over the vocabulary's `table` `[V, H]`, autoregressive or masked."""
        shape = self.description.shape
        truncation = set(TRUNCATION) <= self.sampler.settings.keys()
        if self.mask_token is None:
            return autoregressive_head_stage(
                table,
                self.prefill_length,
                shape.hidden_size,
                truncation=truncation,
                soft_cap=shape.soft_cap,
            )
        return masked_head_stage(
            table,
            self.prefill_length,
            shape.canvas_length,
            shape.hidden_size,
            mask_token=self.mask_token,
            truncation=truncation,
            soft_cap=shape.soft_cap,
        )


@dataclass(frozen=True)
class BuiltStages:
    """A model's stages in their order, the head last, and notes for the user."""

    stages: tuple[StageModule, ...]
    notes: list[str] = field(default_factory=list)
    experts: Experts = field(default_factory=Experts)
