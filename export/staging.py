"""A model cut into stages, ready to be run eagerly or lowered; what every family builds.

Which families there are is the table in `export/models/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from export.bundle import Call, Decoding, Experts, ModelInfo, Role, Sampler, SpecialTokens, Style


@dataclass(frozen=True)
class StageModule:
    """One stage: its module, the inputs to trace it with, and the names that pass between stages.

    `mutates_buffers` tells a stage that owns a KV cache. `dynamic` is, for an input, axis -> name
    of a length that may vary from 1 to that of the example; the same name is the same length.
    """

    name: str
    role: Role
    module: nn.Module
    example_inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    mutates_buffers: bool = False
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


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
    decoding: Decoding | None = None
    schedule: tuple[Call, ...] = ()
