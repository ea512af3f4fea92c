"""DiffusionGemma's text model: a mixture of experts beside a dense MLP, denoised on a canvas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from export.contract.manifest import Sampler
from export.contract.styles import STYLES
from export.families.description import Description, Sizes, context_of
from export.families.fields import Section, model_type_of
from export.families.gemma import (
    SLIDING,
    RotaryConfig,
    attention_weights,
    heads_of,
    layer_kinds,
    rotary_of,
)
from export.families.samplers import sampler_of
from export.families.shapes import Attention, Elementwise, ModelShape
from export.families.tokens import ModelFiles
from export.families.weights import Weight, gated_mlp, linear, norms
from quantize.errors import CheckpointError

DECODER, ENCODER = "model.decoder.", "model.encoder.language_model."
EMBEDDING = f"{DECODER}embed_tokens.weight"
STYLE = STYLES["uniform_diffusion"]
CONDITIONING = "self_conditioning"

DEFAULT_CANVASES = 16
"""Default maximum context, in canvases: 4096 positions at the released canvas of 256."""


@dataclass(frozen=True)
class LayerConfig:
    """What differs between layers: attention span, head size, KV heads."""

    kind: str
    head_dim: int
    num_kv_heads: int

    @property
    def has_values(self) -> bool:
        """Full layers take the keys' projection for the values."""
        return self.kind == SLIDING


@dataclass(frozen=True)
class DiffusionGemmaConfig(Sizes):
    """The fields of `config.json` that shape the text model; nothing is defaulted from a class."""

    num_experts: int
    top_k: int
    expert_size: int
    sliding_window: int
    soft_cap: float
    canvas_length: int
    attention_bias: bool
    layers: tuple[LayerConfig, ...]
    rotary: dict[str, RotaryConfig]

    @classmethod
    def from_checkpoint_config(cls, config: Mapping[str, Any]) -> DiffusionGemmaConfig:
        """Read `config.json` as a dict.

        Raises:
            CheckpointError: another architecture, a missing field, or a variant that the released
                models do not use and this graph does not have.
        """
        model_type_of(config, ("diffusion_gemma",))
        whole = Section(config)
        text = whole.section("text_config")
        whole.only("tie_word_embeddings", True, default=True)
        text.only("use_bidirectional_attention", None, "vision")
        text.only("hidden_activation", "gelu_pytorch_tanh")
        kinds = layer_kinds(text)
        top_k, num_experts = text.size("top_k_experts"), text.size("num_experts")
        if top_k > num_experts:
            raise CheckpointError(f"config.json has top_k_experts {top_k} of {num_experts} experts")
        return cls(
            **cls.read(text),
            num_experts=num_experts,
            top_k=top_k,
            expert_size=text.size("moe_intermediate_size"),
            sliding_window=text.size("sliding_window"),
            soft_cap=text.number("final_logit_softcapping"),
            canvas_length=whole.size("canvas_length"),
            attention_bias=text.flag("attention_bias"),
            layers=tuple(
                LayerConfig(kind, *heads_of(text, i, kind, global_kv_heads=True))
                for i, kind in enumerate(kinds)
            ),
            rotary=rotary_of(text, kinds),
        )


def describe(files: ModelFiles, maximum_context: int | None) -> Description[DiffusionGemmaConfig]:
    """See `export.families.describe`."""
    config = DiffusionGemmaConfig.from_checkpoint_config(files.config)
    canvas = config.canvas_length
    context = context_of(
        maximum_context,
        default=DEFAULT_CANVASES * canvas,
        largest=config.max_positions,
        least=canvas,
    )
    shape = ModelShape(
        family="diffusion_gemma",
        style=STYLE,
        **config.of_shape(),
        canvas_length=canvas,
        block_length=0,
        default_context=context,
        weights=tuple(_weights(config)),
        attentions=tuple(
            Attention(
                layer.kind,
                config.num_heads,
                layer.num_kv_heads,
                layer.head_dim,
                window=config.sliding_window if layer.kind == SLIDING else None,
            )
            for layer in config.layers
        ),
        elementwise=_elementwise(config),
        embedding=EMBEDDING,
        head_table=EMBEDDING,
        prefill_rows=canvas,
        soft_cap=config.soft_cap,
        soft_embedding=True,
        num_experts=config.num_experts,
        top_k=config.top_k,
        expert_size=config.expert_size,
    )
    return Description(config, shape, _sampler(files.generation_config))


