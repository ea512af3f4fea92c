"""The dense decoders: Llama, Qwen2, Qwen3, LLaDA, and the masked-diffusion models made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from export.contract.styles import STYLES
from export.families.dense_formats import APPROXIMATE_CACHE, EXACT_CACHE, FORMATS, Masked
from export.families.description import Description, Sizes, context_of
from export.families.fields import Section, check_heads, divided, model_type_of
from export.families.samplers import autoregressive_sampler, sampler_of, truncates
from export.families.shapes import Attention, Elementwise, ModelShape
from export.families.tokens import ModelFiles
from export.families.weights import Weight, gated_mlp, linear, norms
from quantize.errors import CheckpointError

DEFAULT_CONTEXT = 2048
"""Default maximum context of causal and block-causal models."""
DEFAULT_CONTEXT_SEEING_ALL = 1024
"""The same for models that see everything: a step's arithmetic and memory grow with its square."""
PREFILL_LENGTH = 256
"""Most tokens in a call of causal and block-causal models, if a block is not longer."""

KIND = "full_attention"

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
class DenseConfig(Sizes):
    """The fields of config.json that shape the layers.

    ties: whether the vocabulary head is the embedding table; None: it is where no head is stored.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    ties: bool | None = None
    has_qk_norm: bool = False
    has_qkv_bias: bool = False
    has_llada_names: bool = False
    rope_scaling: Llama3Scaling | None = None

    @classmethod
    def from_checkpoint_config(cls, config: Mapping[str, Any]) -> DenseConfig:
        """Read config.json as a dict.

        Raises:
            CheckpointError: another architecture, a missing or impossible field, or a variant that
                this graph does not have.
        """
        layers = FORMATS[model_type_of(config, FORMATS)].layers
        section = Section(config)
        read = _llada_config(section) if layers == "llada" else _hugging_face(section, layers)
        check_heads("", read.num_heads, read.num_kv_heads, read.head_dim)
        return read

    @property
    def kv_groups(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def embedding(self) -> str:
        """The checkpoint's name of the embedding table."""
        return self.checkpoint_name("embed_tokens.weight")

    @property
    def own_head(self) -> str:
        """The checkpoint's name of a vocabulary head that is not tied to the embedding."""
        return "model.transformer.ff_out.weight" if self.has_llada_names else "lm_head.weight"

    def checkpoint_name(self, path: str) -> str:
        """The checkpoint's name of the graph's parameter at `path`."""
        if not self.has_llada_names:
            return f"model.{path}"
        owner, _, leaf = path.rpartition(".")
        if not owner.startswith("layers."):
            return f"model.transformer.{_LLADA_TOP[owner]}.{leaf}"
        _, index, rest = owner.split(".", 2)
        return f"model.transformer.blocks.{index}.{_LLADA_LAYER[rest]}.{leaf}"


def _hugging_face(section: Section, layers: str) -> DenseConfig:
    """The keys that Qwen3, Qwen2, Llama and what is made from them share."""
    section.only("hidden_act", "silu", default="silu")
    section.only("use_sliding_window", False, None)
    section.only("mlp_bias", False, None)
    if layers != "qwen2":  # whose bias is not optional, whatever the field says
        section.only("attention_bias", False, None)
    num_layers, kinds = section.layers("num_hidden_layers"), section.get("layer_types")
    if kinds is not None and kinds != [KIND] * num_layers:
        raise CheckpointError(
            f"config.json has layer_types = {str(kinds)[:100]}; supported: {KIND!r} for each layer"
        )
    hidden, heads = section.size("hidden_size"), section.size("num_attention_heads")
    # Qwen3's own default is another.
    is_derived = section.get("head_dim") is None and layers != "qwen3"
    theta, scaling = _rope(section)
    ties = section.get("tie_word_embeddings")
    return DenseConfig(
        **Sizes.read(section),
        num_layers=num_layers,
        num_kv_heads=section.size("num_key_value_heads", heads),
        head_dim=divided(hidden, heads) if is_derived else section.size("head_dim"),
        rope_theta=theta,
        ties=ties if isinstance(ties, bool) else None,
        has_qk_norm=layers == "qwen3",
        has_qkv_bias=layers == "qwen2",
        rope_scaling=scaling,
    )


def _rope(section: Section) -> tuple[float, Llama3Scaling | None]:
    """Theta and scaling, from transformers 5's `rope_parameters` or the two fields before it."""
    if isinstance(section.get("rope_parameters"), Mapping):
        rope = section.section("rope_parameters")
    else:
        stated = (
            {} if section.get("rope_scaling") is None else section.section("rope_scaling").entries
        )
        rope = Section({"rope_theta": section.get("rope_theta"), **stated}, "rope_scaling.")
    theta = rope.number("rope_theta")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(
            f"config.json has {rope.path}rope_type = {kind!r}; supported: 'default', 'llama3'"
        )
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise rope.refusal("low_freq_factor", f"it must be smaller than high_freq_factor, {high}")
    return theta, Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_positions=rope.size("original_max_position_embeddings"),
    )


