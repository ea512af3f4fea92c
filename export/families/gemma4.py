"""The shape of Gemma 4's text model: per-layer embeddings, shared keys and values, two kinds of
attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.families.fields import count, gemma_heads, layer_kinds, size, table
from export.families.shapes import Attention, Elementwise, ModelShape, Weight
from quantize.errors import CheckpointError

FULL = "full_attention"
# As export/models/gemma4_stages.py.
CONTEXT, PREFILL = 4096, 128


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """See `export.families.read_shape`."""
    kind = config["model_type"]
    text = table(config, "text_config") if kind == "gemma4" else config
    prefix = "model.language_model." if kind == "gemma4" else "model."
    if text.get("enable_moe_block"):
        raise CheckpointError(
            "config.json has enable_moe_block = True; mixtures of experts are not supported for "
            "Gemma 4 yet, give a dense checkpoint"
        )
    hidden, heads = size(text, "hidden_size"), size(text, "num_attention_heads")
    layers, inner = size(text, "num_hidden_layers"), size(text, "intermediate_size")
    kinds = layer_kinds(text, layers)
    shared = count(text, "num_kv_shared_layers")
    if shared >= layers:
        raise CheckpointError(
            f"config.json has num_kv_shared_layers = {shared} of {layers} layers; some must have "
            "keys and values of their own"
        )
    per_layer = count(text, "hidden_size_per_layer_input")
    vocabulary, tied = size(text, "vocab_size"), config.get("tie_word_embeddings") is not False
    same = bool(text.get("attention_k_eq_v"))
    weights = [Weight(f"{prefix}embed_tokens.weight", (vocabulary, hidden), "embedding", "lookup")]
    weights.append(Weight(f"{prefix}norm.weight", (hidden,), "other", "elementwise"))
    if per_layer:
        width = layers * per_layer
        rows = size(text, "vocab_size_per_layer_input")
        weights += [
            Weight(
                f"{prefix}embed_tokens_per_layer.weight",
                (rows, width),
                "per-layer embedding",
                "lookup",
            ),
            Weight(
                f"{prefix}per_layer_model_projection.weight",
                (width, hidden),
                "per-layer embedding",
                "product",
            ),
            Weight(
                f"{prefix}per_layer_projection_norm.weight", (per_layer,), "other", "elementwise"
            ),
        ]
    attentions, values = [], dict.fromkeys(kinds, 0)
    for i, layer_kind in enumerate(kinds):
        owns = i < layers - shared
        width = 2 * inner if not owns and text.get("use_double_wide_mlp") else inner
        head_dim, kv_heads = gemma_heads(text, i, layer_kind, global_kv_heads=same)
        window = size(text, "sliding_window") if layer_kind != FULL else None
        attentions.append(
            Attention(layer_kind, heads, kv_heads, head_dim, owns_cache=owns, window=window)
        )
        at = f"{prefix}layers.{i}."
        weights += _layer(
            at, layer_kind, hidden, width, heads * head_dim, kv_heads * head_dim, head_dim,
            owns=owns, has_values=not (same and layer_kind == FULL), per_layer=per_layer,
            bias=bool(text.get("attention_bias")),
        )  # fmt: skip
        query, kv = heads * head_dim, kv_heads * head_dim * owns
        # Four norms with weights, residuals, scalar; tanh-GELU's eight passes; norms of heads and
        # rotary; the per-layer gate.
        values[layer_kind] += hidden * (4 * 3 + 2 + 1) + 9 * width + 11 * query + 12 * kv
        values[layer_kind] += (9 * per_layer + 4 * hidden) if per_layer else 0
    if not tied:
        weights.append(Weight("lm_head.weight", (vocabulary, hidden), "head", "product"))
    context = min(CONTEXT, size(text, "max_position_embeddings"))
    return ModelShape(
        family=kind,
        style="autoregressive",
        vocabulary_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        canvas_length=1,
        block_length=1,
        maximum_positions=size(text, "max_position_embeddings"),
        default_context=context,
        weights=tuple(weights),
        attentions=tuple(attentions),
        elementwise=Elementwise(values, 60),
        embedding=f"{prefix}embed_tokens.weight",
        head_table=f"{prefix}embed_tokens.weight" if tied else "lm_head.weight",
        prefill_rows=PREFILL,
        soft_cap=text.get("final_logit_softcapping") is not None,
    )


def _layer(
    at: str, kind: str, hidden: int, inner: int, query: int, kv: int, head_dim: int, *,
    owns: bool, has_values: bool, per_layer: int, bias: bool,
) -> list[Weight]:  # fmt: skip
    attention = [("q_proj", query, hidden), ("o_proj", hidden, query)]
    norms = ["q_norm"]
    if owns:
        attention += [("k_proj", kv, hidden)] + [("v_proj", kv, hidden)] * has_values
        norms.append("k_norm")
    found = []
    for name, rows, columns in attention:
        own = f"{at}self_attn.{name}"
        found.append(Weight(f"{own}.weight", (rows, columns), "attention", "product", kind))
        if bias:
            found.append(Weight(f"{own}.bias", (rows,), "attention", "elementwise", kind))
    found += [
        Weight(f"{at}self_attn.{name}.weight", (head_dim,), "attention", "elementwise", kind)
        for name in norms
    ]
    found += [
        Weight(f"{at}mlp.{name}.weight", shape, "mlp", "product", kind)
        for name, shape in (
            ("gate_proj", (inner, hidden)),
            ("up_proj", (inner, hidden)),
            ("down_proj", (hidden, inner)),
        )
    ]
    layer_norms = [
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ]  # fmt: skip
    if per_layer:
        found += [
            Weight(
                f"{at}per_layer_input_gate.weight",
                (per_layer, hidden),
                "per-layer embedding",
                "product",
                kind,
            ),
            Weight(
                f"{at}per_layer_projection.weight",
                (hidden, per_layer),
                "per-layer embedding",
                "product",
                kind,
            ),
        ]
        layer_norms.append("post_per_layer_input_norm")
    found += [
        Weight(f"{at}{name}.weight", (hidden,), "other", "elementwise", kind)
        for name in layer_norms
    ]
    found.append(Weight(f"{at}layer_scalar", (1,), "other", "elementwise", kind))
    return found
