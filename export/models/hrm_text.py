"""HRM-Text, re-authored as three stages: embedding, low-level stack, high-level stack.

The two stacks run in turns, several times a token; how often and in which order is the bundle's
schedule (export/families/hrm_text.py). Not known here: quantization (weights may be torchao
tensors), backends, the vocabulary head. Reference: `HrmTextForCausalLM` of transformers 5.23.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from export.families.hrm_text import EMBEDDING, LOW_START, STACKS, HrmTextConfig
from export.models.blocks import MASKED, RMSNorm, Rotary, rotary_frequencies, silu
from export.models.weights import integers_like, read_weight, set_parameter, unused_note
from quantize.checkpoint import Checkpoint
from quantize.errors import CheckpointError

ATTENTION_PARTS = ("gate_proj", "q_proj", "k_proj", "v_proj")
"""Rows of the fused projection `attn.gqkv_proj`, in order; equal parts."""
MLP_PARTS = ("gate_proj", "up_proj")
"""Rows of the fused projection `mlp.gate_up_proj`, in order; equal parts."""


class Attention(nn.Module):
    """Multi-head attention with a sigmoid gate on its result, over the KV caches that it owns.

    One cache a slot: the stack's weights are the same in each of its runs, its states are not.
    Layout: K and V are `[heads, slots * cache length, head size]`, because ExecuTorch writes in
    place only where one axis is indexed, by one list of rows.
    """

    def __init__(self, config: HrmTextConfig, slots: int, cache_length: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.size = config.num_heads * config.head_dim
        self.scale = config.head_dim**-0.5
        # Fused as the released checkpoint stores it: one quantization of x, one product.
        self.gqkv_proj = nn.Linear(config.hidden_size, 4 * self.size, bias=False, device="meta")
        self.o_proj = nn.Linear(self.size, config.hidden_size, bias=False, device="meta")
        shape = (config.num_heads, slots * cache_length, config.head_dim)
        self.register_buffer("key_cache", torch.zeros(shape))
        self.register_buffer("value_cache", torch.zeros(shape))

    def forward(
        self, x: Tensor, written: Tensor, read: Tensor, rotary: Rotary, mask: Tensor
    ) -> Tensor:
        """Attend from `x` `[N, H]` under the additive `mask` `[N, L]`.

        `written` `[N]` int64 are the caches' rows that belong to `x`, `read` `[L]` int64 those of
        the whole slot.
        """
        tokens, size = x.shape[0], self.size
        projected = self.gqkv_proj(x)
        gate = projected[:, :size]
        query = projected[:, size : 2 * size].reshape(tokens, self.num_heads, self.head_dim)
        key = projected[:, 2 * size : 3 * size].reshape(tokens, self.num_heads, self.head_dim)
        value = projected[:, 3 * size :].reshape(tokens, self.num_heads, self.head_dim)
        query = rotary.rotate(query * self.scale).permute(1, 0, 2)
        key = rotary.rotate(key).permute(1, 0, 2)
        value = value.permute(1, 0, 2)
        torch.ops.aten.index_put_(self.key_cache, [None, written], key)
        torch.ops.aten.index_put_(self.value_cache, [None, written], value)
        # A copy of the slot: ExecuTorch has no view that begins at a place known only at run time.
        # At the released sizes it moves 6.3 MB a layer and run (context 512), where the int4
        # weights are 17 MB. A `torch.cond` over caches apart needs none, but XNNPACK's partitioner
        # leaves the products in its branches to the portable kernels.
        keys = torch.index_select(self.key_cache, 1, read)
        values = torch.index_select(self.value_cache, 1, read)
        scores = torch.bmm(query, keys.transpose(1, 2)) + mask
        mixed = torch.bmm(torch.softmax(scores, dim=-1), values)
        mixed = mixed.permute(1, 0, 2).reshape(tokens, size)
        return self.o_proj(torch.sigmoid(gate) * mixed)


class MLP(nn.Module):
    """The gated feed-forward block, gate and up projection fused as the checkpoint stores them."""

    def __init__(self, config: HrmTextConfig) -> None:
        super().__init__()
        self.size = config.intermediate_size
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * self.size, bias=False, device="meta")
        self.down_proj = nn.Linear(self.size, config.hidden_size, bias=False, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, H]` to `[N, H]`."""
        projected = self.gate_up_proj(x)
        gate, up = projected[:, : self.size], projected[:, self.size :]
        return self.down_proj(silu(gate) * up)


