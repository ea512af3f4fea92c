"""HRM-Text, re-authored as three stages: embedding, low-level stack, high-level stack.

The two stacks run in turns, several times a token; how often and in which order is the bundle's
schedule (export/models/hrm_text_stages.py). Not known here: quantization (weights may be torchao
tensors), backends, the vocabulary head. Reference: `HrmTextForCausalLM` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from export.heads.lookup import lookup_table
from export.models.blocks import (
    MASKED,
    RMSNorm,
    Rotary,
    positive,
    positive_number,
    refuse_variant,
    silu,
)
from quantize.checkpoint import Checkpoint
from quantize.errors import CheckpointError

MODEL_TYPE = "hrm_text"
EMBEDDING_NAME = "model.embed_tokens.weight"
HEAD_NAME = "lm_head.weight"
LOW_START_NAME = "model.z_L_init"
STACK_NAMES = {"low": "L_module", "high": "H_module"}

ATTENTION_PARTS = ("gate_proj", "q_proj", "k_proj", "v_proj")
"""Rows of the fused projection `attn.gqkv_proj`, in order; equal parts."""
MLP_PARTS = ("gate_proj", "up_proj")
"""Rows of the fused projection `mlp.gate_up_proj`, in order; equal parts."""

MAXIMUM_KV_BYTES = 16 * 2**30
"""No device that this project aims at has as much; a config that needs more is a mistake."""

StackName = Literal["low", "high"]


@dataclass(frozen=True)
class HrmTextConfig:
    """The fields of `config.json` that shape the model; nothing is defaulted from a class.

    num_layers: transformer layers of one stack. high_cycles: turns of the high-level stack in a
    pass. low_cycles: turns of the low-level stack before each of them.
    """

    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    high_cycles: int
    low_cycles: int
    norm_eps: float
    rotary_theta: float
    embedding_scale: float
    max_positions: int
    prefix_lm: bool
    tied_head: bool

    @classmethod
    def from_checkpoint_config(cls, config: dict[str, Any]) -> HrmTextConfig:
        """Read `config.json` as a dict.

        Raises:
            CheckpointError: another architecture, a missing field, or a variant that the released
                models do not use and this graph does not have.
        """
        if config.get("model_type") != MODEL_TYPE:
            raise CheckpointError(
                f"config.json has model_type {config.get('model_type')!r}, "
                f"expected {MODEL_TYPE!r}; give an HRM-Text checkpoint"
            )
        refuse_variant(config, "hidden_act", {"silu"})
        refuse_variant(config, "attention_bias", {False}, default=False)
        refuse_variant(config, "mlp_bias", {False}, default=False)
        refuse_variant(config, "prefix_lm", {True, False}, default=True)
        refuse_variant(config, "tie_word_embeddings", {True, False}, default=False)
        sizes = {
            name: positive(config, key)
            for name, key in {
                "vocabulary_size": "vocab_size",
                "hidden_size": "hidden_size",
                "intermediate_size": "intermediate_size",
                "num_heads": "num_attention_heads",
                "head_dim": "head_dim",
                "high_cycles": "H_cycles",
                "low_cycles": "L_cycles",
                "max_positions": "max_position_embeddings",
            }.items()
        }
        if sizes["head_dim"] % 2:
            raise CheckpointError(
                f"config.json has head_dim = {sizes['head_dim']}; rotary embedding needs an even "
                "one"
            )
        return cls(
            **sizes,
            num_layers=_num_layers(config, sizes["high_cycles"], sizes["low_cycles"]),
            norm_eps=positive_number(config, "rms_norm_eps"),
            rotary_theta=_rotary_theta(config),
            embedding_scale=_embedding_scale(config),
            prefix_lm=bool(config.get("prefix_lm", True)),
            tied_head=bool(config.get("tie_word_embeddings", False)),
        )

    def slots(self, stack: StackName) -> int:
        """How often a stack runs in a pass; each run has a KV cache of its own."""
        return self.high_cycles * (self.low_cycles if stack == "low" else 1)

    def kv_bytes(self, positions: int) -> int:
        """Bytes of K and V in fp32 for so many positions, over all slots of both stacks."""
        slots = self.slots("low") + self.slots("high")
        return slots * self.num_layers * 2 * self.num_heads * self.head_dim * 4 * positions


def _num_layers(config: dict[str, Any], high_cycles: int, low_cycles: int) -> int:
    """Layers of one stack.

    transformers writes them as `num_layers_per_stack` and makes `num_hidden_layers` the number of
    KV slots; a config that only has `num_hidden_layers` means those of one stack.
    """
    stated = positive(config, "num_hidden_layers")
    if config.get("num_layers_per_stack") is None:
        return stated
    layers = positive(config, "num_layers_per_stack")
    if stated != layers * high_cycles * (low_cycles + 1):
        raise CheckpointError(
            f"config.json has num_hidden_layers = {stated} with num_layers_per_stack = {layers}, "
            f"H_cycles = {high_cycles} and L_cycles = {low_cycles}; expected "
            f"{layers * high_cycles * (low_cycles + 1)}, the layers of all runs of the stacks"
        )
    return layers


def _rotary_theta(config: dict[str, Any]) -> float:
    rope = config.get("rope_parameters")
    if rope is None and config.get("rope_scaling") is None:
        return positive_number(config, "rope_theta")
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise CheckpointError(
            f"config.json has rope_parameters = {rope!r} and rope_scaling = "
            f"{config.get('rope_scaling')!r}; expected rope_type 'default' with a rope_theta"
        )
    return positive_number(rope, "rope_parameters.rope_theta")


def _embedding_scale(config: dict[str, Any]) -> float:
    """1 / initializer_range where it is not stated, as in the reference's config class."""
    if config.get("embedding_scale") is None:
        return 1.0 / positive_number(config, "initializer_range")
    return positive_number(config, "embedding_scale")


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
        query = rotary.turn(query * self.scale).permute(1, 0, 2)
        key = rotary.turn(key).permute(1, 0, 2)
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
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        for name, constant in {
            "frequencies": 1.0 / config.rotary_theta**exponents,
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
        rotary = Rotary(positions, self.frequencies)
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
    checkpoint: Checkpoint, *, maximum_context: int, prefill_length: int
) -> HrmTextModules:
    """Build the three stages and load their weights from an fp32 or int4 checkpoint.

    Raises:
        CheckpointError: the config is of another architecture, asks for a KV cache beyond all
            bounds, or a tensor is missing or has another shape than the config says.
    """
    config = HrmTextConfig.from_checkpoint_config(checkpoint.config)
    kv_bytes = config.kv_bytes(maximum_context)
    if kv_bytes > MAXIMUM_KV_BYTES:
        raise CheckpointError(
            f"config.json and a maximum context of {maximum_context} need a KV cache of "
            f"{kv_bytes} bytes, at most {MAXIMUM_KV_BYTES} are supported; give a shorter context"
        )
    load = _Loader(checkpoint)
    embed = Embedding(config)
    table = load(EMBEDDING_NAME, embed.embed_tokens.weight.shape)
    embed.embed_tokens.weight = _frozen(lookup_table(table))
    embed.low_start = _frozen(load(LOW_START_NAME, embed.low_start.shape))
    if config.num_layers > len(checkpoint.names()):
        raise CheckpointError(
            f"config.json says {config.num_layers} layers a stack, the checkpoint has "
            f"{len(checkpoint.names())} tensors in all; take config and weights from one checkpoint"
        )
    stacks = {}
    for stack, module_name in STACK_NAMES.items():
        stacks[stack] = Stack(
            config,
            slots=config.slots(stack),
            maximum_context=maximum_context,
            prefill_length=prefill_length,
        )
        for index, layer in enumerate(stacks[stack].layers):
            _load_layer(layer, f"model.{module_name}.layers.{index}", load)
    if not config.tied_head:
        load.used.add(HEAD_NAME)
    unused = sorted(checkpoint.names() - load.used)
    notes = ()
    if unused:
        notes = (
            f"skipped {len(unused)} tensors this architecture does not use: {unused[:3]}",
        )  # fmt: skip
    return HrmTextModules(embed.eval(), stacks["low"].eval(), stacks["high"].eval(), notes)


