"""Gemma 4's dense text model: per-layer embeddings, shared keys and values, two attentions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from export.contract.styles import STYLES
from export.families.description import Description, Sizes, context_of
from export.families.fields import Section, model_type_of
from export.families.gemma import (
    FULL,
    SLIDING,
    RotaryConfig,
    attention_weights,
    heads_of,
    layer_kinds,
    rotary_of,
)
from export.families.samplers import autoregressive_sampler, truncates
from export.families.shapes import Attention, Elementwise, ModelShape
from export.families.tokens import ModelFiles
from export.families.weights import Part, Weight, gated_mlp, linear, norms
from quantize.errors import CheckpointError

# How the checkpoint of each model_type calls its text model.
PREFIXES = {"gemma4": "model.language_model.", "gemma4_text": "model."}
STYLE = STYLES["autoregressive"]
PER_LAYER: Part = "per-layer embedding"

DEFAULT_CONTEXT = 4096
"""Default maximum context in positions, where the checkpoint allows it."""
PREFILL_LENGTH = 128
"""Most tokens of one call: enough that arithmetic and not the reading of weights takes the time,
few enough that the attention scores `[heads * 128, context]` stay small."""


@dataclass(frozen=True)
class LayerConfig:
    """What differs between layers.

    source: the layer whose KV cache this one reads; its own index where it has one. has_values: a
    layer without a value projection takes the keys' for it.
    """

    kind: str
    head_dim: int
    num_kv_heads: int
    has_values: bool
    intermediate_size: int
    source: int


@dataclass(frozen=True)
class Gemma4Config(Sizes):
    """The fields of `config.json` that shape the text model; nothing is defaulted from a class.

    per_layer_size: channels of the per-layer embedding, 0 for a model without one. soft_cap: of
    the final logits, None for none.
    """

    prefix: str
    sliding_window: int
    attention_bias: bool
    per_layer_size: int
    per_layer_vocabulary: int
    soft_cap: float | None
    tied_head: bool
    layers: tuple[LayerConfig, ...]
    rotary: dict[str, RotaryConfig]

    @classmethod
    def from_checkpoint_config(cls, config: Mapping[str, Any]) -> Gemma4Config:
        """Read `config.json` as a dict, of the text model alone or of the one that holds it.

        Raises:
            CheckpointError: another architecture, a missing field, or a variant that this graph
                does not have.
        """
        model_type = model_type_of(config, PREFIXES)
        whole = Section(config)
        text = whole.section("text_config") if model_type == "gemma4" else whole
        if text.flag("enable_moe_block"):
            raise text.refusal(
                "enable_moe_block",
                "mixtures of experts are not supported for Gemma 4 yet, give a dense checkpoint",
            )
        text.only("use_bidirectional_attention", None, "vision")
        text.only("hidden_activation", "gelu_pytorch_tanh")
        vocabulary = text.size("vocab_size")
        per_layer_size = text.count("hidden_size_per_layer_input")
        per_layer_vocabulary = text.size("vocab_size_per_layer_input") if per_layer_size else 0
        if per_layer_size and per_layer_vocabulary < vocabulary:
            raise text.refusal(
                "vocab_size_per_layer_input",
                f"the vocabulary has {vocabulary} tokens, and every one needs its row",
            )
        soft_cap = None
        if text.get("final_logit_softcapping") is not None:
            soft_cap = text.number("final_logit_softcapping")
        layers = _layers(text)
        return cls(
            **cls.read(text),
            prefix=PREFIXES[model_type],
            sliding_window=text.size("sliding_window"),
            attention_bias=text.flag("attention_bias"),
            per_layer_size=per_layer_size,
            per_layer_vocabulary=per_layer_vocabulary,
            soft_cap=soft_cap,
            tied_head=whole.flag("tie_word_embeddings", default=True),
            layers=layers,
            rotary=rotary_of(text, [layer.kind for layer in layers]),
        )

    @property
    def embedding(self) -> str:
        """The checkpoint's name of the embedding table."""
        return f"{self.prefix}embed_tokens.weight"

    @property
    def head_table(self) -> str:
        """The checkpoint's name of the vocabulary head's table."""
        return self.embedding if self.tied_head else "lm_head.weight"


