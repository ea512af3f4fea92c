"""The dense decoder of Qwen3, Qwen2, Llama and LLaDA as one graph, causal or blockwise.

What this file does not know: quantization (weights may be torchao tensors), backends, samplers.
References: `modeling_qwen3.py`, `modeling_qwen2.py` and `modeling_llama.py` of transformers 5.23,
and `modeling_llada.py` of LLaDA-8B, whose layers are Llama's under other names.
"""

from __future__ import annotations

import math
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
    positive,
    positive_number,
    refuse_variant,
    silu,
)
from export.models.weights import Weights
from quantize.checkpoint import Checkpoint
from quantize.errors import CheckpointError

QWEN3_TYPES = frozenset({"qwen3", "a2d-qwen3", "sdar"})
QWEN2_TYPES = frozenset({"qwen2", "a2d-qwen2", "Dream", "Fast_dLLM_Qwen"})
LLAMA_TYPES = frozenset({"llama", "a2d-llama"})
LLADA_TYPE = "llada"

# Our names -> LLaDA's, behind `model.transformer.` or `model.transformer.blocks.N.`.
_LLADA_TOP = {"embed_tokens": "wte", "norm": "ln_f"}
_LLADA_LAYER = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
}


@dataclass(frozen=True)
class Llama3Scaling:
    """How Llama 3.1 and later stretch the rotary frequencies of long wavelengths."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class DenseConfig:
    """The fields of config.json that shape the layers; `ties` None: the weights must tell."""

    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    ties: bool | None = None
    has_qk_norm: bool = False
    has_qkv_bias: bool = False
    has_llada_names: bool = False
    rope_scaling: Llama3Scaling | None = None

    @classmethod
    def from_checkpoint_config(cls, config: dict[str, Any]) -> DenseConfig:
        """Read config.json as a dict.

        Raises:
            CheckpointError: another architecture, a missing or impossible field, or a variant that
                this graph does not have.
        """
        kind = config.get("model_type")
        if kind == LLADA_TYPE:
            made = _llada_config(config)
        elif kind in QWEN3_TYPES | QWEN2_TYPES | LLAMA_TYPES:
            made = _hugging_face_config(config, kind)
        else:
            known = sorted(QWEN3_TYPES | QWEN2_TYPES | LLAMA_TYPES | {LLADA_TYPE})
            raise CheckpointError(
                f"config.json has model_type {kind!r}, which is no dense decoder; "
                f"supported: {', '.join(known)}"
            )
        if made.num_heads % made.num_kv_heads or made.head_dim % 2:
            raise CheckpointError(
                f"config.json gives {made.num_heads} heads over {made.num_kv_heads} KV heads of "
                f"{made.head_dim}; heads must divide evenly and the head size be even"
            )
        return made

    @property
    def kv_groups(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def embedding_name(self) -> str:
        """The checkpoint's name of the embedding table."""
        return checkpoint_name("embed_tokens.weight", self)

    def head_name(self, checkpoint: Checkpoint) -> str:
        """The checkpoint's name of the vocabulary head's table: the embedding's if they are tied.

        Raises CheckpointError if config.json says that they are not and the head is missing.
        """
        own = "model.transformer.ff_out.weight" if self.has_llada_names else "lm_head.weight"
        is_stored = own in checkpoint.names()
        if self.ties or (self.ties is None and not is_stored):
            return self.embedding_name
        if not is_stored:
            raise CheckpointError(
                f"{checkpoint.folder} has no tensor {own} and config.json says that the head is "
                "not tied to the embedding; fetch the checkpoint again"
            )
        if tuple(checkpoint.shape(own)) != (self.vocabulary_size, self.hidden_size):
            raise CheckpointError(_shape_sentence(checkpoint, own))
        return own


