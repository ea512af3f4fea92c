"""Puts DiffusionGemma together: its layers, the vocabulary head, the entropy-bound sampler."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from export.contract.bundle import Experts, ModelInfo, Sampler, SpecialTokens
from export.contract.styles.base import LAYERS_OUTPUTS
from export.contract.styles.uniform_diffusion import UniformDiffusion, UniformDiffusionSettings
from export.families.expert_choice import ExpertComputation, choose_expert_computation
from export.heads.uniform_diffusion import DiffusionHead, head_example_inputs
from export.models.blocks import FinalNorm
from export.models.cutting import layer_stages, norm_stage
from export.models.diffusion_gemma import (
    EMBEDDING_NAME,
    CanvasEntry,
    DiffusionGemmaConfig,
    LayerGroup,
    build_layers,
    check_context,
    kinds_of,
    load_weights,
    unused_notes,
    used_names,
)
from export.models.staging import StagedModel, StageModule
from export.models.weights import Weights
from quantize.checkpoint import Checkpoint
from quantize.errors import CheckpointError, InputError

DEFAULT_CANVASES = 16
"""Default maximum context, in canvases: 4096 positions at the released canvas of 256."""


def stage_model(
    checkpoint: Checkpoint,
    *,
    maximum_context: int | None,
    experts: Literal["auto", "dense", "gather"],
    truncation: bool | None,
    layers_per_stage: int | None,
) -> StagedModel:
    """Build the stages; see `export.models.stage_model`."""
    config = DiffusionGemmaConfig.from_checkpoint_config(checkpoint.config)
    if truncation:
        raise CheckpointError(
            "the sampler of diffusion_gemma has no top-p and top-k; leave out --truncation"
        )
    canvas, hidden = config.canvas_length, config.hidden_size
    if maximum_context is None:
        maximum_context = min(DEFAULT_CANVASES * canvas, config.max_positions)
    if maximum_context > config.max_positions:
        raise CheckpointError(
            f"maximum context {maximum_context} exceeds the {config.max_positions} positions of "
            "config.json; give at most that"
        )
    choice = choose_expert_computation(
        tokens=canvas,
        hidden_size=hidden,
        expert_size=config.expert_size,
        num_experts=config.num_experts,
        top_k=config.top_k,
    )
    computation = choice.computation if experts == "auto" else experts
    check_context(config, maximum_context)
    if layers_per_stage is None:
        module, notes = build_layers(
            checkpoint, maximum_context=maximum_context, computation=computation
        )
        layers: list[StageModule] = [_all_layers(config, module)]
    else:
        layers = _cut_layers(checkpoint, config, maximum_context, computation, layers_per_stage)
        notes = unused_notes(checkpoint.names() - used_names(config))

    def head() -> torch.nn.Module:
        return DiffusionHead(
            checkpoint.get(EMBEDDING_NAME), soft_cap=config.soft_cap, canvas_length=canvas
        ).eval()

    return StagedModel(
        info=ModelInfo(
            family="diffusion_gemma",
            name=checkpoint.folder.resolve().name,
            vocabulary_size=config.vocabulary_size,
            hidden_size=hidden,
            canvas_length=canvas,
            maximum_context=maximum_context,
        ),
        style="uniform_diffusion",
        sampler=Sampler("entropy_bound", asdict(_settings(checkpoint.generation_config))),
        special_tokens=_special_tokens(checkpoint),
        experts=Experts(computation, {"dense": choice.dense_ms, "gather": choice.gather_ms}),
        stages=(
            *layers,
            StageModule(
                name="head",
                role="head",
                module=head,
                example_inputs=head_example_inputs(canvas, hidden),
                input_names=UniformDiffusion.head_inputs,
                output_names=UniformDiffusion.head_outputs,
            ),
        ),
        notes=tuple(notes),
    )


def _all_layers(config: DiffusionGemmaConfig, module: torch.nn.Module) -> StageModule:
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

    def entry() -> torch.nn.Module:
        module = CanvasEntry(config, maximum_context=maximum_context)
        load_weights(module, checkpoint)
        return module.eval()

    def layers(weights: Weights, first: int, end: int) -> torch.nn.Module:
        module = LayerGroup(
            config,
            config.layers[first:end],
            maximum_context=maximum_context,
            computation=computation,
        )
        load_weights(module, weights, first)
        return module.eval()

    def norm() -> torch.nn.Module:
        module = FinalNorm(config.hidden_size, config.norm_eps)
        load_weights(module, checkpoint)
        return module.eval()

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
            module=entry,
            example_inputs=_loop_inputs(config),
            input_names=UniformDiffusion.layers_inputs,
            output_names=("hidden", *(name for kind in config.rotary for name in shared[kind])),
        ),
        *layer_stages(checkpoint, config.layers, layers_per_stage, build=layers, inputs=inputs),
        norm_stage(norm, config.canvas_length, config.hidden_size),
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


def _settings(generation_config: dict[str, Any]) -> UniformDiffusionSettings:
    """The checkpoint's sampler defaults; what it leaves open is transformers' default."""
    sampler = generation_config.get("sampler_config") or {}
    found = {
        "max_steps": generation_config.get("max_denoising_steps"),
        "t_min": generation_config.get("t_min"),
        "t_max": generation_config.get("t_max"),
        "entropy_bound": sampler.get("entropy_bound"),
        "stability_threshold": generation_config.get("stability_threshold"),
        "confidence_threshold": generation_config.get("confidence_threshold"),
    }
    kind = sampler.get("_cls_name", "EntropyBoundSamplerConfig")
    if kind != "EntropyBoundSamplerConfig":
        raise CheckpointError(
            f"generation_config.json asks for the sampler {kind!r}; supported: "
            "'EntropyBoundSamplerConfig'"
        )
    try:
        return UniformDiffusionSettings(**{k: v for k, v in found.items() if v is not None})
    except (InputError, TypeError) as error:
        raise CheckpointError(
            f"generation_config.json has sampler settings that cannot be used: {error}"
        ) from error


def _special_tokens(checkpoint: Checkpoint) -> SpecialTokens:
    """Ids of generation_config.json, or of config.json where it does not say."""
    text = checkpoint.config["text_config"]

    def find(key: str) -> Any:
        value = checkpoint.generation_config.get(key)
        return text.get(key) if value is None else value

    eos = find("eos_token_id")
    if eos is None:
        eos = ()
    return SpecialTokens(
        eos=(eos,) if isinstance(eos, int) else tuple(eos),
        pad=find("pad_token_id"),
        bos=find("bos_token_id"),
    )
