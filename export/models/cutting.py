"""Cuts a model's layers into stages, those of one graph with one template, whatever the family."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from export.contract.styles.base import LAYERS_OUTPUTS
from export.models.staging import StageModule, Template
from export.models.weights import RenamedWeights, Weights, other_layers


def layer_stages(
    weights: Weights,
    layers: Sequence[Hashable],
    layers_per_stage: int,
    *,
    build: Callable[[Weights, int, int], nn.Module],
    inputs: Callable[[int, int], Mapping[str, Tensor]],
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> list[StageModule]:
    """Stages `layers_00`, ... of consecutive layers, each built when it is lowered.

    Args:
        weights: those of the model.
        layers: for each layer what decides its graph; groups with equal ones have one template.
        layers_per_stage: the last stage may have fewer.
        build: makes the module of layers first .. end - 1 from weights under their names.
        inputs: what these layers take: names and examples.
        dynamic: see `StageModule`.
    """
    stages = []
    firsts: dict[tuple[Hashable, ...], int] = {}
    for first in range(0, len(layers), layers_per_stage):
        group = tuple(layers[first : first + layers_per_stage])
        template_first = firsts.setdefault(group, first)
        template = Template(
            f"layers_{template_first:02}",
            functools.partial(_build, build, template_first, template_first + len(group)),
            RenamedWeights(weights, other_layers(template_first, first)),
        )
        given = inputs(first, first + len(group))
        stages.append(
            StageModule(
                name=f"layers_{first:02}",
                role="layers",
                module=functools.partial(template.build, template.weights),
                example_inputs=tuple(given.values()),
                input_names=tuple(given),
                output_names=LAYERS_OUTPUTS,
                mutates_buffers=True,
                dynamic=dynamic or {},
                template=template,
            )
        )
    return stages


def _build(
    build: Callable[[Weights, int, int], nn.Module], first: int, end: int, weights: Weights
) -> nn.Module:
    return build(weights, first, end)


def norm_stage(
    build: Callable[[], nn.Module],
    rows: int,
    hidden_size: int,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> StageModule:
    """The stage `norm` behind the last layer, of up to `rows` rows."""
    return StageModule(
        name="norm",
        role="layers",
        module=build,
        example_inputs=(torch.zeros(1, rows, hidden_size),),
        input_names=LAYERS_OUTPUTS,
        output_names=LAYERS_OUTPUTS,
        dynamic=dynamic or {},
    )
