"""Puts HRM-Text together: embedding, both stacks and their schedule, the vocabulary head."""

from __future__ import annotations

from typing import Literal

import torch

from export.contract.bundle import Call, Decoding, Experts, ModelInfo
from export.models.defaults import (
    autoregressive_settings,
    special_tokens,
    truncated_sampler,
    truncates,
)
from export.models.hrm_text import (
    EMBEDDING_NAME,
    HEAD_NAME,
    HrmTextConfig,
    StackName,
    build_modules,
)
from export.models.staging import StagedModel, StageModule
from quantize.checkpoint import Checkpoint
from quantize.errors import CheckpointError

DEFAULT_CONTEXT = 512
"""Default maximum context: each run of a stack in a pass has a KV cache of its own, which at the
released sizes is 1.5 MiB a position."""
CAUSAL_PREFILL = 128
"""Most tokens in one call where the prompt is causal and can come in pieces."""

STACK_INPUTS = ("high", "low", "slot", "start", "block_length")


def stage_model(
    checkpoint: Checkpoint,
    *,
    maximum_context: int | None,
    experts: Literal["auto", "dense", "gather"],
    truncation: bool | None,
) -> StagedModel:
    """Build the four stages; see `export.models.stage_model`. There are no experts to compute."""
    from export.heads.token import autoregressive_head_stage

    config = HrmTextConfig.from_checkpoint_config(checkpoint.config)
    context = _context(config, maximum_context)
    # A bidirectional prompt must come whole: its first token depends on its last.
    prefill = context if config.prefix_lm else min(CAUSAL_PREFILL, context)
    modules = build_modules(checkpoint, maximum_context=context, prefill_length=prefill)
    table_name = EMBEDDING_NAME if config.tied_head else HEAD_NAME
    if checkpoint.shape(table_name) != (config.vocabulary_size, config.hidden_size):
        raise CheckpointError(
            f"tensor {table_name} has shape {list(checkpoint.shape(table_name))}, which does not "
            "fit config.json; take config and weights from one checkpoint"
        )
    tokens = torch.zeros(1, prefill, dtype=torch.int64)
    state = torch.zeros(1, prefill, config.hidden_size)
    number = torch.zeros(1, dtype=torch.int64)

    def stack(name: StackName) -> StageModule:
        return StageModule(
            name=name,
            role="layers",
            module=getattr(modules, name),
            example_inputs=(state, state, number, number, number + 1),
            input_names=STACK_INPUTS,
            output_names=(name,),
            mutates_buffers=True,
            dynamic={"high": {1: "tokens"}, "low": {1: "tokens"}},
        )

    settings = autoregressive_settings(checkpoint.generation_config)
    sampler = truncated_sampler("autoregressive", settings, truncation)
    return StagedModel(
        info=ModelInfo(
            family="hrm_text",
            name=checkpoint.folder.resolve().name,
            vocabulary_size=config.vocabulary_size,
            hidden_size=config.hidden_size,
            canvas_length=1,
            maximum_context=context,
        ),
        style="autoregressive",
        sampler=sampler,
        special_tokens=special_tokens(checkpoint.generation_config, checkpoint.config),
        experts=Experts(),
        stages=(
            StageModule(
                name="embed",
                role="layers",
                module=modules.embed,
                example_inputs=(tokens,),
                input_names=("tokens",),
                output_names=("high", "low"),
                dynamic={"tokens": {1: "tokens"}},
            ),
            stack("low"),
            stack("high"),
            autoregressive_head_stage(
                checkpoint.get(table_name),
                prefill,
                config.hidden_size,
                truncation=truncates(sampler),
            ),
        ),
        notes=(
            *modules.notes,
            f"the KV cache takes {config.kv_bytes(context)} bytes: {config.kv_bytes(1)} a "
            f"position, for {config.slots('low')} runs of the low and {config.slots('high')} of "
            "the high stack",
        ),
        decoding=Decoding(
            prefill_length=prefill,
            block_length=1,
            shift=1,
            bidirectional_prompt=config.prefix_lm,
        ),
        schedule=stack_schedule(config),
    )


def stack_schedule(config: HrmTextConfig) -> tuple[Call, ...]:
    """The runs of a pass: per high-level cycle, the low stack `low_cycles` times, then the high.

    Slots count from 0 in each stack, because each owns the KV caches of its own runs.
    """
    calls = [Call("embed")]
    for high_cycle in range(config.high_cycles):
        first = high_cycle * config.low_cycles
        calls += [Call("low", constants={"slot": first + i}) for i in range(config.low_cycles)]
        is_last = high_cycle == config.high_cycles - 1
        calls.append(
            Call(
                "high",
                outputs={"high": "hidden"} if is_last else {},
                constants={"slot": high_cycle},
            )
        )
    return tuple(calls)


def _context(config: HrmTextConfig, maximum_context: int | None) -> int:
    if maximum_context is None:
        return min(DEFAULT_CONTEXT, config.max_positions)
    if not 1 <= maximum_context <= config.max_positions:
        raise CheckpointError(
            f"maximum context {maximum_context} is not from 1 to the {config.max_positions} "
            "positions of config.json; give one that is"
        )
    return maximum_context
