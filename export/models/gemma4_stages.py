"""Puts Gemma 4 together: its layers and the vocabulary head of autoregressive decoding."""

from __future__ import annotations

from export.families.gemma4 import Gemma4Config
from export.models.building import BuildRequest, BuiltStages
from export.models.gemma4 import build_layers, unused_notes
from export.models.staging import block_layers_stage
from export.models.weights import read_weight


def build_stages(request: BuildRequest[Gemma4Config]) -> BuiltStages:
    """See `export.models`."""
    checkpoint, config = request.checkpoint, request.config
    layers = build_layers(
        checkpoint, config, maximum_context=request.context, prefill_length=request.prefill_length
    )
    table_shape = (config.vocabulary_size, config.hidden_size)
    table = read_weight(checkpoint, config.head_table, table_shape)
    return BuiltStages(
        (block_layers_stage(layers, request.prefill_length), request.token_head(table)),
        unused_notes(config, request.unused_names()),
    )
