"""The shape of HRM-Text: two stacks of layers that run several times in a pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.families.fields import size
from export.families.shapes import Attention, Elementwise, ModelShape, Weight

# As export/models/hrm_text_stages.py: a PrefixLM prompt comes whole, a causal one in pieces.
CONTEXT, CAUSAL_PREFILL = 512, 128
STACKS = {"low": "L_module", "high": "H_module"}


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """See `export.families.read_shape`."""
    hidden, inner = size(config, "hidden_size"), size(config, "intermediate_size")
    heads, head_dim = size(config, "num_attention_heads"), size(config, "head_dim")
    high, low = size(config, "H_cycles"), size(config, "L_cycles")
    layers = size(config, "num_layers_per_stack", size(config, "num_hidden_layers"))
    vocabulary, tied = size(config, "vocab_size"), config.get("tie_word_embeddings") is True
    positions = size(config, "max_position_embeddings")
    query = heads * head_dim
    weights = [
        Weight("model.embed_tokens.weight", (vocabulary, hidden), "embedding", "lookup"),
        Weight("model.z_L_init", (hidden,), "other", "elementwise"),
    ]
    attentions, values = [], {}
    for stack, module in STACKS.items():
        runs = high * (low if stack == "low" else 1)
        for i in range(layers):
            at = f"model.{module}.layers.{i}."
            for name, rows, columns in (
                ("attn.gqkv_proj", 4 * query, hidden),
                ("attn.o_proj", hidden, query),
                ("mlp.gate_up_proj", 2 * inner, hidden),
                ("mlp.down_proj", hidden, inner),
            ):
                part = "attention" if name.startswith("attn") else "mlp"
                weights.append(
                    Weight(f"{at}{name}.weight", (rows, columns), part, "product", stack, runs)
                )
            attentions.append(
                Attention(stack, heads, heads, head_dim, runs=runs, copies_cache=True)
            )
        # Two norms without weights and two residuals; silu; rotary of queries and keys, the gate,
        # slices and rearrangements of four parts.
        one = hidden * (2 * 2 + 2) + 5 * inner + 22 * query
        values[stack] = runs * (layers * one + 3 * hidden)
    if not tied:
        weights.append(Weight("lm_head.weight", (vocabulary, hidden), "head", "product"))
    context = min(CONTEXT, positions)
    return ModelShape(
        family="hrm_text",
        style="autoregressive",
        vocabulary_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=2 * layers,
        canvas_length=1,
        block_length=1,
        maximum_positions=positions,
        default_context=context,
        weights=tuple(weights),
        attentions=tuple(attentions),
        elementwise=Elementwise(values, 45),
        embedding="model.embed_tokens.weight",
        head_table="model.embed_tokens.weight" if tied else "lm_head.weight",
        prefill_rows=0 if config.get("prefix_lm", True) else CAUSAL_PREFILL,
    )
