"""A model cut into stages, ready to be run eagerly or lowered; what every family builds.

Which families there are is the table in `export/models/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from export.contract.manifest import (
    Call,
    Decoding,
    Experts,
    ModelInfo,
    Role,
    Sampler,
    SpecialTokens,
    StyleName,
)
from export.contract.styles.autoregressive import Autoregressive
from export.contract.styles.base import LAYERS_OUTPUTS

if TYPE_CHECKING:  # it imports torchao: 80 MB that a process which only runs bundles must not have
    from export.models.weights import Weights


@dataclass(frozen=True)
class Template:
    """What stages of one graph share, which differ in their weights alone and are lowered once.

    `name` is that of the first of them. `build` makes the module from weights under that stage's
    names; `weights` are the stage's own under those names.
    """

    name: str
    build: Callable[[Weights], nn.Module]
    weights: Weights


@dataclass(frozen=True)
class StageModule:
    """One stage: its module, the inputs to trace it with, and the names that pass between stages.

    `module` may be what builds the module, so that not all need be held at once: see `load`.
    `mutates_buffers` is set for a stage that owns a KV cache. `dynamic` is, for an input, axis ->
    name of a length that may vary from 1 to that of the example; the same name is the same length,
    and `3*name` is three times it. `template` is None for a stage whose graph no other has.
    """

    name: str
    role: Role
    module: nn.Module | Callable[[], nn.Module]
    example_inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    mutates_buffers: bool = False
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    template: Template | None = None

    def load(self) -> nn.Module:
        """Return the module, built now if `module` builds it; it is not kept."""
        return self.module if isinstance(self.module, nn.Module) else self.module()


@dataclass(frozen=True)
class StagedModel:
    """Everything of a bundle's manifest that the model knows, with its stages in order.

    `notes` are sentences for the user about what was left out on purpose.
    """

    info: ModelInfo
    style: StyleName
    sampler: Sampler
    special_tokens: SpecialTokens
    experts: Experts
    stages: tuple[StageModule, ...]
    notes: tuple[str, ...] = ()
    decoding: Decoding | None = None
    schedule: tuple[Call, ...] = ()


def block_layers_stage(module: nn.Module, prefill_length: int) -> StageModule:
    """The stage "layers" of masked and autoregressive models, for up to `prefill_length` tokens."""
    return StageModule(
        name="layers",
        role="layers",
        module=module,
        example_inputs=(
            torch.zeros(1, prefill_length, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
            torch.ones(1, dtype=torch.int64),
        ),
        input_names=Autoregressive.layers_inputs,
        output_names=LAYERS_OUTPUTS,
        mutates_buffers=True,
        dynamic={"tokens": {1: "tokens"}},
    )
