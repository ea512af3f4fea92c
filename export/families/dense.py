"""The shape of the dense decoders: Llama, Qwen2, Qwen3, LLaDA, and the masked formats of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from export.families.fields import divided, size
from export.families.shapes import Attention, Elementwise, ModelShape, Part, Weight

QWEN3_TYPES = frozenset({"qwen3", "a2d-qwen3", "sdar"})
QWEN2_TYPES = frozenset({"qwen2", "a2d-qwen2", "Dream", "Fast_dLLM_Qwen"})
LAYER = "full_attention"

# As export/models/dense_stages.py: contexts by what a position sees, most rows of a call.
CONTEXT, CONTEXT_SEEING_ALL, PREFILL = 2048, 1024, 256


@dataclass(frozen=True)
class _Format:
    """block_keys, default_block, canvas, sub_block, truncation: as `MaskedFamily` has them."""

    block_keys: tuple[str, ...] = ()
    default_block: int = 0
    canvas: int = 32
    sub_block: int | None = None
    shift: int = 0
    truncation: bool = False


_A2D = _Format(("block_size",), 32)
_MASKED = {
    "a2d-llama": _A2D,
    "a2d-qwen2": _A2D,
    "a2d-qwen3": _A2D,
    "sdar": _Format(("block_size", "block_length"), 4),
    "Fast_dLLM_Qwen": _Format(("bd_size",), 32, sub_block=8, shift=1),
    "Dream": _Format(canvas=256, shift=1, truncation=True),
    "llada": _Format(),
}


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """See `export.families.read_shape`."""
    kind = config["model_type"]
    sizes = _llada_sizes(config) if kind == "llada" else _sizes(config, kind)
    weights = tuple(_weights(sizes, kind))
    prefix = "model.transformer." if kind == "llada" else "model."
    embedding = prefix + ("wte.weight" if kind == "llada" else "embed_tokens.weight")
    own_head = "model.transformer.ff_out.weight" if kind == "llada" else "lm_head.weight"
    block, canvas, context, prefill, truncation = _decoding(config, kind, sizes.positions)
    return ModelShape(
        family=kind,
        style="masked_diffusion" if kind in _MASKED else "autoregressive",
        vocabulary_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_layers=sizes.layers,
        canvas_length=canvas,
        block_length=block,
        maximum_positions=sizes.positions,
        default_context=context,
        weights=weights,
        attentions=(Attention(LAYER, sizes.heads, sizes.kv_heads, sizes.head_dim),) * sizes.layers,
        elementwise=_elementwise(sizes, kind in QWEN3_TYPES),
        embedding=embedding,
        head_table=embedding if sizes.tied else own_head,
        prefill_rows=prefill,
        truncation=truncation,
    )


@dataclass(frozen=True)
class _Sizes:
    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    tied: bool


def _sizes(config: Mapping[str, Any], kind: str) -> _Sizes:
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    stated = config.get("head_dim") is not None or kind in QWEN3_TYPES
    return _Sizes(
        vocabulary=size(config, "vocab_size"),
        hidden=hidden,
        inner=size(config, "intermediate_size"),
        layers=size(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=size(config, "num_key_value_heads", heads),
        head_dim=size(config, "head_dim") if stated else divided(hidden, heads),
        positions=size(config, "max_position_embeddings"),
        tied=config.get("tie_word_embeddings") is not False,
    )


def _llada_sizes(config: Mapping[str, Any]) -> _Sizes:
    hidden, heads = size(config, "d_model"), size(config, "n_heads")
    own = "vocab_size" if config.get("embedding_size") is None else "embedding_size"
    inner = config.get("mlp_hidden_size")
    return _Sizes(
        vocabulary=size(config, own),
        hidden=hidden,
        inner=hidden * size(config, "mlp_ratio") if inner is None else size(
            config, "mlp_hidden_size"
        ),
        layers=size(config, "n_layers"),
        heads=heads,
        kv_heads=size(config, "n_kv_heads", 1 if config.get("multi_query_attention") else heads),
        head_dim=divided(hidden, heads),
        positions=size(config, "max_sequence_length"),
        tied=config.get("weight_tying", True) is not False,
    )  # fmt: skip


def _weights(sizes: _Sizes, kind: str) -> list[Weight]:
    hidden, inner, query = sizes.hidden, sizes.inner, sizes.heads * sizes.head_dim
    kv = sizes.kv_heads * sizes.head_dim
    llada = kind == "llada"
    top = "model.transformer." if llada else "model."
    found = [
        Weight(
            f"{top}{'wte' if llada else 'embed_tokens'}.weight",
            (sizes.vocabulary, hidden),
            "embedding",
            "lookup",
        ),
        Weight(f"{top}{'ln_f' if llada else 'norm'}.weight", (hidden,), "other", "elementwise"),
    ]
    parts: list[tuple[str, str, Part, int, int]] = [
        ("self_attn.q_proj", "q_proj", "attention", query, hidden),
        ("self_attn.k_proj", "k_proj", "attention", kv, hidden),
        ("self_attn.v_proj", "v_proj", "attention", kv, hidden),
        ("self_attn.o_proj", "attn_out", "attention", hidden, query),
        ("mlp.gate_proj", "ff_proj", "mlp", inner, hidden),
        ("mlp.up_proj", "up_proj", "mlp", inner, hidden),
        ("mlp.down_proj", "ff_out", "mlp", hidden, inner),
    ]
    for layer in range(sizes.layers):
        at = f"model.transformer.blocks.{layer}." if llada else f"model.layers.{layer}."
        for name, llada_name, part, rows, columns in parts:
            own = at + (llada_name if llada else name)
            found.append(Weight(f"{own}.weight", (rows, columns), part, "product", LAYER))
            if kind in QWEN2_TYPES and name.endswith(("q_proj", "k_proj", "v_proj")):
                found.append(Weight(f"{own}.bias", (rows,), part, "elementwise", LAYER))
        norms = ("attn_norm", "ff_norm") if llada else (
            "input_layernorm", "post_attention_layernorm"
        )  # fmt: skip
        found += [
            Weight(f"{at}{n}.weight", (hidden,), "other", "elementwise", LAYER) for n in norms
        ]
        if kind in QWEN3_TYPES:
            found += [
                Weight(
                    f"{at}self_attn.{n}.weight",
                    (sizes.head_dim,),
                    "attention",
                    "elementwise",
                    LAYER,
                )
                for n in ("q_norm", "k_norm")
            ]
    if not sizes.tied:
        head = "model.transformer.ff_out.weight" if llada else "lm_head.weight"
        found.append(Weight(head, (sizes.vocabulary, hidden), "head", "product"))
    return found


def _elementwise(sizes: _Sizes, has_qk_norm: bool) -> Elementwise:
    query, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    # Two norms (square, scale, weight) and two residuals; silu (sigmoid, product) and its product.
    values = sizes.hidden * (2 * 3 + 2) + 3 * sizes.inner
    # Rotary (4 products, 2 sums in halves, one join), scale and two rearrangements; KV writes.
    values += 4 * (query + kv) + 3 * query + 2 * kv + (query if not has_qk_norm else 0)
    if has_qk_norm:
        values += 4 * (query + kv)
    operators = 40 + 10 * has_qk_norm
    return Elementwise({LAYER: sizes.layers * values}, operators)


def _decoding(
    config: Mapping[str, Any], kind: str, positions: int
) -> tuple[int, int, int, int, bool]:
    """Block, canvas, default context, most rows of a call (0: the context), truncation."""
    own = _MASKED.get(kind)
    if own is None:
        return 1, 1, min(CONTEXT, positions), PREFILL, False
    block = own.default_block
    for key in own.block_keys:
        if config.get(key) is not None:
            block = 0 if config[key] == 0 else size(config, key)
            break
    else:
        named = str(config.get("_name_or_path", "")).lower()
        if "mdlm" in named and own is _A2D:
            block = 0
    if not block:
        context = min(CONTEXT_SEEING_ALL, positions)
        return 0, min(own.canvas, context // 2), context, 0, own.truncation
    context = min(CONTEXT, positions) // block * block
    canvas = own.sub_block if own.sub_block and block % own.sub_block == 0 else block
    prefill = max(PREFILL // block * block, block + own.shift)
    return block, canvas, context, prefill, own.truncation