class Layer(nn.Module):
    """One transformer layer, each half normed before (without weights) and added to what it got."""

    def __init__(self, config: HrmTextConfig, slots: int, cache_length: int) -> None:
        super().__init__()
        self.attn = Attention(config, slots, cache_length)
        self.mlp = MLP(config)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, weighted=False)

    def forward(
        self, x: Tensor, written: Tensor, read: Tensor, rotary: Rotary, mask: Tensor
    ) -> Tensor:
        """Map the residual `[N, H]` to `[N, H]`; the rest as `Attention.forward`."""
        x = x + self.attn(self.norm(x), written, read, rotary, mask)
        return x + self.mlp(self.norm(x))


class Embedding(nn.Module):
    """The first stage: tokens to the two states that the stacks carry on."""

    def __init__(self, config: HrmTextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary_size, config.hidden_size, device="meta")
        self.scale = config.embedding_scale
        self.low_start = nn.Parameter(torch.empty(config.hidden_size, device="meta"))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Ids `[1, N]` int64 to the high-level and the low-level state, `[1, N, H]` each."""
        high = self.embed_tokens(tokens) * self.scale
        low = self.low_start.view(1, 1, -1).expand(1, tokens.shape[1], -1).clone()
        return high, low


class Stack(nn.Module):
    """One of the two stacks: layers and a final norm over the sum of both states.

    It owns the KV caches of its own runs (`slots`) and of no others.
    """

    def __init__(
        self, config: HrmTextConfig, *, slots: int, maximum_context: int, prefill_length: int
    ) -> None:
        """Build without weights; at most `prefill_length` tokens come in one call."""
        super().__init__()
        self.slots = slots
        self.maximum_context = maximum_context
        self.hidden_size = config.hidden_size
        self.layers = nn.ModuleList(
            Layer(config, slots, maximum_context) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, weighted=False)
        for name, constant in {
            "frequencies": rotary_frequencies(config.head_dim, config.rotary_theta),
            "key_positions": torch.arange(maximum_context),
            "offsets": torch.arange(prefill_length),
        }.items():
            self.register_buffer(name, constant, persistent=False)

    def forward(
        self, high: Tensor, low: Tensor, slot: Tensor, start: Tensor, block_length: Tensor
    ) -> Tensor:
        """Run the stack once.

        Args:
            high: the high-level state `[1, N, H]`.
            low: the low-level state `[1, N, H]`.
            slot: which of the stack's runs in a pass this is, `[1]` int64, counted from 0.
            start: position of the first token, `[1]` int64; K and V of the N tokens are kept.
            block_length: `[1]` int64; a token sees its whole block of positions and all before
                (1: causal).

        Returns:
            The stack's new state, normed, `[1, N, H]`.
        """
        tokens = high.shape[1]
        positions = start + self.offsets[:tokens]
        first = slot * self.maximum_context
        written, read = first + positions, first + self.key_positions
        rotary = Rotary.at(positions, self.frequencies)
        mask = self._mask(positions, start + (tokens - 1), block_length)
        hidden = (high + low).reshape(tokens, self.hidden_size)
        for layer in self.layers:
            hidden = layer(hidden, written, read, rotary, mask)
        return self.norm(hidden).reshape(1, tokens, self.hidden_size)

    def _mask(self, positions: Tensor, last: Tensor, block_length: Tensor) -> Tensor:
        """Additive `[N, L]`: keys of the query's block and of those before, none after `last`."""
        block = torch.div(positions, block_length, rounding_mode="floor").unsqueeze(1)
        key_block = torch.div(self.key_positions, block_length, rounding_mode="floor").unsqueeze(0)
        visible = (key_block <= block) & (self.key_positions <= last).unsqueeze(0)
        return torch.where(visible, 0.0, MASKED)


