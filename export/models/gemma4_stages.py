"""Puts Gemma 4 together: its layers and the vocabulary head of autoregressive decoding."""

from __future__ import annotations

from typing import Literal

from export.contract.bundle import Decoding, Experts, ModelInfo
from export.models.defaults import (
    autoregressive_settings,
    special_tokens,
    truncated_sampler,
    truncates,
)
from export.models.gemma4 import (
    WRAPPER_TYPE,
    Gemma4Config,
    build_layers,
)
from export.models.staging import StagedModel, block_layers_stage
from quantize.checkpoint import Checkpoint
from quantize.errors import CheckpointError

DEFAULT_CONTEXT = 4096
"""Default maximum context in positions, where the checkpoint allows it."""
PREFILL_LENGTH = 128
"""Most tokens of one call: enough that arithmetic and not the reading of weights takes the time,
few enough that the attention scores `[heads * 128, context]` stay small."""


def stage_model(
    checkpoint: Checkpoint,
    *,
    maximum_context: int | None,
    experts: Literal["auto", "dense", "gather"],
    truncation: bool | None,
) -> StagedModel:
    """Build the two stages; see `export.models.stage_model`. There are no experts to choose for."""
    # Imported here: it imports torchao, which refusals of a config should not wait for.
    from export.heads.token import autoregressive_head_stage

    config = Gemma4Config.from_checkpoint_config(checkpoint.config)
    if maximum_context is None:
        maximum_context = min(DEFAULT_CONTEXT, config.max_positions)
    if not 0 < maximum_context <= config.max_positions:
        raise CheckpointError(
            f"maximum context {maximum_context} does not fit the {config.max_positions} positions "
            "of config.json; give at least 1 and at most that"
        )
    prefill = min(PREFILL_LENGTH, maximum_context)
    layers, notes = build_layers(
        checkpoint, maximum_context=maximum_context, prefill_length=prefill
    )
    table_shape = (config.vocabulary_size, config.hidden_size)
    if tuple(checkpoint.shape(config.head_table)) != table_shape:
        raise CheckpointError(
            f"tensor {config.head_table} has shape {list(checkpoint.shape(config.head_table))}, "
            f"config.json says {list(table_shape)}; take config and weights from one checkpoint"
        )
    whole = checkpoint.config
    text = whole["text_config"] if whole["model_type"] == WRAPPER_TYPE else whole
    settings = autoregressive_settings(checkpoint.generation_config)
    sampler = truncated_sampler("autoregressive", settings, truncation)
    return StagedModel(
        info=ModelInfo(
            family="gemma4",
            name=checkpoint.folder.resolve().name,
            vocabulary_size=config.vocabulary_size,
            hidden_size=config.hidden_size,
            canvas_length=1,
            maximum_context=maximum_context,
        ),
        style="autoregressive",
        sampler=sampler,
        special_tokens=special_tokens(checkpoint.generation_config, whole, text),
        experts=Experts(),
        stages=(
            block_layers_stage(layers, prefill),
            autoregressive_head_stage(
                checkpoint.get(config.head_table),
                prefill,
                config.hidden_size,
                truncation=truncates(sampler),
                soft_cap=config.soft_cap,
            ),
        ),
        notes=tuple(notes),
        decoding=Decoding(prefill_length=prefill, block_length=1, shift=1),
    )