class _Loader:
    """Reads tensors of the shapes that the config says, and remembers which."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.used: set[str] = set()

    def __call__(self, name: str, shape: Iterable[int]) -> Tensor:
        stored = tuple(self.checkpoint.shape(name))
        if stored != tuple(shape):
            raise CheckpointError(
                f"tensor {name} has shape {list(stored)}, which does not fit config.json "
                f"({list(shape)}); take config and weights from one checkpoint"
            )
        self.used.add(name)
        return self.checkpoint.get(name)


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _load_layer(layer: Layer, prefix: str, load: _Loader) -> None:
    """Load a layer's four matrices by the released names, or by those of transformers' modules.

    transformers fuses and renames when it writes (`conversion_mapping.py`), unless told not to.
    """
    names = load.checkpoint.names()
    for linear, fused, parts in (
        (layer.attn.gqkv_proj, "attn.gqkv_proj", [f"self_attn.{p}" for p in ATTENTION_PARTS]),
        (layer.attn.o_proj, "attn.o_proj", ["self_attn.o_proj"]),
        (layer.mlp.gate_up_proj, "mlp.gate_up_proj", [f"mlp.{p}" for p in MLP_PARTS]),
        (layer.mlp.down_proj, "mlp.down_proj", ["mlp.down_proj"]),
    ):
        name, shape = f"{prefix}.{fused}.weight", tuple(linear.weight.shape)
        apart = [f"{prefix}.{part}.weight" for part in parts]
        if name in names or not set(apart) & names:
            weight = load(name, shape)
        else:
            rows = shape[0] // len(apart)
            weight = _stack_rows([load(part, (rows, shape[1])) for part in apart])
        linear.weight = _frozen(weight)


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
    return IntxUnpackedToInt8Tensor(
        qdata=torch.cat([part.qdata for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero_point=torch.cat([part.zero_point for part in parts]),
        target_dtype=first.target_dtype,
        block_size=first.block_size,
        dtype=first.dtype,
        activation_quantization=first.activation_quantization,
    )