@dataclass(frozen=True)
class HrmTextModules:
    """The stages' modules, in eval mode with their weights, and notes for the user."""

    embed: Embedding
    low: Stack
    high: Stack
    notes: tuple[str, ...]


def build_modules(
    checkpoint: Checkpoint, config: HrmTextConfig, *, maximum_context: int, prefill_length: int
) -> HrmTextModules:
    """Build the three stages and load their weights from an fp32 or int4 checkpoint.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the config says.
    """
    embed = Embedding(config)
    used = {EMBEDDING, LOW_START, config.head_table}
    for path, name in (("embed_tokens.weight", EMBEDDING), ("low_start", LOW_START)):
        shape = embed.get_parameter(path).shape
        set_parameter(embed, path, read_weight(checkpoint, name, shape))
    if config.num_layers > len(checkpoint.names()):
        raise CheckpointError(
            f"config.json says {config.num_layers} layers a stack, the checkpoint has "
            f"{len(checkpoint.names())} tensors in all; take config and weights from one checkpoint"
        )
    stacks = {}
    for stack, module_name in STACKS.items():
        stacks[stack] = Stack(
            config,
            slots=config.slots(stack),
            maximum_context=maximum_context,
            prefill_length=prefill_length,
        )
        for index, layer in enumerate(stacks[stack].layers):
            used |= _load_layer(layer, f"model.{module_name}.layers.{index}", checkpoint)
    notes = tuple(unused_note(checkpoint.names() - used))
    return HrmTextModules(embed.eval(), stacks["low"].eval(), stacks["high"].eval(), notes)


def _load_layer(layer: nn.Module, prefix: str, checkpoint: Checkpoint) -> set[str]:
    """Load a layer's four matrices by the released names, or by those of transformers' modules.

    transformers fuses and renames when it writes (`conversion_mapping.py`), unless told not to.
    Returns the names that were read.
    """
    names, used = checkpoint.names(), set()
    for path, parts in (
        ("attn.gqkv_proj.weight", [f"self_attn.{p}" for p in ATTENTION_PARTS]),
        ("attn.o_proj.weight", ["self_attn.o_proj"]),
        ("mlp.gate_up_proj.weight", [f"mlp.{p}" for p in MLP_PARTS]),
        ("mlp.down_proj.weight", ["mlp.down_proj"]),
    ):
        rows, columns = layer.get_parameter(path).shape
        found = [f"{prefix}.{part}.weight" for part in parts]
        if f"{prefix}.{path}" in names or not set(found) & names:
            found = [f"{prefix}.{path}"]
        shape = (rows // len(found), columns)
        set_parameter(
            layer, path, _stack_rows([read_weight(checkpoint, name, shape) for name in found])
        )
        used |= set(found)
    return used


def _stack_rows(parts: list[Tensor]) -> Tensor:
    """Matrices under one another; raises CheckpointError if they are quantized differently."""
    first = parts[0]
    if len(parts) == 1:
        return first
    kinds = {
        (part.target_dtype, part.block_size, part.activation_quantization, part.scale.dtype)
        if isinstance(part, IntxUnpackedToInt8Tensor)
        else None
        for part in parts
    }
    if len(kinds) > 1:
        raise CheckpointError(
            f"the projections {', '.join(ATTENTION_PARTS)} of one layer are quantized in "
            f"{len(kinds)} ways; quantize the checkpoint again with one rule for them"
        )
    if not isinstance(first, IntxUnpackedToInt8Tensor):
        return torch.cat(parts)
    tensors = zip(*((part.qdata, part.scale, part.zero_point) for part in parts), strict=True)
    return integers_like(first, *map(torch.cat, tensors))