def _llada_config(section: Section) -> DenseConfig:
    """LLaDA's own keys; everything but the layers of Llama is refused."""
    for key, allowed, default in (
        ("block_type", ("llama",), "sequential"),
        ("activation_type", ("silu",), "swiglu"),
        ("layer_norm_type", ("rms",), "default"),
        ("rope", (True,), False),
        ("alibi", (False,), False),
        ("include_bias", (False,), False),
        ("include_qkv_bias", (False, None), False),
        ("bias_for_layer_norm", (False, None), None),
        ("attention_layer_norm", (False,), False),
        ("layer_norm_with_affine", (True,), True),
        ("input_emb_norm", (False,), False),
        ("scale_logits", (False,), False),
        ("block_group_size", (1,), 1),
    ):
        section.only(key, *allowed, default=default)
    hidden, heads = section.size("d_model"), section.size("n_heads")
    has_inner = section.get("mlp_hidden_size") is not None
    has_rows = section.get("embedding_size") is not None
    return DenseConfig(
        vocabulary_size=section.size("embedding_size" if has_rows else "vocab_size"),
        hidden_size=hidden,
        intermediate_size=section.size("mlp_hidden_size")
        if has_inner
        else hidden * section.size("mlp_ratio"),
        num_layers=section.layers("n_layers"),
        num_heads=heads,
        num_kv_heads=section.size(
            "n_kv_heads", 1 if section.get("multi_query_attention") else heads
        ),
        head_dim=divided(hidden, heads),
        norm_eps=section.number("rms_norm_eps"),
        rope_theta=section.number("rope_theta"),
        max_positions=section.size("max_sequence_length"),
        ties=section.get("weight_tying") is not False,
        has_llada_names=True,
    )


def describe(files: ModelFiles, maximum_context: int | None) -> Description[DenseConfig]:
    """See `export.families.describe`."""
    config = DenseConfig.from_checkpoint_config(files.config)
    kind = files.config["model_type"]
    masked = FORMATS[kind].masked
    if masked is not None:
        return _masked(files, config, masked, maximum_context)
    style = STYLES["autoregressive"]
    context = context_of(
        maximum_context, default=DEFAULT_CONTEXT, largest=config.max_positions, least=2
    )
    sampler = autoregressive_sampler(style, files.generation_config)
    return Description(
        config,
        ModelShape(
            family=kind,
            style=style,
            default_context=context,
            prefill_rows=PREFILL_LENGTH,
            truncation=truncates(sampler),
            **_layers_of(config),
        ),
        sampler,
    )


def _masked(
    files: ModelFiles, config: DenseConfig, masked: Masked, maximum_context: int | None
) -> Description[DenseConfig]:
    style, block = STYLES["masked_diffusion"], masked.block_length(files)
    context = context_of(
        maximum_context,
        default=DEFAULT_CONTEXT if block else DEFAULT_CONTEXT_SEEING_ALL,
        largest=config.max_positions,
        least=max(2, block),
        block=block or 1,
    )
    canvas = masked.canvas_length(block, context)
    settings = masked.settings_of(files.generation_config)
    sampler = sampler_of(style, {"steps_per_canvas": canvas, **settings})
    rows = max(PREFILL_LENGTH // block * block, block + masked.shift) if block else 0
    return Description(
        config,
        ModelShape(
            family=files.config["model_type"],
            style=style,
            default_context=context,
            prefill_rows=rows,
            canvas_length=canvas,
            block_length=block,
            truncation=truncates(sampler),
            **_layers_of(config),
        ),
        sampler,
        shift=masked.shift,
        tokens=masked.tokens,
        notes=(EXACT_CACHE if block else APPROXIMATE_CACHE,),
    )


def _layers_of(config: DenseConfig) -> dict[str, Any]:
    """What the shape of every format says of the layers."""
    attention = Attention(KIND, config.num_heads, config.num_kv_heads, config.head_dim)
    return {
        **config.of_shape(),
        "weights": tuple(_weights(config)),
        "attentions": (attention,) * config.num_layers,
        "elementwise": _elementwise(config),
        "embedding": config.embedding,
        "head_table": config.own_head if config.ties is False else config.embedding,
    }


def _weights(config: DenseConfig) -> list[Weight]:
    hidden, query = config.hidden_size, config.num_heads * config.head_dim
    kv, bias = config.num_kv_heads * config.head_dim, config.has_qkv_bias
    found = [Weight("embed_tokens.weight", (config.vocabulary_size, hidden), "embedding", "lookup")]
    found += norms("", ("norm",), hidden)
    for layer in range(config.num_layers):
        at = f"layers.{layer}."
        for name, rows in (("q_proj", query), ("k_proj", kv), ("v_proj", kv)):
            found += linear(f"{at}self_attn.{name}", (rows, hidden), "attention", KIND, bias=bias)
        found += linear(f"{at}self_attn.o_proj", (hidden, query), "attention", KIND)
        found += gated_mlp(f"{at}mlp.", hidden, config.intermediate_size, KIND)
        found += norms(at, ("input_layernorm", "post_attention_layernorm"), hidden, KIND)
        if config.has_qk_norm:
            names = ("q_norm", "k_norm")
            found += norms(f"{at}self_attn.", names, config.head_dim, KIND, "attention")
    found = [replace(weight, name=config.checkpoint_name(weight.name)) for weight in found]
    if config.ties is False:
        found.append(Weight(config.own_head, (config.vocabulary_size, hidden), "head", "product"))
    return found


def _elementwise(config: DenseConfig) -> Elementwise:
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # Two norms (square, scale, weight) and two residuals; silu (sigmoid, product) and its product.
    values = config.hidden_size * (2 * 3 + 2) + 3 * config.intermediate_size
    # Rotary (4 products, 2 sums in halves, one join), scale and two rearrangements; KV writes.
    values += 4 * (query + kv) + 3 * query + 2 * kv
    values += 4 * (query + kv) if config.has_qk_norm else query
    return Elementwise({KIND: config.num_layers * values}, 40 + 10 * config.has_qk_norm)
