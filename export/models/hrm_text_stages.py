"""Puts HRM-Text together: embedding, both stacks, the vocabulary head."""

from __future__ import annotations

import torch

from export.families.hrm_text import HrmTextConfig, StackName
from export.models.building import BuildRequest, BuiltStages
from export.models.hrm_text import build_modules
from export.models.staging import StageModule
from export.models.weights import read_weight

STACK_INPUTS = ("high", "low", "slot", "start", "block_length")


def build_stages(request: BuildRequest[HrmTextConfig]) -> BuiltStages:
    """See `export.models`; the order in which the stacks run is the description's schedule."""
    checkpoint, config, prefill = request.checkpoint, request.config, request.prefill_length
    modules = build_modules(
        checkpoint, config, maximum_context=request.context, prefill_length=prefill
    )
    table_shape = (config.vocabulary_size, config.hidden_size)
    table = read_weight(checkpoint, config.head_table, table_shape)
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

    embed = StageModule(
        name="embed",
        role="layers",
        module=modules.embed,
        example_inputs=(torch.zeros(1, prefill, dtype=torch.int64),),
        input_names=("tokens",),
        output_names=("high", "low"),
        dynamic={"tokens": {1: "tokens"}},
    )
    kv_bytes = request.description.shape.kv_bytes
    caches = (
        f"the KV cache takes {kv_bytes(request.context)} bytes: {kv_bytes(1)} a position, for "
        f"{config.slots('low')} runs of the low and {config.slots('high')} of the high stack"
    )
    return BuiltStages(
        (embed, stack("low"), stack("high"), request.token_head(table)), [*modules.notes, caches]
    )