def _layers(text: Section) -> tuple[LayerConfig, ...]:
    kinds = layer_kinds(text)
    shared = text.count("num_kv_shared_layers", default=0)
    owners = kinds[: len(kinds) - shared] if shared < len(kinds) else []
    if set(owners) != set(kinds):
        raise CheckpointError(
            f"config.json has {text.path}num_kv_shared_layers = {shared} of {len(kinds)} layers; a "
            "layer of each kind in layer_types must come before those that share its keys and "
            "values"
        )
    width, k_eq_v = text.size("intermediate_size"), text.flag("attention_k_eq_v")
    shared_width = 2 * width if text.flag("use_double_wide_mlp") else width
    layers: list[LayerConfig] = []
    for i, kind in enumerate(kinds):
        head_dim, num_kv_heads = heads_of(text, i, kind, global_kv_heads=k_eq_v)
        is_owner = i < len(owners)
        layer = LayerConfig(
            kind=kind,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            has_values=not (k_eq_v and kind == FULL),
            intermediate_size=width if is_owner else shared_width,
            source=i if is_owner else len(owners) - 1 - owners[::-1].index(kind),
        )
        lender = layer if is_owner else layers[layer.source]
        first = next((other for other in layers if other.kind == kind), layer)
        if (lender.head_dim, lender.num_kv_heads) != (head_dim, num_kv_heads) or (
            first.head_dim != head_dim
        ):
            raise CheckpointError(
                f"config.json gives layer {i} {num_kv_heads} KV heads of {head_dim}, unlike an "
                f"earlier {kind} layer that it shares keys or rotary frequencies with; "
                "one size for each kind is supported"
            )
        layers.append(layer)
    return tuple(layers)


def describe(files: ModelFiles, maximum_context: int | None) -> Description[Gemma4Config]:
    """See `export.families.describe`."""
    config = Gemma4Config.from_checkpoint_config(files.config)
    sampler = autoregressive_sampler(STYLE, files.generation_config)
    shape = ModelShape(
        family="gemma4",
        style=STYLE,
        **config.of_shape(),
        default_context=context_of(
            maximum_context, default=DEFAULT_CONTEXT, largest=config.max_positions, least=1
        ),
        weights=tuple(_weights(config)),
        attentions=tuple(
            Attention(
                layer.kind,
                config.num_heads,
                layer.num_kv_heads,
                layer.head_dim,
                owns_cache=layer.source == i,
                window=config.sliding_window if layer.kind == SLIDING else None,
            )
            for i, layer in enumerate(config.layers)
        ),
        elementwise=_elementwise(config),
        embedding=config.embedding,
        head_table=config.head_table,
        prefill_rows=PREFILL_LENGTH,
        truncation=truncates(sampler),
        soft_cap=config.soft_cap,
    )
    return Description(config, shape, sampler)


def _weights(config: Gemma4Config) -> list[Weight]:
    prefix, hidden, per_layer = config.prefix, config.hidden_size, config.per_layer_size
    found = [Weight(config.embedding, (config.vocabulary_size, hidden), "embedding", "lookup")]
    found += norms(prefix, ("norm",), hidden)
    if per_layer:
        width = len(config.layers) * per_layer
        table = f"{prefix}embed_tokens_per_layer.weight"
        found.append(Weight(table, (config.per_layer_vocabulary, width), PER_LAYER, "lookup"))
        found += linear(f"{prefix}per_layer_model_projection", (width, hidden), PER_LAYER)
        found += norms(prefix, ("per_layer_projection_norm",), per_layer)
    for i in range(len(config.layers)):
        found += _layer_weights(config, i)
    if not config.tied_head:
        found.append(Weight(config.head_table, (config.vocabulary_size, hidden), "head", "product"))
    return found


def _layer_weights(config: Gemma4Config, index: int) -> list[Weight]:
    layer, at = config.layers[index], f"{config.prefix}layers.{index}."
    kind, hidden, per_layer = layer.kind, config.hidden_size, config.per_layer_size
    query, kv = config.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    found = attention_weights(
        at, kind, hidden, query, kv, layer.head_dim, owns_cache=layer.source == index,
        has_values=layer.has_values, bias=config.attention_bias,
    )  # fmt: skip
    found += gated_mlp(f"{at}mlp.", hidden, layer.intermediate_size, kind)
    layer_norms = [
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ]  # fmt: skip
    if per_layer:
        found += linear(f"{at}per_layer_input_gate", (per_layer, hidden), PER_LAYER, kind)
        found += linear(f"{at}per_layer_projection", (hidden, per_layer), PER_LAYER, kind)
        layer_norms.append("post_per_layer_input_norm")
    found += norms(at, layer_norms, hidden, kind)
    found.append(Weight(f"{at}layer_scalar", (1,), "other", "elementwise", kind))
    return found


def _elementwise(config: Gemma4Config) -> Elementwise:
    hidden, per_layer = config.hidden_size, config.per_layer_size
    values = {layer.kind: 0 for layer in config.layers}
    for i, layer in enumerate(config.layers):
        query = config.num_heads * layer.head_dim
        kv = layer.num_kv_heads * layer.head_dim * (layer.source == i)
        # Four norms with weights, residuals, scalar; tanh-GELU's eight passes; norms of heads and
        # rotary; the per-layer gate.
        values[layer.kind] += hidden * (4 * 3 + 2 + 1) + 9 * layer.intermediate_size
        values[layer.kind] += 11 * query + 12 * kv
        values[layer.kind] += (9 * per_layer + 4 * hidden) if per_layer else 0
    return Elementwise(values, 60)
