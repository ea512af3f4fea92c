"""Gemma 4's dense text model, re-authored as one graph for prefill and decoding of any length.

What this file does not know: quantization (weights may be torchao tensors), backends, the head and
sampler (export/heads/token.py). Reference: `Gemma4TextModel` of transformers 5.23.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from export.heads.lookup import lookup_table
from export.models.blocks import (
    MASKED,
    GatedMLP,
    RMSNorm,
    Rotary,
    field,
    gelu_tanh,
    positive,
    positive_number,
    refuse_variant,
)
from export.models.diffusion_gemma import RotaryConfig, inverse_frequencies
from quantize.checkpoint import Checkpoint
from quantize.errors import CheckpointError

WRAPPER_TYPE = "gemma4"
TEXT_TYPE = "gemma4_text"
# How the checkpoint of each type calls its text model.
PREFIXES = {WRAPPER_TYPE: "model.language_model.", TEXT_TYPE: "model."}
OTHER_MODALITIES = ("vision_tower.", "embed_vision.", "audio_tower.", "embed_audio.")
SHARED_PARTS = ("k_proj", "v_proj", "k_norm", "v_norm")
SLIDING, FULL = "sliding_attention", "full_attention"


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
class Gemma4Config:
    """The fields of `config.json` that shape the text model; nothing is defaulted from a class.

    per_layer_size: channels of the per-layer embedding, 0 for a model without one. soft_cap: of
    the final logits, None for none. head_table: the checkpoint's name of the vocabulary head.
    """

    prefix: str
    vocabulary_size: int
    hidden_size: int
    num_heads: int
    sliding_window: int
    norm_eps: float
    max_positions: int
    attention_bias: bool
    per_layer_size: int
    per_layer_vocabulary: int
    soft_cap: float | None
    head_table: str
    layers: tuple[LayerConfig, ...]
    rotary: dict[str, RotaryConfig]

    @classmethod
    def from_checkpoint_config(cls, config: dict[str, Any]) -> Gemma4Config:
        """Read `config.json` as a dict, of the text model alone or of the one that holds it.

        Raises:
            CheckpointError: another architecture, a missing field, or a variant that this graph
                does not have.
        """
        model_type = config.get("model_type")
        if model_type not in (WRAPPER_TYPE, TEXT_TYPE):
            raise CheckpointError(
                f"config.json has model_type {model_type!r}, expected {WRAPPER_TYPE!r} or "
                f"{TEXT_TYPE!r}; give a Gemma 4 checkpoint"
            )
        is_wrapped = model_type == WRAPPER_TYPE
        text = field(config, "text_config", dict) if is_wrapped else config
        at = "text_config." if is_wrapped else ""
        if _flag(text, at + "enable_moe_block"):
            raise CheckpointError(
                f"config.json has {at}enable_moe_block = True; mixtures of experts are not "
                "supported for Gemma 4 yet, give a dense checkpoint"
            )
        refuse_variant(text, at + "use_bidirectional_attention", {None, "vision"})
        refuse_variant(text, at + "hidden_activation", {"gelu_pytorch_tanh"})
        per_layer_size = field(text, at + "hidden_size_per_layer_input", int)
        vocabulary = positive(text, at + "vocab_size")
        per_layer_vocabulary = 0
        if per_layer_size < 0:
            raise CheckpointError(
                f"config.json has {at}hidden_size_per_layer_input = {per_layer_size}; "
                "it must be 0 or positive"
            )
        if per_layer_size:
            per_layer_vocabulary = positive(text, at + "vocab_size_per_layer_input")
            if per_layer_vocabulary < vocabulary:
                raise CheckpointError(
                    f"config.json has {at}vocab_size_per_layer_input = {per_layer_vocabulary} for "
                    f"a vocabulary of {vocabulary}; every token needs its row"
                )
        num_heads = positive(text, at + "num_attention_heads")
        layers = _layers(text, at, num_heads)
        tied = _flag(config, "tie_word_embeddings", default=True)
        ropes = field(text, at + "rope_parameters", dict)
        soft_cap = None
        if text.get("final_logit_softcapping") is not None:
            soft_cap = positive_number(text, at + "final_logit_softcapping")
        return cls(
            prefix=PREFIXES[model_type],
            vocabulary_size=vocabulary,
            hidden_size=positive(text, at + "hidden_size"),
            num_heads=num_heads,
            sliding_window=positive(text, at + "sliding_window"),
            norm_eps=positive_number(text, at + "rms_norm_eps"),
            max_positions=positive(text, at + "max_position_embeddings"),
            attention_bias=_flag(text, at + "attention_bias"),
            per_layer_size=per_layer_size,
            per_layer_vocabulary=per_layer_vocabulary,
            soft_cap=soft_cap,
            head_table=f"{PREFIXES[model_type]}embed_tokens.weight" if tied else "lm_head.weight",
            layers=layers,
            rotary={
                kind: _rotary(ropes, kind, f"{at}rope_parameters.")
                for kind in sorted({layer.kind for layer in layers})
            },
        )


def _flag(section: dict[str, Any], path: str, *, default: bool = False) -> bool:
    value = section.get(path.rsplit(".", 1)[-1])
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json has {path} = {value!r}; it must be true or false")
    return value


def _layers(text: dict[str, Any], at: str, num_heads: int) -> tuple[LayerConfig, ...]:
    kinds = field(text, at + "layer_types", list)
    count = positive(text, at + "num_hidden_layers")
    if len(kinds) != count or any(k not in (SLIDING, FULL) for k in kinds) or kinds[-1] != FULL:
        raise CheckpointError(
            f"config.json lists {at}layer_types {kinds!r} for {count} layers; expected one of "
            f"{SLIDING!r} or {FULL!r} for each layer, the last one full"
        )
    shared = text.get("num_kv_shared_layers")
    shared = 0 if shared is None else field(text, at + "num_kv_shared_layers", int)
    owners = kinds[: count - shared] if 0 <= shared < count else []
    if set(owners) != set(kinds):
        raise CheckpointError(
            f"config.json has {at}num_kv_shared_layers = {shared} of {count} layers; a layer of "
            "each kind in layer_types must come before those that share its keys and values"
        )
    width = positive(text, at + "intermediate_size")
    shared_width = 2 * width if _flag(text, at + "use_double_wide_mlp") else width
    k_eq_v = _flag(text, at + "attention_k_eq_v")
    layers: list[LayerConfig] = []
    for i, kind in enumerate(kinds):
        head_dim, num_kv_heads = _heads(text, at, i, kind, k_eq_v)
        if num_heads % num_kv_heads or head_dim % 2:
            raise CheckpointError(
                f"config.json gives layer {i} {num_heads} heads over {num_kv_heads} KV heads of "
                f"{head_dim}; heads must divide evenly and the head size be even"
            )
        is_owner = i < len(owners)
        source = i if is_owner else len(owners) - 1 - owners[::-1].index(kind)
        layer = LayerConfig(
            kind=kind,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            has_values=not (k_eq_v and kind == FULL),
            intermediate_size=width if is_owner else shared_width,
            source=source,
        )
        lender = layer if is_owner else layers[source]
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


def _heads(text: dict[str, Any], at: str, index: int, kind: str, k_eq_v: bool) -> tuple[int, int]:
    """Head size and KV heads of one layer.

    transformers writes `per_layer_config`, the released files `global_head_dim` and
    `num_global_key_value_heads`, the latter only in force where keys are values.
    """
    head_dim = positive(text, at + "head_dim")
    num_kv_heads = positive(text, at + "num_key_value_heads")
    overrides = text.get("per_layer_config")
    if overrides is None:
        if kind == FULL:
            head_dim = positive(text, at + "global_head_dim")
            if k_eq_v and text.get("num_global_key_value_heads") is not None:
                num_kv_heads = positive(text, at + "num_global_key_value_heads")
        return head_dim, num_kv_heads
    override = overrides.get(str(index), {}) if isinstance(overrides, dict) else None
    if not isinstance(override, dict) or set(override) - {"head_dim", "num_key_value_heads"}:
        raise CheckpointError(
            f"config.json has {at}per_layer_config for layer {index} = {override!r}; expected an "
            "object with head_dim and num_key_value_heads at most"
        )
    path = f"{at}per_layer_config.{index}."
    if "head_dim" in override:
        head_dim = positive(override, path + "head_dim")
    if "num_key_value_heads" in override:
        num_kv_heads = positive(override, path + "num_key_value_heads")
    return head_dim, num_kv_heads


def _rotary(ropes: dict[str, Any], kind: str, at: str) -> RotaryConfig:
    rope = ropes.get(kind)
    if not isinstance(rope, dict) or rope.get("rope_type") not in ("default", "proportional"):
        raise CheckpointError(
            f"config.json has {at}{kind} = {rope!r}; expected rope_type 'default' or "
            "'proportional' with a rope_theta"
        )
    path = f"{at}{kind}."
    fraction = factor = 1.0
    if rope.get("partial_rotary_factor") is not None:
        fraction = positive_number(rope, path + "partial_rotary_factor")
    is_default = rope["rope_type"] == "default"
    if fraction > 1.0 or (is_default and fraction != 1.0):
        raise CheckpointError(
            f"config.json has {path}partial_rotary_factor = {fraction} with rope_type "
            f"{rope['rope_type']!r}; only 'proportional' rotary takes one, of at most 1"
        )
    if not is_default and rope.get("factor") is not None:
        factor = positive_number(rope, path + "factor")
    return RotaryConfig(
        kind=rope["rope_type"],
        theta=positive_number(rope, path + "rope_theta"),
        fraction=fraction,
        factor=factor,
    )


class Attention(nn.Module):
    """Grouped-query attention over a static KV cache, its own or that of an earlier layer.

    Layout: K and V are `[KV heads, cache length, head size]`. A layer that shares owns no K/V
    weights and no cache.
    """

    def __init__(self, config: Gemma4Config, index: int, cache_length: int) -> None:
        super().__init__()
        layer = config.layers[index]
        self.num_heads, self.num_kv_heads = config.num_heads, layer.num_kv_heads
        self.head_dim, self.owns_cache = layer.head_dim, layer.source == index
        hidden, bias = config.hidden_size, config.attention_bias
        query_size = config.num_heads * layer.head_dim
        kv_size = layer.num_kv_heads * layer.head_dim
        self.q_proj = nn.Linear(hidden, query_size, bias=bias, device="meta")
        self.o_proj = nn.Linear(query_size, hidden, bias=bias, device="meta")
        self.q_norm = RMSNorm(layer.head_dim, config.norm_eps)
        if not self.owns_cache:
            return
        self.k_proj = nn.Linear(hidden, kv_size, bias=bias, device="meta")
        # Without a v_proj, V is the key projection under v_norm, without rotary.
        self.v_proj = (
            nn.Linear(hidden, kv_size, bias=bias, device="meta") if layer.has_values else None
        )
        self.k_norm = RMSNorm(layer.head_dim, config.norm_eps)
        self.v_norm = RMSNorm(layer.head_dim, config.norm_eps, weighted=False)
        shape = (layer.num_kv_heads, cache_length, layer.head_dim)
        self.register_buffer("key_cache", torch.zeros(shape), persistent=False)
        self.register_buffer("value_cache", torch.zeros(shape), persistent=False)

    def forward(
        self, x: Tensor, positions: Tensor, rotary: Rotary, mask: Tensor, source: Attention
    ) -> Tensor:
        """Attend from rows `x` `[N, H]` at `positions` `[N]` over the cache of `source`.

        `mask` is additive, `[G * N, L]` for G = heads / KV heads: the heads of one KV group are
        stacked as rows, so K and V are never repeated.
        """
        rows, groups = x.shape[0], self.num_heads // self.num_kv_heads
        if self.owns_cache:
            self._write(x, positions, rotary)
        query = self.q_norm(self.q_proj(x).view(rows, self.num_heads, self.head_dim))
        query = rotary.turn(query).view(rows, self.num_kv_heads, groups, self.head_dim)
        query = query.permute(1, 2, 0, 3).reshape(self.num_kv_heads, groups * rows, self.head_dim)
        scores = torch.bmm(query, source.key_cache.transpose(1, 2)) + mask  # the scale is 1.0
        mixed = torch.bmm(torch.softmax(scores, dim=-1), source.value_cache)
        mixed = mixed.reshape(self.num_kv_heads, groups, rows, self.head_dim).permute(2, 0, 1, 3)
        return self.o_proj(mixed.reshape(rows, self.num_heads * self.head_dim))

    def _write(self, x: Tensor, positions: Tensor, rotary: Rotary) -> None:
        rows = x.shape[0]
        key = self.k_proj(x).view(rows, self.num_kv_heads, self.head_dim)
        value = key
        if self.v_proj is not None:
            value = self.v_proj(x).view(rows, self.num_kv_heads, self.head_dim)
        key = rotary.turn(self.k_norm(key)).transpose(0, 1)
        value = self.v_norm(value).transpose(0, 1)
        torch.ops.aten.index_put_(self.key_cache, [None, positions], key)
        torch.ops.aten.index_put_(self.value_cache, [None, positions], value)


class Layer(nn.Module):
    """One transformer layer: attention, the MLP, and the layer's own embedding of the token."""

    def __init__(self, config: Gemma4Config, index: int, cache_length: int) -> None:
        super().__init__()
        layer = config.layers[index]
        hidden, eps, per_layer = config.hidden_size, config.norm_eps, config.per_layer_size
        self.self_attn = Attention(config, index, cache_length)
        self.mlp = GatedMLP(hidden, layer.intermediate_size)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)
        if per_layer:
            self.per_layer_input_gate = nn.Linear(hidden, per_layer, bias=False, device="meta")
            self.per_layer_projection = nn.Linear(per_layer, hidden, bias=False, device="meta")
            self.post_per_layer_input_norm = RMSNorm(hidden, eps)
        self.layer_scalar = nn.Parameter(torch.empty(1, device="meta"))

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        rotary: Rotary,
        mask: Tensor,
        source: Attention,
        per_layer: Tensor | None,
    ) -> Tensor:
        """Map the residual `[N, H]` to `[N, H]`; `per_layer` is this layer's input `[N, P]`."""
        attended = self.self_attn(self.input_layernorm(x), positions, rotary, mask, source)
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        if per_layer is not None:
            gated = gelu_tanh(self.per_layer_input_gate(x)) * per_layer
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return x * self.layer_scalar


