"""Gemma 4's dense text model, re-authored as one graph for prefill and decoding of any length.

What this file does not know: quantization (weights may be torchao tensors), backends, the head and
sampler (export/heads/autoregressive.py). Reference: `Gemma4TextModel` of transformers 5.23.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.families.gemma import FULL, SLIDING
from export.families.gemma4 import Gemma4Config
from export.models.blocks import MASKED, GatedMLP, RMSNorm, Rotary, gelu_tanh, rotary_frequencies
from export.models.weights import load_parameters, unused_note
from quantize.checkpoint import Checkpoint

OTHER_MODALITIES = ("vision_tower.", "embed_vision.", "audio_tower.", "embed_audio.")
SHARED_PARTS = ("k_proj", "v_proj", "k_norm", "v_norm")


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
        query = rotary.rotate(query).view(rows, self.num_kv_heads, groups, self.head_dim)
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
        key = rotary.rotate(self.k_norm(key)).transpose(0, 1)
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
            frequencies = rotary_frequencies(head_dim, rotary.theta, rotary.fraction)
            self.register_buffer(
                f"{kind}_frequencies", frequencies / rotary.factor, persistent=False
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
            kind: Rotary.at(positions, getattr(self, f"{kind}_frequencies"))
            for kind in config.rotary
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
    checkpoint: Checkpoint, config: Gemma4Config, *, maximum_context: int, prefill_length: int
) -> Gemma4Layers:
    """Build the stage in eval mode and load its weights from an fp32 or int4 checkpoint.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the config says.
    """
    model = Gemma4Layers(config, maximum_context=maximum_context, prefill_length=prefill_length)
    load_parameters(model, checkpoint, lambda path: config.prefix + path)
    return model.eval()


def unused_notes(config: Gemma4Config, unused: set[str]) -> list[str]:
    """What to tell about tensors of the checkpoint that no module took."""
    others = tuple(f"model.{part}" for part in OTHER_MODALITIES)
    media = {name for name in unused if name.startswith(others)}
    shared = {
        f"{config.prefix}layers.{i}.self_attn.{part}"
        for i, layer in enumerate(config.layers)
        if layer.source != i
        for part in SHARED_PARTS
    }
    unread = {name for name in unused - media if name.rpartition(".")[0] in shared}
    notes = []
    if media:
        notes.append(f"skipped {len(media)} tensors of the vision and audio towers: text only")
    if unread:
        notes.append(f"skipped {len(unread)} tensors of layers that share keys and values")
    return notes + unused_note(unused - media - unread - {"lm_head.weight"})
