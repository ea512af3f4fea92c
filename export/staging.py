"""A model cut into stages, ready to be run eagerly or lowered; what every family builds.

Which families there are is the table in `export/models/__init__.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from export.bundle import Experts, ModelInfo, Role, Sampler, SpecialTokens, Style


@dataclass(frozen=True)
class StageModule:
    """One stage: its module, the inputs to trace it with, and the names that pass between stages.

    `mutates_buffers` tells a stage that owns a KV cache.
    """

    name: str
    role: Role
    module: nn.Module
    example_inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    mutates_buffers: bool = False


@dataclass(frozen=True)
class StagedModel:
    """Everything of a bundle's manifest that the model knows, with its stages in order.

    `notes` are sentences for the user about what was left out on purpose.
    """

    info: ModelInfo
    style: Style
    sampler: Sampler
    special_tokens: SpecialTokens
    experts: Experts
    stages: tuple[StageModule, ...]
    notes: tuple[str, ...] = ()