def _hugging_face_config(config: dict[str, Any], kind: str) -> DenseConfig:
    """The keys that Qwen3, Qwen2, Llama and what is made from them share."""
    refuse_variant(config, "hidden_act", {"silu"}, default="silu")
    refuse_variant(config, "use_sliding_window", {False, None})
    num_layers, kinds = positive(config, "num_hidden_layers"), config.get("layer_types")
    if kinds is not None and not (
        isinstance(kinds, list)
        and len(kinds) == num_layers
        and all(kind == "full_attention" for kind in kinds)
    ):
        raise CheckpointError(
            f"config.json has layer_types = {str(kinds)[:100]}; supported: 'full_attention' for "
            "each layer"
        )
    if kind not in QWEN2_TYPES:  # Qwen2's bias is not optional, whatever the field says
        refuse_variant(config, "attention_bias", {False, None})
    refuse_variant(config, "mlp_bias", {False, None})
    hidden, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
    head_dim = config.get("head_dim")
    if head_dim is None and kind not in QWEN3_TYPES:  # Qwen3's own default is another
        if hidden % heads:
            raise CheckpointError(
                f"config.json has hidden_size {hidden} over {heads} heads and no head_dim; "
                "the heads must divide it"
            )
        head_dim = hidden // heads
    else:
        head_dim = positive(config, "head_dim")
    theta, scaling = _rope(config)
    ties = config.get("tie_word_embeddings")
    return DenseConfig(
        vocabulary_size=positive(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=positive(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=heads
        if config.get("num_key_value_heads") is None
        else positive(config, "num_key_value_heads"),
        head_dim=head_dim,
        norm_eps=float(field(config, "rms_norm_eps", (int, float))),
        rope_theta=theta,
        max_positions=positive(config, "max_position_embeddings"),
        ties=ties if isinstance(ties, bool) else None,
        has_qk_norm=kind in QWEN3_TYPES,
        has_qkv_bias=kind in QWEN2_TYPES,
        rope_scaling=scaling,
    )


def _rope(config: dict[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Theta and scaling, from transformers 5's `rope_parameters` or the two fields before it."""
    section = config.get("rope_parameters")
    name = "rope_parameters"
    if not isinstance(section, dict):
        name, section = "rope_scaling", config.get("rope_scaling") or {}
        if not isinstance(section, dict):
            raise CheckpointError(f"config.json has rope_scaling = {section!r}; give an object")
        section = {"rope_theta": config.get("rope_theta"), **section}
    theta = positive_number(section, f"{name}.rope_theta")
    kind = section.get("rope_type", section.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(
            f"config.json has {name} of the type {kind!r}; supported: 'default', 'llama3'"
        )
    low, high = (positive_number(section, f"{name}.{side}_freq_factor") for side in ("low", "high"))
    if low >= high:
        raise CheckpointError(
            f"config.json has {name}.low_freq_factor {low} and high_freq_factor {high}; "
            "the first must be smaller"
        )
    return theta, Llama3Scaling(
        factor=positive_number(section, f"{name}.factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_positions=positive(section, f"{name}.original_max_position_embeddings"),
    )


def _llada_config(config: dict[str, Any]) -> DenseConfig:
    """LLaDA's own keys; everything but the layers of Llama is refused."""
    for key, allowed, default in (
        ("block_type", {"llama"}, "sequential"),
        ("activation_type", {"silu"}, "swiglu"),
        ("layer_norm_type", {"rms"}, "default"),
        ("rope", {True}, False),
        ("alibi", {False}, False),
        ("include_bias", {False}, False),
        ("include_qkv_bias", {False, None}, False),
        ("bias_for_layer_norm", {False, None}, None),
        ("attention_layer_norm", {False}, False),
        ("layer_norm_with_affine", {True}, True),
        ("input_emb_norm", {False}, False),
        ("scale_logits", {False}, False),
        ("block_group_size", {1}, 1),
    ):
        refuse_variant({key: config.get(key, default)}, key, allowed)
    hidden, heads = positive(config, "d_model"), positive(config, "n_heads")
    if hidden % heads:
        raise CheckpointError(
            f"config.json has d_model {hidden} over {heads} heads; the heads must divide it"
        )
    kv_heads = config.get("n_kv_heads")
    if kv_heads is None:
        kv_heads = 1 if config.get("multi_query_attention") else heads
    else:
        kv_heads = positive(config, "n_kv_heads")
    size = "vocab_size" if config.get("embedding_size") is None else "embedding_size"
    inner = config.get("mlp_hidden_size")
    return DenseConfig(
        vocabulary_size=positive(config, size),
        hidden_size=hidden,
        intermediate_size=hidden * positive(config, "mlp_ratio")
        if inner is None
        else positive(config, "mlp_hidden_size"),
        num_layers=positive(config, "n_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        norm_eps=positive_number(config, "rms_norm_eps"),
        rope_theta=positive_number(config, "rope_theta"),
        max_positions=positive(config, "max_sequence_length"),
        ties=config.get("weight_tying", True) is not False,
        has_llada_names=True,
    )


def inverse_frequencies(config: DenseConfig) -> Tensor:
    """Rotary frequencies `[head_dim / 2]`, stretched if the config says so.

    Source: `_compute_llama3_parameters` in transformers' `modeling_rope_utils.py`.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # Wavelengths that fit often enough into the original context stay, the longest are stretched
    # by the factor, those between by a mixture.
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


class Attention(nn.Module):
    """Grouped-query attention over a static KV cache that it owns.

    Layout: K and V are `[KV heads, cache length, head size]`. The new rows are written at their
    positions; a denoising step's rows are scratch that later calls overwrite.
    """

    def __init__(self, config: DenseConfig, cache_length: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        hidden, bias = config.hidden_size, config.has_qkv_bias
        query_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, query_size, bias=bias, device="meta")
        self.k_proj = nn.Linear(hidden, kv_size, bias=bias, device="meta")
        self.v_proj = nn.Linear(hidden, kv_size, bias=bias, device="meta")
        self.o_proj = nn.Linear(query_size, hidden, bias=False, device="meta")
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.has_qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.has_qk_norm else None
        shape = (self.num_kv_heads, cache_length, self.head_dim)
        self.register_buffer("key_cache", torch.zeros(shape), persistent=False)
        self.register_buffer("value_cache", torch.zeros(shape), persistent=False)

    def forward(self, x: Tensor, positions: Tensor, rotary: Rotary, mask: Tensor) -> Tensor:
        """Attend from rows `x` `[N, H]` at `positions` `[N]` under the additive `mask`.

        The mask is `[heads / KV heads * N, L]`: heads of one KV group are stacked as rows, so that
        K and V are never repeated.
        """
        rows, groups = x.shape[0], self.num_heads // self.num_kv_heads
        query = self.q_proj(x).view(rows, self.num_heads, self.head_dim)
        key = self.k_proj(x).view(rows, self.num_kv_heads, self.head_dim)
        value = self.v_proj(x).view(rows, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotary.turn(query) * self.scale
        key = rotary.turn(key).transpose(0, 1)
        torch.ops.aten.index_put_(self.key_cache, [None, positions], key)
        torch.ops.aten.index_put_(self.value_cache, [None, positions], value.transpose(0, 1))
        query = query.view(rows, self.num_kv_heads, groups, self.head_dim).permute(1, 2, 0, 3)
        query = query.reshape(self.num_kv_heads, groups * rows, self.head_dim)
        scores = torch.bmm(query, self.key_cache.transpose(1, 2)) + mask
        mixed = torch.bmm(torch.softmax(scores, dim=-1), self.value_cache)
        mixed = mixed.reshape(self.num_kv_heads, groups, rows, self.head_dim)
        mixed = mixed.permute(2, 0, 1, 3).reshape(rows, self.num_heads * self.head_dim)
        return self.o_proj(mixed)


class Layer(nn.Module):
    """One transformer layer: attention, then the gated MLP, each behind its norm."""

    def __init__(self, config: DenseConfig, cache_length: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, cache_length)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, silu)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, positions: Tensor, rotary: Rotary, mask: Tensor) -> Tensor:
        """Map the residual `[N, H]` to `[N, H]`."""
        x = x + self.self_attn(self.input_layernorm(x), positions, rotary, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class DenseEntry(nn.Module):
    """From tokens to what the layers take: embedded rows, the mask, rotary angles.

    One graph serves prefill, decoding and denoising: they differ in how many rows there are and in
    what the rows see.
    """

    def __init__(self, config: DenseConfig, *, maximum_context: int, prefill_length: int) -> None:
        """Build without weights; `prefill_length` is the most rows of a call."""
        super().__init__()
        self.config = config
        self.maximum_context = maximum_context
        self.prefill_length = prefill_length
        self.embed_tokens = nn.Embedding(config.vocabulary_size, config.hidden_size, device="meta")
        self.register_buffer("frequencies", inverse_frequencies(config), persistent=False)
        self.register_buffer("key_positions", torch.arange(maximum_context), persistent=False)
        self.register_buffer("offsets", torch.arange(prefill_length), persistent=False)

    def forward(self, tokens: Tensor, start: Tensor, block_length: Tensor) -> tuple[Tensor, ...]:
        """The inputs of `LayerGroup`; the arguments are those of `DenseLayers`.

        Returns:
            Rows `[1, N, H]`, the additive mask `[heads / KV heads * N, L]`, the cosines and sines
            `[N, 1, head size / 2]`.
        """
        hidden, positions, mask = self.enter(tokens, start, block_length)
        rotary = Rotary(positions, self.frequencies)
        return hidden.unsqueeze(0), mask, rotary.cos, rotary.sin

    def enter(
        self, tokens: Tensor, start: Tensor, block_length: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embedded rows `[N, H]`, positions `[N]`, the mask as layers take it."""
        rows = tokens.shape[1]
        positions = start + self.offsets[:rows]
        hidden = self.embed_tokens(tokens).view(rows, self.config.hidden_size)
        block_end = (positions // block_length + 1) * block_length
        seen_to = torch.minimum(block_end, start + rows)
        mask = torch.where(self.key_positions < seen_to.unsqueeze(-1), 0.0, MASKED)
        return hidden, positions, mask.repeat(self.config.kv_groups, 1)


class DenseLayers(DenseEntry):
    """The stage from tokens to hidden states: embedding, layers, final norm."""

    def __init__(self, config: DenseConfig, *, maximum_context: int, prefill_length: int) -> None:
        """Build without weights; `prefill_length` is the most rows of a call."""
        super().__init__(config, maximum_context=maximum_context, prefill_length=prefill_length)
        self.layers = nn.ModuleList(
            Layer(config, maximum_context) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(  # type: ignore[override]
        self, tokens: Tensor, start: Tensor, block_length: Tensor
    ) -> Tensor:
        """Run the layers over `N` consecutive positions, 1 to the prefill length.

        Args:
            tokens: ids `[1, N]` int64.
            start: position of the first token, `[1]` int64, with start + N <= maximum context.
            block_length: `[1]` int64, at least 1: a position sees the whole block that it is in
                and all before, as far as they are written; 1 is causal.

        Returns:
            Normed hidden states `[1, N, H]`. K and V of the rows are at their positions in the
            cache.
        """
        hidden, positions, mask = self.enter(tokens, start, block_length)
        rotary = Rotary(positions, self.frequencies)
        for layer in self.layers:
            hidden = layer(hidden, positions, rotary, mask)
        return self.norm(hidden).unsqueeze(0)


class LayerGroup(nn.Module):
    """Consecutive layers as a stage of their own, with the KV cache of these layers."""

    def __init__(
        self, config: DenseConfig, count: int, *, maximum_context: int, prefill_length: int
    ) -> None:
        """Build without weights."""
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config, maximum_context) for _ in range(count))
        self.register_buffer("offsets", torch.arange(prefill_length), persistent=False)

    def forward(
        self, hidden: Tensor, start: Tensor, mask: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Map rows `[1, N, H]` to `[1, N, H]`; the rest is what `DenseEntry` gives."""
        length = hidden.shape[1]
        positions = start + self.offsets[:length]
        rows = hidden.view(length, self.config.hidden_size)
        rotary = Rotary.of(cos, sin)
        for layer in self.layers:
            rows = layer(rows, positions, rotary, mask)
        return rows.unsqueeze(0)


def checkpoint_name(path: str, config: DenseConfig) -> str:
    """The checkpoint's name of the parameter at `path` of DenseLayers."""
    if not config.has_llada_names:
        return f"model.{path}"
    owner, _, leaf = path.rpartition(".")
    if not owner.startswith("layers."):
        return f"model.transformer.{_LLADA_TOP[owner]}.{leaf}"
    _, index, rest = owner.split(".", 2)
    return f"model.transformer.blocks.{index}.{_LLADA_LAYER[rest]}.{leaf}"


def build_layers(
    checkpoint: Checkpoint, config: DenseConfig, *, maximum_context: int, prefill_length: int
) -> tuple[DenseLayers, list[str]]:
    """Build the stage and load its weights from an fp32 or int4 checkpoint.

    Returns:
        The module in eval mode, and notes about tensors that were left out on purpose.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the config says.
    """
    model = DenseLayers(config, maximum_context=maximum_context, prefill_length=prefill_length)
    check_vocabulary(checkpoint, config)
    used = load_weights(model, config, checkpoint)
    return model.eval(), unused_notes(checkpoint, used)


def check_vocabulary(checkpoint: Checkpoint, config: DenseConfig) -> None:
    """Raise CheckpointError for an embedding table that config.json does not describe."""
    rows = checkpoint.shape(config.embedding_name)[0]
    if rows != config.vocabulary_size:
        raise CheckpointError(
            f"config.json has a vocabulary of {config.vocabulary_size} tokens and "
            f"{config.embedding_name} has {rows} rows; take config and weights from one checkpoint"
        )


def load_weights(
    model: nn.Module, config: DenseConfig, weights: Weights, first_layer: int = 0
) -> set[str]:
    """Give a module of this file its weights; its layer 0 is layer `first_layer` of the model.

    Returns the names of the tensors that were used. Raises CheckpointError for one that is missing
    or has another shape than the module.
    """
    used: set[str] = set()
    for path, parameter in list(model.named_parameters()):
        parts = path.split(".")
        if parts[0] == "layers":
            parts[1] = str(first_layer + int(parts[1]))
        name = checkpoint_name(".".join(parts), config)
        if tuple(weights.shape(name)) != tuple(parameter.shape):
            raise CheckpointError(_shape_sentence(weights, name))
        weight = weights.get(name)
        owner_path, _, leaf = path.rpartition(".")
        owner = model.get_submodule(owner_path)
        if isinstance(owner, nn.Embedding):
            weight = lookup_table(weight)
        setattr(owner, leaf, nn.Parameter(weight, requires_grad=False))
        used.add(name)
    return used


def used_names(config: DenseConfig) -> set[str]:
    """The checkpoint's names of all that embedding, layers and final norm are built from."""
    model = DenseLayers(config, maximum_context=1, prefill_length=1)
    return {checkpoint_name(path, config) for path, _ in model.named_parameters()}


def unused_notes(checkpoint: Checkpoint, used: set[str]) -> list[str]:
    """What to tell about tensors that no module took; CheckpointError for a bias among them."""
    used = used | {"lm_head.weight", "model.transformer.ff_out.weight"}
    names = checkpoint.names()
    # Old checkpoints store the rotary frequencies, which follow from the config.
    unused = sorted(n for n in names - used if not n.endswith("rotary_emb.inv_freq"))
    if any(name.endswith(".bias") for name in unused):
        listed = [name for name in unused if name.endswith(".bias")]
        raise CheckpointError(
            f"{checkpoint.folder} has {len(listed)} biases that its model_type does not use "
            f"({listed[0]}); check the model_type of config.json"
        )
    notes = []
    if unused:
        notes.append(f"skipped {len(unused)} tensors this architecture does not use: {unused[:3]}")
    return notes


def _shape_sentence(weights: Weights, name: str) -> str:
    return (
        f"tensor {name} has shape {list(weights.shape(name))}, which does not fit config.json; "
        "take config and weights from one checkpoint"
    )
