"""Puts DiffusionGemma together: its layers, the vocabulary head, the entropy-bound sampler."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import torch

from export.bundle import Experts, ModelInfo, Sampler, SpecialTokens
from export.expert_choice import choose_expert_computation
from export.head import DiffusionHead, head_example_inputs
from export.models.diffusion_gemma import EMBEDDING_NAME, DiffusionGemmaConfig, build_layers
from export.staging import (
    HEAD_INPUTS,
    HEAD_OUTPUTS,
    LAYERS_INPUTS,
    LAYERS_OUTPUTS,
    StagedModel,
    StageModule,
)
from export.uniform_diffusion import UniformDiffusionSettings
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
) -> StagedModel:
    """Build the two stages; see `export.models.stage_model`."""
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
    layers, notes = build_layers(
        checkpoint, maximum_context=maximum_context, computation=computation
    )
    head = DiffusionHead(
        checkpoint.get(EMBEDDING_NAME), soft_cap=config.soft_cap, canvas_length=canvas
    ).eval()
    tokens = torch.zeros(1, canvas, dtype=torch.int64)
    position = torch.zeros(1, dtype=torch.int64)
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
            StageModule(
                name="layers",
                role="layers",
                module=layers,
                example_inputs=(tokens, position, position, torch.zeros(1, canvas, hidden)),
                input_names=LAYERS_INPUTS,
                output_names=LAYERS_OUTPUTS,
                mutates_buffers=True,
            ),
            StageModule(
                name="head",
                role="head",
                module=head,
                example_inputs=head_example_inputs(canvas, hidden),
                input_names=HEAD_INPUTS,
                output_names=HEAD_OUTPUTS,
            ),
        ),
        notes=tuple(notes),
    )


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
