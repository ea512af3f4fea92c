"""Puts Gemma 4 together: its layers and the vocabulary head of autoregressive decoding."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import torch

from export.bundle import Decoding, Experts, ModelInfo, Sampler, SpecialTokens
from export.models.gemma4 import (
    LAYERS_PASS_INPUTS,
    LAYERS_PASS_OUTPUTS,
    WRAPPER_TYPE,
    Gemma4Config,
    build_layers,
)
from export.staging import StagedModel, StageModule
from quantize.checkpoint import Checkpoint
from quantize.errors import CheckpointError, InputError

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
) -> StagedModel:
    """Build the two stages; see `export.models.stage_model`. There are no experts to choose for."""
    # Imported here: it imports torchao, which refusals of a config should not wait for.
    from export.token_head import autoregressive_head_stage

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
    one = torch.ones(1, dtype=torch.int64)
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
        sampler=Sampler("autoregressive", _settings(checkpoint.generation_config)),
        special_tokens=_special_tokens(checkpoint),
        experts=Experts(),
        stages=(
            StageModule(
                name="layers",
                role="layers",
                module=layers,
                example_inputs=(torch.zeros(1, prefill, dtype=torch.int64), 0 * one, one),
                input_names=LAYERS_PASS_INPUTS,
                output_names=LAYERS_PASS_OUTPUTS,
                mutates_buffers=True,
                dynamic={"tokens": {1: "tokens"}},
            ),
            autoregressive_head_stage(
                checkpoint.get(config.head_table),
                prefill,
                config.hidden_size,
                soft_cap=config.soft_cap,
            ),
        ),
        notes=tuple(notes),
        decoding=Decoding(prefill_length=prefill, block_length=1, shift=1),
    )


def _settings(generation_config: dict[str, Any]) -> dict[str, float]:
    """The checkpoint's sampler defaults: greedy, unless it says that it samples."""
    from export.autoregressive import AutoregressiveSettings

    if not generation_config.get("do_sample"):
        return asdict(AutoregressiveSettings())
    found = {
        "temperature": generation_config.get("temperature", 1.0),
        "top_p": generation_config.get("top_p"),
        "top_k": generation_config.get("top_k"),
    }
    try:
        return asdict(AutoregressiveSettings(**{k: v for k, v in found.items() if v is not None}))
    except (InputError, TypeError) as error:
        raise CheckpointError(
            f"generation_config.json has sampler settings that cannot be used: {error}"
        ) from error


def _special_tokens(checkpoint: Checkpoint) -> SpecialTokens:
    """Ids of generation_config.json, or of config.json where it does not say."""
    config = checkpoint.config
    text = config["text_config"] if config["model_type"] == WRAPPER_TYPE else config

    def find(key: str) -> Any:
        for section in (checkpoint.generation_config, config, text):
            if section.get(key) is not None:
                return section[key]
        return None

    def is_id(value: Any) -> bool:
        return type(value) is int and value >= 0

    eos, pad, bos = (find(f"{name}_token_id") for name in ("eos", "pad", "bos"))
    ends = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    for name, ids in (("eos", ends), ("pad", (pad,)), ("bos", (bos,))):
        if not all(is_id(value) or (value is None and name != "eos") for value in ids):
            raise CheckpointError(
                f"the checkpoint has {name}_token_id = {list(ids)!r}; expected token ids"
            )
    return SpecialTokens(eos=ends, pad=pad, bos=bos)
