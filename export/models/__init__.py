"""The table of model families, by the `model_type` of a checkpoint's config.json."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

from quantize.checkpoint import Checkpoint
from quantize.errors import CheckpointError

FAMILIES = {
    "diffusion_gemma": "export.models.diffusion_gemma_stages",
    "gemma4": "export.models.gemma4_stages",
    "gemma4_text": "export.models.gemma4_stages",
    "hrm_text": "export.models.hrm_text_stages",
    # Dense decoders: autoregressive ones, then those of masked diffusion.
    "llama": "export.models.dense_stages",
    "qwen2": "export.models.dense_stages",
    "qwen3": "export.models.dense_stages",
    "Dream": "export.models.dense_stages",
    "Fast_dLLM_Qwen": "export.models.dense_stages",
    "a2d-llama": "export.models.dense_stages",
    "a2d-qwen2": "export.models.dense_stages",
    "a2d-qwen3": "export.models.dense_stages",
    "llada": "export.models.dense_stages",
    "sdar": "export.models.dense_stages",
}
"""Each module has `stage_model(checkpoint, *, maximum_context, experts, truncation)`; those of
`CUTTING` take `layers_per_stage` as well."""

CUTTING = frozenset(
    kind
    for kind, module in FAMILIES.items()
    if module in ("export.models.diffusion_gemma_stages", "export.models.dense_stages")
)
"""Families whose layers can be cut into stages."""


def stage_model(
    checkpoint: Checkpoint,
    *,
    maximum_context: int | None = None,
    experts: Literal["auto", "dense", "gather"] = "auto",
    truncation: bool | None = None,
    layers_per_stage: int | None = None,
) -> Any:
    """Build a checkpoint's stages with its weights loaded.

    Args:
        checkpoint: fp32 or int4.
        maximum_context: positions of the KV cache, canvas included; None: the family's default.
        experts: how a mixture of experts is computed; `auto` takes the cheaper by estimate.
        truncation: whether top-p and top-k are in the graph of the head, which costs time and
            memory; None: if the checkpoint's own settings use them.
        layers_per_stage: cut the layers into stages of so many, each with its own program; None:
            all layers are one stage.

    Returns:
        A `export.models.staging.StagedModel`.

    Raises:
        CheckpointError: an architecture that no family has, or a checkpoint that does not fit.
    """
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        code = ""
        if checkpoint.config.get("auto_map"):
            code = " and brings Python code (auto_map), which is never run"
        raise CheckpointError(
            f"config.json of {checkpoint.folder} has model_type {model_type!r}{code}; supported: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    family = import_module(FAMILIES[model_type])
    cut: dict[str, Any] = {}
    if model_type in CUTTING:
        cut["layers_per_stage"] = layers_per_stage
    elif layers_per_stage is not None:
        raise CheckpointError(
            f"the layers of {model_type} cannot be cut into stages of {layers_per_stage}; leave "
            f"that out, or take one of {', '.join(sorted(CUTTING))}"
        )
    return family.stage_model(
        checkpoint, maximum_context=maximum_context, experts=experts, truncation=truncation, **cut
    )
