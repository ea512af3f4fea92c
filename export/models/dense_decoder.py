"""The dense decoder of Qwen3, Qwen2, Llama and LLaDA as one graph, causal or blockwise.

What this file does not know: quantization (weights may be torchao tensors), backends, samplers.
References: `modeling_qwen3.py`, `modeling_qwen2.py` and `modeling_llama.py` of transformers 5.23,
and `modeling_llada.py` of LLaDA-8B, whose layers are Llama's under other names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from export.families.dense import DenseConfig
from export.models.blocks import MASKED, GatedMLP, RMSNorm, Rotary, rotary_frequencies, silu
from export.models.weights import Weights, from_layer, load_parameters, unused_note
from quantize.checkpoint import Checkpoint
from quantize.errors import CheckpointError


def inverse_frequencies(config: DenseConfig) -> Tensor:
    """Rotary frequencies `[head_dim / 2]`, stretched if the config says so.

    Source: `_compute_llama3_parameters` in transformers' `modeling_rope_utils.py`.
    """
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # Wavelengths that fit often enough into the original context stay, the longest are stretched
    # by the factor, those between by a mixture.
    periods = scaling.original_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((periods - low) / (high - low)).clamp(0.0, 1.0)
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
        query = rotary.rotate(query) * self.scale
        key = rotary.rotate(key).transpose(0, 1)
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
        rotary = Rotary.at(positions, self.frequencies)
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

    def forward(self, tokens: Tensor, start: Tensor, block_length: Tensor) -> Tensor:
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
        rotary = Rotary.at(positions, self.frequencies)
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
        rotary = Rotary(cos, sin)
        for layer in self.layers:
            rows = layer(rows, positions, rotary, mask)
        return rows.unsqueeze(0)


def build_layers(
    checkpoint: Checkpoint, config: DenseConfig, *, maximum_context: int, prefill_length: int
) -> DenseLayers:
    """Build the stage in eval mode and load its weights from an fp32 or int4 checkpoint.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the config says.
    """
    model = DenseLayers(config, maximum_context=maximum_context, prefill_length=prefill_length)
    check_vocabulary(checkpoint, config)
    load_weights(model, config, checkpoint)
    return model.eval()


def check_vocabulary(checkpoint: Checkpoint, config: DenseConfig) -> None:
    """Raise CheckpointError for an embedding table that config.json does not describe."""
    rows = checkpoint.shape(config.embedding)[0]
    if rows != config.vocabulary_size:
        raise CheckpointError(
            f"config.json has a vocabulary of {config.vocabulary_size} tokens and "
            f"{config.embedding} has {rows} rows; take config and weights from one checkpoint"
        )


def load_weights(
    model: nn.Module, config: DenseConfig, weights: Weights, first_layer: int = 0
) -> None:
    """Give a module of this file its weights; its layer 0 is layer `first_layer` of the model.

    Raises CheckpointError for a tensor that is missing or has another shape than the module.
    """
    load_parameters(
        model, weights, lambda path: config.checkpoint_name(from_layer(path, first_layer))
    )


def unused_notes(checkpoint: Checkpoint, unused: set[str]) -> list[str]:
    """What to tell about tensors that no module took; CheckpointError for a bias among them."""
    # A head may be stored although it is tied; old checkpoints store the rotary frequencies.
    unused = unused - {"lm_head.weight", "model.transformer.ff_out.weight"}
    unused = {name for name in unused if not name.endswith("rotary_emb.inv_freq")}
    if biases := sorted(name for name in unused if name.endswith(".bias")):
        raise CheckpointError(
            f"{checkpoint.folder} has {len(biases)} biases that its model_type does not use "
            f"({biases[0]}); check the model_type of config.json"
        )
    return unused_note(unused)
