"""The shape of DiffusionGemma's text model: a mixture of experts beside a dense MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.families.fields import gemma_heads, layer_kinds, size, table
from export.families.shapes import Attention, Elementwise, ModelShape, Weight

SLIDING = "sliding_attention"
CONTEXT_IN_CANVASES = 16  # as export/models/diffusion_gemma_stages.py


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """See `export.families.read_shape`."""
    text = table(config, "text_config")
    hidden, heads = size(text, "hidden_size"), size(text, "num_attention_heads")
    layers, inner = size(text, "num_hidden_layers"), size(text, "intermediate_size")
    experts, top_k = size(text, "num_experts"), size(text, "top_k_experts")
    expert_size, vocabulary = size(text, "moe_intermediate_size"), size(text, "vocab_size")
    canvas, positions = size(config, "canvas_length"), size(text, "max_position_embeddings")
    kinds = layer_kinds(text, layers)
    top = "model.decoder."
    weights = [
        Weight(f"{top}embed_tokens.weight", (vocabulary, hidden), "embedding", "lookup"),
        Weight(f"{top}norm.weight", (hidden,), "other", "elementwise"),
        Weight(f"{top}self_conditioning.pre_norm.weight", (hidden,), "other", "elementwise"),
    ]
    conditioning = "self_conditioning"
    weights += [
        Weight(f"{top}{conditioning}.{name}.weight", shape, "mlp", "product", conditioning)
        for name, shape in _mlp(hidden, inner)
    ]
    attentions = []
    values = dict.fromkeys([*kinds, conditioning], 0)
    values[conditioning] = 8 * hidden + 9 * inner
    for i, kind in enumerate(kinds):
        at = f"{top}layers.{i}."
        head_dim, kv_heads = gemma_heads(text, i, kind, global_kv_heads=True)
        window = size(text, "sliding_window") if kind == SLIDING else None
        attentions.append(Attention(kind, heads, kv_heads, head_dim, window=window))
        query, kv = heads * head_dim, kv_heads * head_dim
        projections = [("q_proj", query, hidden), ("k_proj", kv, hidden), ("o_proj", hidden, query)]
        if kind == SLIDING:  # full layers take the keys' projection for the values
            projections.append(("v_proj", kv, hidden))
        for name, rows, columns in projections:
            own = f"{at}self_attn.{name}"
            weights.append(Weight(f"{own}.weight", (rows, columns), "attention", "product", kind))
            if text.get("attention_bias"):
                weights.append(Weight(f"{own}.bias", (rows,), "attention", "elementwise", kind))
        weights += [
            Weight(f"{at}self_attn.{name}.weight", (head_dim,), "attention", "elementwise", kind)
            for name in ("q_norm", "k_norm")
        ]
        weights += [
            Weight(f"{at}mlp.{name}.weight", shape, "mlp", "product", kind)
            for name, shape in _mlp(hidden, inner)
        ]
        weights += [
            Weight(f"{at}router.proj.weight", (experts, hidden), "router", "product", kind),
            Weight(f"{at}router.scale", (hidden,), "router", "elementwise", kind),
            Weight(f"{at}router.per_expert_scale", (experts,), "router", "elementwise", kind),
            Weight(
                f"{at}experts.gate_up_proj",
                (experts, 2 * expert_size, hidden),
                "experts",
                "experts",
                kind,
                active=top_k,
            ),
            Weight(
                f"{at}experts.down_proj",
                (experts, hidden, expert_size),
                "experts",
                "experts",
                kind,
                active=top_k,
            ),
        ]
        weights += [
            Weight(f"{at}{name}.weight", (hidden,), "other", "elementwise", kind)
            for name in (
                "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                "post_feedforward_layernorm", "post_feedforward_layernorm_1",
                "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2",
            )
        ]  # fmt: skip
        weights += [
            Weight(f"{stack}layers.{i}.layer_scalar", (1,), "other", "elementwise", kind)
            for stack in (top, "model.encoder.language_model.")
        ]
        # Seven norms and the router's, three sums, scalar; the MLP's tanh-GELU; heads and rotary.
        values[kind] += hidden * (8 * 3 + 3 + 1 + 2) + 9 * inner + 11 * query + 12 * kv
    return ModelShape(
        family="diffusion_gemma",
        style="uniform_diffusion",
        vocabulary_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        canvas_length=canvas,
        block_length=1,
        maximum_positions=positions,
        default_context=min(CONTEXT_IN_CANVASES * canvas, positions),
        weights=tuple(weights),
        attentions=tuple(attentions),
        elementwise=Elementwise(values, 80),
        embedding=f"{top}embed_tokens.weight",
        head_table=f"{top}embed_tokens.weight",
        prefill_rows=canvas,
        soft_cap=True,
        soft_embedding=True,
        num_experts=experts,
        top_k=top_k,
        expert_size=expert_size,
    )


def _mlp(hidden: int, inner: int) -> tuple[tuple[str, tuple[int, int]], ...]:
    return (
        ("gate_proj", (inner, hidden)),
        ("up_proj", (inner, hidden)),
        ("down_proj", (hidden, inner)),
    )
