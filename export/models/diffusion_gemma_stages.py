"""Puts DiffusionGemma together: its layers, the vocabulary head, the entropy-bound sampler."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.contract.manifest import Experts
from export.contract.styles.base import LAYERS_OUTPUTS
from export.contract.styles.uniform_diffusion import UniformDiffusion
from export.families.diffusion_gemma import EMBEDDING, DiffusionGemmaConfig
from export.families.expert_choice import ExpertComputation
from export.heads.uniform_diffusion import DiffusionHead
from export.models.blocks import FinalNorm
from export.models.building import BuildRequest, BuiltStages
from export.models.cutting import layer_stages, norm_stage
from export.models.diffusion_gemma import (
    CanvasEntry,
    LayerGroup,
    build_layers,
    kinds_of,
    load_weights,
    unused_notes,
)
from export.models.head_stages import uniform_diffusion_head_stage
from export.models.staging import StageModule
from export.models.weights import Weights
from quantize.checkpoint import Checkpoint


def build_stages(request: BuildRequest[DiffusionGemmaConfig]) -> BuiltStages:
    """See `export.models`."""
    checkpoint, config, context = request.checkpoint, request.config, request.context
    canvas, hidden = config.canvas_length, config.hidden_size
    choice = request.description.shape.expert_choice()
    computation = choice.computation if request.experts == "auto" else request.experts
    if request.layers_per_stage is None:
        module = build_layers(checkpoint, config, maximum_context=context, computation=computation)
        layers = [_all_layers(config, module)]
    else:
        layers = _cut_layers(checkpoint, config, context, computation, request.layers_per_stage)

    def head() -> nn.Module:
        return DiffusionHead(
            checkpoint.get(EMBEDDING), soft_cap=config.soft_cap, canvas_length=canvas
        ).eval()

    head_stage = uniform_diffusion_head_stage(head, canvas, hidden)
    return BuiltStages(
        (*layers, head_stage),
        unused_notes(request.unused_names()),
        Experts(computation, {"dense": choice.dense_ms, "gather": choice.gather_ms}),
    )


def _all_layers(config: DiffusionGemmaConfig, module: nn.Module) -> StageModule:
    """All layers with what is before and behind them as one stage."""
    return StageModule(
        name="layers",
        role="layers",
        module=module,
        example_inputs=_loop_inputs(config),
        input_names=UniformDiffusion.layers_inputs,
        output_names=LAYERS_OUTPUTS,
        mutates_buffers=True,
    )


def _loop_inputs(config: DiffusionGemmaConfig) -> tuple[Tensor, ...]:
    """Examples of what the loop gives: see `UniformDiffusion.layers_inputs`."""
    position = torch.zeros(1, dtype=torch.int64)
    tokens = torch.zeros(1, config.canvas_length, dtype=torch.int64)
    return tokens, position, position, torch.zeros(1, config.canvas_length, config.hidden_size)


def _cut_layers(
    checkpoint: Checkpoint,
    config: DiffusionGemmaConfig,
    maximum_context: int,
    computation: ExpertComputation,
    layers_per_stage: int,
) -> list[StageModule]:
    """The entry, the layers in groups, the final norm: each a stage, built when it is lowered."""

    def loaded(module: nn.Module, weights: Weights = checkpoint, first: int = 0) -> nn.Module:
        load_weights(module, weights, first)
        return module.eval()

    def layers(weights: Weights, first: int, end: int) -> nn.Module:
        group = config.layers[first:end]
        module = LayerGroup(config, group, maximum_context=maximum_context, computation=computation)
        return loaded(module, weights, first)

    position = torch.zeros(1, dtype=torch.int64)
    rows = torch.zeros(1, config.canvas_length, config.hidden_size)
    shared = {kind: _shared(config, maximum_context, kind) for kind in config.rotary}

    def inputs(first: int, end: int) -> dict[str, Tensor]:
        given = {"hidden": rows, "start": position, "denoise": position}
        for kind in kinds_of(config, config.layers[first:end]):
            given |= shared[kind]
        return given

    return [
        StageModule(
            name="entry",
            role="layers",
            module=lambda: loaded(CanvasEntry(config, maximum_context=maximum_context)),
            example_inputs=_loop_inputs(config),
            input_names=UniformDiffusion.layers_inputs,
            output_names=("hidden", *(name for kind in config.rotary for name in shared[kind])),
        ),
        *layer_stages(checkpoint, config.layers, layers_per_stage, build=layers, inputs=inputs),
        norm_stage(
            lambda: loaded(FinalNorm(config.hidden_size, config.norm_eps)),
            config.canvas_length,
            config.hidden_size,
        ),
    ]


def _shared(config: DiffusionGemmaConfig, maximum_context: int, kind: str) -> dict[str, Tensor]:
    """What the entry gives to layers of a kind: names and examples."""
    head_dim = next(layer.head_dim for layer in config.layers if layer.kind == kind)
    angles = torch.zeros(config.canvas_length, 1, head_dim // 2)
    return {
        f"{kind}_mask": torch.zeros(config.canvas_length, maximum_context),
        f"{kind}_cos": angles,
        f"{kind}_sin": angles,
    }