class Gemma4Layers(nn.Module):
    """The stage from tokens to hidden states: embeddings, layers, final norm."""

    def __init__(self, config: Gemma4Config, *, maximum_context: int, prefill_length: int) -> None:
        """Build without weights.

        `maximum_context` is the length of the KV cache; one call takes 1 to `prefill_length`
        tokens.
        """
        super().__init__()
        self.config = config
        hidden, per_layer = config.hidden_size, config.per_layer_size
        self.embed_tokens = nn.Embedding(config.vocabulary_size, hidden, device="meta")
        self.layers = nn.ModuleList(
            Layer(config, i, maximum_context) for i in range(len(config.layers))
        )
        self.norm = RMSNorm(hidden, config.norm_eps)
        if per_layer:
            width = len(config.layers) * per_layer
            self.embed_tokens_per_layer = nn.Embedding(
                config.per_layer_vocabulary, width, device="meta"
            )
            self.per_layer_model_projection = nn.Linear(hidden, width, bias=False, device="meta")
            self.per_layer_projection_norm = RMSNorm(per_layer, config.norm_eps)
        for kind, rotary in config.rotary.items():
            head_dim = next(layer.head_dim for layer in config.layers if layer.kind == kind)
            self.register_buffer(
                f"{kind}_frequencies", inverse_frequencies(rotary, head_dim), persistent=False
            )
        self.register_buffer("key_positions", torch.arange(maximum_context), persistent=False)
        self.register_buffer("offsets", torch.arange(prefill_length), persistent=False)

    def forward(self, tokens: Tensor, start: Tensor, block_length: Tensor) -> Tensor:
        """Run the layers over N tokens, whose K/V extend the cache.

        Args:
            tokens: ids `[1, N]` int64, N from 1 to the prefill length.
            start: position of the first token, `[1]` int64, with start + N <= maximum context.
            block_length: `[1]` int64; a position sees its whole block of so many positions and all
                blocks before. 1 is causal.

        Returns:
            Normed hidden states `[1, N, H]`.
        """
        config, rows = self.config, tokens.shape[1]
        positions = start + self.offsets[:rows]
        x = self.embed_tokens(tokens).view(rows, config.hidden_size) * config.hidden_size**0.5
        per_layer = self._per_layer_inputs(tokens, x) if config.per_layer_size else None
        masks = self._masks(positions, block_length)
        rotaries = {
            kind: Rotary(positions, getattr(self, f"{kind}_frequencies")) for kind in config.rotary
        }
        size = config.per_layer_size
        for i, (layer, shape) in enumerate(zip(self.layers, config.layers, strict=True)):
            x = layer(
                x,
                positions,
                rotaries[shape.kind],
                masks[shape.kind, config.num_heads // shape.num_kv_heads],
                self.layers[shape.source].self_attn,
                None if per_layer is None else per_layer[:, i * size : (i + 1) * size],
            )
        return self.norm(x).unsqueeze(0)

    def _per_layer_inputs(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """What each layer adds of the token itself, all layers side by side: `[N, layers * P]`."""
        config, rows = self.config, tokens.shape[1]
        count, size = len(config.layers), config.per_layer_size
        looked_up = self.embed_tokens_per_layer(tokens).view(rows, count * size) * size**0.5
        projected = self.per_layer_model_projection(embedding) * config.hidden_size**-0.5
        projected = self.per_layer_projection_norm(projected.view(rows, count, size))
        return (projected.view(rows, count * size) + looked_up) * 2.0**-0.5

    def _masks(self, positions: Tensor, block_length: Tensor) -> dict[tuple[str, int], Tensor]:
        """Additive masks `[G * N, L]` for each kind of layer and size G of its KV groups.

        A key is seen up to the end of the query's block and of the rows of this call, and on
        sliding layers only if it is nearer than the window.
        """
        query = positions.unsqueeze(-1)
        query_block = torch.div(query, block_length, rounding_mode="floor")
        key_block = torch.div(self.key_positions, block_length, rounding_mode="floor")
        seen = (key_block <= query_block) & (self.key_positions <= positions.amax())
        near = self.key_positions > query - self.config.sliding_window
        visible = {FULL: seen, SLIDING: seen & near}
        needed = {
            (layer.kind, self.config.num_heads // layer.num_kv_heads)
            for layer in self.config.layers
        }
        return {
            (kind, groups): torch.where(visible[kind], 0.0, MASKED).repeat(groups, 1)
            for kind, groups in sorted(needed)
        }


def build_layers(
    checkpoint: Checkpoint, *, maximum_context: int, prefill_length: int
) -> tuple[Gemma4Layers, list[str]]:
    """Build the stage and load its weights from an fp32 or int4 checkpoint.

    Returns:
        The module in eval mode, and notes about tensors that were left out on purpose.

    Raises:
        CheckpointError: the config is of another architecture, or a tensor is missing or has
            another shape than the config says.
    """
    config = Gemma4Config.from_checkpoint_config(checkpoint.config)
    model = Gemma4Layers(config, maximum_context=maximum_context, prefill_length=prefill_length)
    tables = {"embed_tokens.weight", "embed_tokens_per_layer.weight"}
    used = {config.head_table}
    for path, parameter in list(model.named_parameters()):
        name = config.prefix + path
        used.add(name)
        if tuple(checkpoint.shape(name)) != tuple(parameter.shape):
            raise CheckpointError(
                f"tensor {name} has shape {list(checkpoint.shape(name))}, config.json says "
                f"{list(parameter.shape)}; take config and weights from one checkpoint"
            )
        weight = checkpoint.get(name)
        owner_path, _, leaf = path.rpartition(".")
        setattr(
            model.get_submodule(owner_path),
            leaf,
            nn.Parameter(lookup_table(weight) if path in tables else weight, requires_grad=False),
        )
    return model.eval(), _notes(config, checkpoint.names() - used)


def _notes(config: Gemma4Config, unused: set[str]) -> list[str]:
    others = tuple(f"model.{part}" for part in OTHER_MODALITIES)
    media = {name for name in unused if name.startswith(others)}
    shared = {
        f"{config.prefix}layers.{i}.self_attn.{part}."
        for i, layer in enumerate(config.layers)
        if layer.source != i
        for part in SHARED_PARTS
    }
    unread = {name for name in unused - media if name.rpartition(".")[0] + "." in shared}
    rest = sorted(unused - media - unread - {"lm_head.weight"})
    notes = []
    if media:
        notes.append(f"skipped {len(media)} tensors of the vision and audio towers: text only")
    if unread:
        notes.append(f"skipped {len(unread)} tensors of layers that share keys and values")
    if rest:
        notes.append(f"skipped {len(rest)} tensors this architecture does not use: {rest[:3]}")
    return notes
