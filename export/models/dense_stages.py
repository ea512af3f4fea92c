"""Puts the dense decoders together: autoregressive ones, and the masked-diffusion formats."""

from __future__ import annotations

import torch
from torch import nn

from export.contract.styles.autoregressive import Autoregressive
from export.families.dense import DenseConfig
from export.models.blocks import FinalNorm
from export.models.building import BuildRequest, BuiltStages
from export.models.cutting import layer_stages, norm_stage
from export.models.dense_decoder import (
    DenseEntry,
    LayerGroup,
    build_layers,
    check_vocabulary,
    load_weights,
    unused_notes,
)
from export.models.staging import StageModule, block_layers_stage
from export.models.weights import Weights, read_weight
from quantize.checkpoint import Checkpoint
from quantize.errors import CheckpointError


def build_stages(request: BuildRequest[DenseConfig]) -> BuiltStages:
    """See `export.models`."""
    checkpoint, config = request.checkpoint, request.config
    notes = unused_notes(checkpoint, request.unused_names())
    context, prefill = request.context, request.prefill_length
    if request.layers_per_stage is None:
        module = build_layers(checkpoint, config, maximum_context=context, prefill_length=prefill)
        layers = [block_layers_stage(module, prefill)]
    else:
        check_vocabulary(checkpoint, config)
        layers = _cut_layers(
            checkpoint,
            config,
            request.layers_per_stage,
            maximum_context=context,
            prefill_length=prefill,
        )
    head = request.token_head(head_table(checkpoint, config))
    return BuiltStages((*layers, head), notes)


def head_table(checkpoint: Checkpoint, config: DenseConfig) -> torch.Tensor:
    """The vocabulary head's table: the embedding's if they are tied, or no head is stored.

    Raises CheckpointError if config.json says that they are not tied and the head is missing.
    """
    is_stored = config.own_head in checkpoint.names()
    if config.ties or (config.ties is None and not is_stored):
        return checkpoint.get(config.embedding)
    if not is_stored:
        raise CheckpointError(
            f"{checkpoint.folder} has no tensor {config.own_head} and config.json says that the "
            "head is not tied to the embedding; fetch the checkpoint again"
        )
    return read_weight(checkpoint, config.own_head, (config.vocabulary_size, config.hidden_size))


def _cut_layers(
    checkpoint: Checkpoint,
    config: DenseConfig,
    layers_per_stage: int,
    *,
    maximum_context: int,
    prefill_length: int,
) -> list[StageModule]:
    """The entry, the layers in groups, the final norm: each a stage, built when it is lowered."""
    sizes = {"maximum_context": maximum_context, "prefill_length": prefill_length}

    def loaded(module: nn.Module, weights: Weights = checkpoint, first: int = 0) -> nn.Module:
        load_weights(module, config, weights, first)
        return module.eval()

    start = torch.zeros(1, dtype=torch.int64)
    angles = torch.zeros(prefill_length, 1, config.head_dim // 2)
    shared = {
        "mask": torch.zeros(config.kv_groups * prefill_length, maximum_context),
        "cos": angles,
        "sin": angles,
    }
    given = {"hidden": torch.zeros(1, prefill_length, config.hidden_size), "start": start, **shared}
    rows = {"hidden": {1: "tokens"}}
    return [
        StageModule(
            name="entry",
            role="layers",
            module=lambda: loaded(DenseEntry(config, **sizes)),
            example_inputs=(torch.zeros(1, prefill_length, dtype=torch.int64), start, start + 1),
            input_names=Autoregressive.layers_inputs,
            output_names=("hidden", *shared),
            dynamic={"tokens": {1: "tokens"}},
        ),
        *layer_stages(
            checkpoint,
            [config] * config.num_layers,
            layers_per_stage,
            build=lambda weights, first, end: loaded(
                LayerGroup(config, end - first, **sizes), weights, first
            ),
            inputs=lambda first, end: given,
            dynamic={
                **rows,
                "mask": {0: f"{config.kv_groups}*tokens"},
                "cos": {0: "tokens"},
                "sin": {0: "tokens"},
            },
        ),
        norm_stage(
            lambda: loaded(FinalNorm(config.hidden_size, config.norm_eps)),
            prefill_length,
            config.hidden_size,
            rows,
        ),
    ]
