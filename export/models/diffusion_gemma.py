"""DiffusionGemma's text model, re-authored so that one graph encodes, commits and denoises.

What this file does not know: quantization (weights may be torchao tensors), backends, the head and
sampler (export/heads/uniform_diffusion.py). Reference: `DiffusionGemmaForBlockDiffusion` of
transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from export.families.diffusion_gemma import DECODER, ENCODER, DiffusionGemmaConfig, LayerConfig
from export.families.expert_choice import ExpertComputation
from export.models.blocks import MASKED, GatedMLP, RMSNorm, Rotary, gelu_tanh, rotary_frequencies
from export.models.experts import DenseExperts, Expert, GatheredExperts, stack_experts
from export.models.weights import (
    Weights,
    check_shape,
    from_layer,
    read_weight,
    set_parameter,
    unused_note,
)
from quantize.checkpoint import Checkpoint

VISION_PREFIXES = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")


class SelfConditioning(GatedMLP):
    """Mix the previous step's soft embedding into the canvas embedding.

    A zero signal is not the identity: the sum still passes `post_norm`.
    """

    def __init__(self, config: DiffusionGemmaConfig) -> None:
        super().__init__(config.hidden_size, config.intermediate_size)
        self.pre_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_norm = RMSNorm(config.hidden_size, config.norm_eps, weighted=False)

    def forward(self, embedding: Tensor, signal: Tensor) -> Tensor:  # type: ignore[override]
        """Combine `embedding` and `signal`, both `[1, T, H]`."""
        return self.post_norm(embedding + super().forward(self.pre_norm(signal)))


class Attention(nn.Module):
    """Grouped-query attention over a static KV cache that it owns.

    Layout: K and V are `[KV heads, cache length, head size]`. The new rows are written at the
    given positions; a denoising step's rows are scratch that the commit overwrites.
    """

    def __init__(self, config: DiffusionGemmaConfig, layer: LayerConfig, cache_length: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, layer.num_kv_heads
        self.head_dim = layer.head_dim
        bias = config.attention_bias
        query_size = config.num_heads * layer.head_dim
        kv_size = layer.num_kv_heads * layer.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias, device="meta")
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=bias, device="meta")
        # Full layers have no v_proj: V is the key projection under v_norm, without rotary.
        self.v_proj = (
            nn.Linear(config.hidden_size, kv_size, bias=bias, device="meta")
            if layer.has_values
            else None
        )
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=bias, device="meta")
        self.q_norm = RMSNorm(layer.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(layer.head_dim, config.norm_eps)
        self.v_norm = RMSNorm(layer.head_dim, config.norm_eps, weighted=False)
        shape = (layer.num_kv_heads, cache_length, layer.head_dim)
        self.register_buffer("key_cache", torch.zeros(shape))
        self.register_buffer("value_cache", torch.zeros(shape))

    def forward(self, x: Tensor, positions: Tensor, rotary: Rotary, mask: Tensor) -> Tensor:
        """Attend from rows `x` `[T, H]` at `positions` `[T]` under the additive `mask` `[T, L]`."""
        tokens = x.shape[0]
        query = self.q_norm(self.q_proj(x).view(tokens, self.num_heads, self.head_dim))
        key = self.k_proj(x).view(tokens, self.num_kv_heads, self.head_dim)
        value = key
        if self.v_proj is not None:
            value = self.v_proj(x).view(tokens, self.num_kv_heads, self.head_dim)
        query = rotary.rotate(query).transpose(0, 1)
        key = rotary.rotate(self.k_norm(key)).transpose(0, 1)
        value = self.v_norm(value).transpose(0, 1)
        torch.ops.aten.index_put_(self.key_cache, [None, positions], key)
        torch.ops.aten.index_put_(self.value_cache, [None, positions], value)
        # Heads of one KV group are stacked as rows, so K and V are never repeated.
        query = query.reshape(self.num_kv_heads, -1, self.head_dim)
        scores = torch.bmm(query, self.key_cache.transpose(1, 2))  # the scale is 1.0
        scores = scores.view(self.num_heads, tokens, -1) + mask
        weights = torch.softmax(scores, dim=-1).view(self.num_kv_heads, -1, mask.shape[-1])
        mixed = torch.bmm(weights, self.value_cache)
        mixed = mixed.view(self.num_heads, tokens, self.head_dim).transpose(0, 1)
        return self.o_proj(mixed.reshape(tokens, -1))


class Router(nn.Module):
    """Choose and weigh the experts of each row from the raw residual, in fp32."""

    def __init__(self, config: DiffusionGemmaConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.root = config.hidden_size**-0.5
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, weighted=False)
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False, device="meta")
        self.scale = nn.Parameter(torch.empty(config.hidden_size, device="meta"))
        self.per_expert_scale = nn.Parameter(torch.empty(config.num_experts, device="meta"))

    def forward(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights `[T, K]` and expert ids `[T, K]` for `residual` `[T, H]`."""
        probabilities = torch.softmax(
            self.proj(self.norm(residual) * self.scale * self.root), dim=-1
        )
        weights, index = torch.topk(probabilities, self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights * self.per_expert_scale[index], index


class Layer(nn.Module):
    """One transformer layer: attention, then the dense MLP beside the experts."""

    def __init__(
        self,
        config: DiffusionGemmaConfig,
        layer: LayerConfig,
        cache_length: int,
        computation: ExpertComputation,
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.norm_eps
        self.kind = layer.kind
        self.self_attn = Attention(config, layer, cache_length)
        self.mlp = GatedMLP(hidden, config.intermediate_size)
        self.router = Router(config)
        size, count = config.expert_size, config.num_experts
        self.experts = (
            DenseExperts(hidden, size, count, gelu_tanh)
            if computation == "dense"
            else GatheredExperts(
                [Expert(hidden, size, gelu_tanh) for _ in range(count)],
                tokens=config.canvas_length,
                top_k=config.top_k,
                hidden_size=hidden,
            )
        )
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm_1 = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm_2 = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm_2 = RMSNorm(hidden, eps)
        # [encode, denoise]: the only tensor in which encoder and decoder differ.
        self.register_buffer("layer_scalar", torch.ones(2))

    def forward(
        self, x: Tensor, positions: Tensor, rotary: Rotary, mask: Tensor, denoise: Tensor
    ) -> Tensor:
        """Map the residual `[T, H]` to `[T, H]`; `denoise` `[1]` picks the layer scalar."""
        attended = self.self_attn(self.input_layernorm(x), positions, rotary, mask)
        residual = x + self.post_attention_layernorm(attended)
        dense = self.post_feedforward_layernorm_1(
            self.mlp(self.pre_feedforward_layernorm(residual))
        )
        weights, index = self.router(residual)
        sparse = self.experts(self.pre_feedforward_layernorm_2(residual), weights, index)
        sparse = self.post_feedforward_layernorm_2(sparse)
        out = residual + self.post_feedforward_layernorm(dense + sparse)
        return out * torch.index_select(self.layer_scalar, 0, denoise)


class CanvasEntry(nn.Module):
    """From tokens to what the layers take: embedded rows, masks, rotary angles.

    One graph serves prefill, commit and denoising, told apart by an input, because two methods of
    one program cannot share the KV cache on Android.
    """

    def __init__(self, config: DiffusionGemmaConfig, *, maximum_context: int) -> None:
        """Build without weights; `maximum_context` counts committed tokens and one canvas."""
        super().__init__()
        self.config = config
        self.maximum_context = maximum_context
        self.embed_tokens = nn.Embedding(config.vocabulary_size, config.hidden_size, device="meta")
        self.embed_scale = config.hidden_size**0.5
        self.self_conditioning = SelfConditioning(config)
        for kind, rotary in config.rotary.items():
            head_dim = next(layer.head_dim for layer in config.layers if layer.kind == kind)
            frequencies = rotary_frequencies(head_dim, rotary.theta, rotary.fraction)
            frequencies = frequencies / rotary.factor
            self.register_buffer(f"{kind}_frequencies", frequencies, persistent=False)
        self.register_buffer("key_positions", torch.arange(maximum_context), persistent=False)
        self.register_buffer("canvas_offsets", torch.arange(config.canvas_length), persistent=False)

    def forward(
        self, tokens: Tensor, start: Tensor, denoise: Tensor, signal: Tensor
    ) -> tuple[Tensor, ...]:
        """The inputs of `LayerGroup`; the arguments are those of `DiffusionGemmaLayers`.

        Returns:
            Rows `[1, T, H]`, then for each kind of layer of `config.rotary` the additive mask
            `[T, L]` and the cosines and sines `[T, 1, head size / 2]`.
        """
        positions = start + self.canvas_offsets
        values = [self.embed(tokens, denoise, signal)]
        masks, rotaries = self.masks(start, positions, denoise), self.rotaries(positions)
        for kind in self.config.rotary:
            values += [masks[kind], rotaries[kind].cos, rotaries[kind].sin]
        return tuple(values)

    def embed(self, tokens: Tensor, denoise: Tensor, signal: Tensor) -> Tensor:
        """Embedded rows `[1, T, H]`, self-conditioned in denoising."""
        embedding = self.embed_tokens(tokens) * self.embed_scale
        is_denoise = (denoise == 1).view(1, 1, 1)
        return torch.where(is_denoise, self.self_conditioning(embedding, signal), embedding)

    def rotaries(self, positions: Tensor) -> dict[str, Rotary]:
        """Rotary embedding of each kind of layer."""
        return {
            kind: Rotary.at(positions, getattr(self, f"{kind}_frequencies"))
            for kind in self.config.rotary
        }

    def masks(self, start: Tensor, positions: Tensor, denoise: Tensor) -> dict[str, Tensor]:
        """Additive masks `[T, L]`.

        Encode: key <= query, and key > query - window on sliding layers. Denoise: every row sees
        key < start + T, and key > start - window on sliding layers.
        """
        last = start + (self.config.canvas_length - 1)
        newest = torch.where(denoise == 1, last, positions).unsqueeze(-1)
        anchor = torch.where(denoise == 1, start, positions).unsqueeze(-1)
        seen = self.key_positions <= newest
        near = self.key_positions > anchor - self.config.sliding_window
        visible = {"full_attention": seen, "sliding_attention": seen & near}
        return {kind: torch.where(visible[kind], 0.0, MASKED) for kind in self.config.rotary}


class DiffusionGemmaLayers(CanvasEntry):
    """The stage from tokens to hidden states: embedding, self-conditioning, layers, final norm."""

    def __init__(
        self, config: DiffusionGemmaConfig, *, maximum_context: int, computation: ExpertComputation
    ) -> None:
        """Build without weights; `maximum_context` counts committed tokens and one canvas."""
        super().__init__(config, maximum_context=maximum_context)
        self.computation = computation
        self.layers = nn.ModuleList(
            Layer(config, layer, maximum_context, computation) for layer in config.layers
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, tokens: Tensor, start: Tensor, denoise: Tensor, signal: Tensor) -> Tensor:
        """Run the layers over one canvas length of positions.

        Args:
            tokens: ids `[1, T]` int64; a short prompt chunk is padded with any id.
            start: position of the first token, `[1]` int64, with start + T <= maximum context.
            denoise: `[1]` int64; 0 encodes causally and commits K/V, 1 denoises bidirectionally
                over the committed context and the canvas, and leaves K/V as scratch.
            signal: soft embedding of the previous step, `[1, T, H]`; zeros on the first step.

        Returns:
            Normed hidden states `[1, T, H]`.
        """
        positions = start + self.canvas_offsets
        hidden = self.embed(tokens, denoise, signal).squeeze(0)
        masks, rotaries = self.masks(start, positions, denoise), self.rotaries(positions)
        for layer in self.layers:
            hidden = layer(hidden, positions, rotaries[layer.kind], masks[layer.kind], denoise)
        return self.norm(hidden).unsqueeze(0)


class LayerGroup(nn.Module):
    """Consecutive layers as a stage of their own, with the KV cache of these layers."""

    def __init__(
        self,
        config: DiffusionGemmaConfig,
        layers: Sequence[LayerConfig],
        *,
        maximum_context: int,
        computation: ExpertComputation,
    ) -> None:
        """Build without weights."""
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(config, layer, maximum_context, computation) for layer in layers
        )
        self.kinds = kinds_of(config, layers)
        self.register_buffer("canvas_offsets", torch.arange(config.canvas_length), persistent=False)

    def forward(self, hidden: Tensor, start: Tensor, denoise: Tensor, *shared: Tensor) -> Tensor:
        """Map rows `[1, T, H]` to `[1, T, H]`.

        `shared` is, for each kind among the layers, what `CanvasEntry` gives for it.
        """
        positions = start + self.canvas_offsets
        given = {
            kind: (shared[3 * i], Rotary(*shared[3 * i + 1 : 3 * i + 3]))
            for i, kind in enumerate(self.kinds)
        }
        rows = hidden.squeeze(0)
        for layer in self.layers:
            mask, rotary = given[layer.kind]
            rows = layer(rows, positions, rotary, mask, denoise)
        return rows.unsqueeze(0)


def kinds_of(config: DiffusionGemmaConfig, layers: Sequence[LayerConfig]) -> tuple[str, ...]:
    """The kinds of attention among `layers`, in the order of `config.rotary`."""
    present = {layer.kind for layer in layers}
    return tuple(kind for kind in config.rotary if kind in present)


def build_layers(
    checkpoint: Checkpoint,
    config: DiffusionGemmaConfig,
    *,
    maximum_context: int,
    computation: ExpertComputation,
) -> DiffusionGemmaLayers:
    """Build the stage of all layers in eval mode and load its weights, fp32 or int4.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the config says.
    """
    model = DiffusionGemmaLayers(config, maximum_context=maximum_context, computation=computation)
    load_weights(model, checkpoint)
    return model.eval()


def load_weights(model: nn.Module, weights: Weights, first_layer: int = 0) -> None:
    """Give a module of this file its weights; its layer 0 is layer `first_layer` of the model.

    Raises CheckpointError for a tensor that is missing or has another shape than the module.
    """
    for path, parameter in list(model.named_parameters()):
        name, expert = _checkpoint_name(from_layer(path, first_layer))
        stored = weights.shape(name)
        stacked = len(stored) == 3 and expert is None
        if expert is not None:
            stored = stored[1:]
        elif stacked:
            stored = (stored[0] * stored[1], stored[2])
        check_shape(weights, name, stored, parameter.shape)
        weight = weights.get(name, expert)
        set_parameter(model, path, stack_experts(weight) if stacked else weight)
    for i, layer in enumerate(getattr(model, "layers", ()), start=first_layer):
        names = [f"{stack}layers.{i}.layer_scalar" for stack in (ENCODER, DECODER)]
        layer.layer_scalar.copy_(torch.cat([read_weight(weights, name, (1,)) for name in names]))


def _checkpoint_name(path: str) -> tuple[str, int | None]:
    """The checkpoint's tensor of the parameter at `path`, and which expert's slice of it."""
    if ".experts." not in path:
        return DECODER + path, None
    # layers.I.experts.{experts.E.}{gate_up_proj|down_proj}{.E}.weight
    _, layer, _, *rest = path.split(".")
    leaf = next(part for part in rest if part.endswith("_proj"))
    expert = next((int(part) for part in rest if part.isdigit()), None)
    return f"{DECODER}layers.{layer}.experts.{leaf}", expert


def unused_notes(unused: set[str]) -> list[str]:
    """What to tell about tensors of the checkpoint that no module took."""
    vision = {name for name in unused if name.startswith(VISION_PREFIXES)}
    tied = {name for name in unused if name.startswith(ENCODER) or name == "lm_head.weight"}
    notes = []
    if vision:
        notes.append(f"skipped {len(vision)} tensors of the vision tower: text only")
    if tied:
        notes.append(f"skipped {len(tied)} tensors tied to the decoder")
    return notes + unused_note(unused - vision - tied)