def _weights(config: DiffusionGemmaConfig) -> list[Weight]:
    hidden, inner = config.hidden_size, config.intermediate_size
    experts, size = config.num_experts, config.expert_size
    found = [Weight(EMBEDDING, (config.vocabulary_size, hidden), "embedding", "lookup")]
    found += norms(DECODER, ("norm", f"{CONDITIONING}.pre_norm"), hidden)
    found += gated_mlp(f"{DECODER}{CONDITIONING}.", hidden, inner, CONDITIONING)
    for i, layer in enumerate(config.layers):
        at, kind = f"{DECODER}layers.{i}.", layer.kind
        query = config.num_heads * layer.head_dim
        kv = layer.num_kv_heads * layer.head_dim
        found += attention_weights(
            at, kind, hidden, query, kv, layer.head_dim,
            has_values=layer.has_values, bias=config.attention_bias,
        )  # fmt: skip
        found += gated_mlp(f"{at}mlp.", hidden, inner, kind)
        found += linear(f"{at}router.proj", (experts, hidden), "router", kind)
        found += [
            Weight(f"{at}router.scale", (hidden,), "router", "elementwise", kind),
            Weight(f"{at}router.per_expert_scale", (experts,), "router", "elementwise", kind),
        ]
        for name, shape in (
            ("gate_up_proj", (experts, 2 * size, hidden)),
            ("down_proj", (experts, hidden, size)),
        ):
            found.append(
                Weight(
                    f"{at}experts.{name}", shape, "experts", "experts", kind, active=config.top_k
                )
            )
        found += norms(
            at,
            (
                "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                "post_feedforward_layernorm", "post_feedforward_layernorm_1",
                "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2",
            ),
            hidden,
            kind,
        )  # fmt: skip
        found += [
            Weight(f"{stack}layers.{i}.layer_scalar", (1,), "other", "elementwise", kind)
            for stack in (DECODER, ENCODER)
        ]
    return found


def _elementwise(config: DiffusionGemmaConfig) -> Elementwise:
    hidden, inner = config.hidden_size, config.intermediate_size
    values = {layer.kind: 0 for layer in config.layers}
    values[CONDITIONING] = 8 * hidden + 9 * inner
    for layer in config.layers:
        query, kv = config.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        # Seven norms and the router's, three sums, scalar; the MLP's tanh-GELU; heads and rotary.
        values[layer.kind] += hidden * (8 * 3 + 3 + 1 + 2) + 9 * inner + 11 * query + 12 * kv
    return Elementwise(values, 80)


def _sampler(generation_config: Mapping[str, Any]) -> Sampler:
    """The checkpoint's sampler defaults; what it leaves open is transformers' default."""
    sampler = generation_config.get("sampler_config") or {}
    kind = sampler.get("_cls_name", "EntropyBoundSamplerConfig")
    if kind != "EntropyBoundSamplerConfig":
        raise CheckpointError(
            f"generation_config.json asks for the sampler {kind!r}; supported: "
            "'EntropyBoundSamplerConfig'"
        )
    found = {
        name: generation_config.get(name)
        for name in ("t_min", "t_max", "stability_threshold", "confidence_threshold")
    }
    found["max_steps"] = generation_config.get("max_denoising_steps")
    found["entropy_bound"] = sampler.get("entropy_bound")
    return sampler_of(STYLE, found)
