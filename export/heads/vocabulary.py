"""What the heads share: logits over a vocabulary, in chunks or all at once, and draws from them.

In chunks, **chunk k holds the tokens k, k + n, k + 2n, ...** of n chunks, so that column j of every
chunk belongs to the same n consecutive tokens. Summing (or taking the maximum of) the chunks
elementwise then yields sums (maxima) over consecutive tokens, in vocabulary order, without one
reduction over the vocabulary. From those sums a token is drawn by inverse CDF of one uniform
number: descend to the block of tokens, look up its few rows of the table, compute their logits once
more, finish there.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed::dequantize_per_tensor
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from quantize.packing import with_parts

CHUNK_COLUMNS = 2048
"""Logits per row and chunk. [256, 2048] in fp32 are 2 MiB: halves of it stay in the caches of two
cores. Measured: 4096 takes 7 % longer, 1024 the same; lowering time goes with the chunks."""

BLOCK_TOKENS = 16
"""Most tokens per block whose sum is kept, and which are looked up again to finish a draw."""

EXCLUDED = -1.0e9
"""Logit of a token that is never sampled, and of padding; finite, so that 0 * it is 0."""


class Block(NamedTuple):
    """For each row a block of consecutive tokens, one of each chunk of a group: [M, 1] int64."""

    column: Tensor
    group: Tensor


class ChunkedVocabulary(nn.Module):
    """A table [V, H] as one product a chunk, chunks in groups, and its rows by token.

    `fan` columns are summed at a time: the chunks are padded to `columns`, a multiple of it.

    Args:
        table: fp32 or `IntxUnpackedToInt8Tensor`, which multiplies int8 dynamic activations.
        soft_cap: the values of a chunk are tanh of its logits; None for no cap.
        chunk_columns: about so many logits per row make a chunk.
        bias: the bias of a chunk from the tokens of its columns [C], of which those beyond the
            vocabulary are padding.
        mask_token: a token that is never sampled; None for none.
    """

    def __init__(
        self,
        table: Tensor,
        soft_cap: float | None,
        chunk_columns: int,
        bias: Callable[[Tensor], Tensor | None],
        mask_token: int | None = None,
    ) -> None:
        super().__init__()
        self.vocabulary, self.hidden_size = table.shape
        self.soft_cap = soft_cap
        self.mask_token = mask_token
        self.int8_activations = isinstance(table, IntxUnpackedToInt8Tensor)
        self.chunks = -(-self.vocabulary // chunk_columns)
        columns = -(-self.vocabulary // self.chunks)
        self.fan = _fan(columns)
        self.columns = -(-columns // self.fan) * self.fan
        groups = -(-self.chunks // BLOCK_TOKENS)
        self.group_chunks = -(-self.chunks // groups)
        self.groups = -(-self.chunks // self.group_chunks)
        self.lookup = _Int8RowProducts(table) if _is_int8_per_row(table) else _RowProducts(table)
        self.logit_chunks = nn.ModuleList(
            product(table, k, self.chunks, self.columns, bias(self.chunk_tokens(k)))
            for k in range(self.chunks)
        )

    def chunk_tokens(self, k: int) -> Tensor:
        """Tokens of the columns of chunk k, [C]; of padding they are beyond the vocabulary."""
        return torch.arange(self.columns) * self.chunks + k

    def values(self, x: Tensor, k: int) -> Tensor:
        """Logits of chunk k for x [M, H] (over the cap), or their tanh: [M, C]."""
        value = self.logit_chunks[k](x)
        return value if self.soft_cap is None else torch.tanh(value)

    def values_of(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The same of tokens [M, R], from rows looked up; without a bias."""
        if self.int8_activations:
            x = round_to_int8(x)
        value = self.lookup(x, tokens)
        return value if self.soft_cap is None else torch.tanh(value)

    def descend_to_block(
        self, by_fan: Tensor, by_column: Tensor, by_group: list[Tensor], rest: Tensor
    ) -> tuple[Block, Tensor]:
        """Where the mass `rest` [M, 1] ends, and what is left of it inside that block [M, 1].

        by_fan: [M, C / fan], sums of by_column [M, C], the sums of by_group (one [M, C] a group).
        """
        fan, rest = descend(by_fan, rest)
        within, rest = descend(torch.gather(by_column, 1, self.fan_columns(fan)), rest)
        column = fan * self.fan + within
        group, rest = descend(at_column(by_group, column), rest)
        return Block(column, group), rest

    def fan_columns(self, fan: Tensor) -> Tensor:
        """The columns [M, fan] of a fan [M, 1]."""
        return fan * self.fan + torch.arange(self.fan)

    def block_tokens(self, block: Block) -> tuple[Tensor, Tensor]:
        """Tokens [M, R] of a block, and which of them may be sampled, bool [M, R]."""
        chunk = block.group * self.group_chunks + torch.arange(self.group_chunks)
        tokens = block.column * self.chunks + chunk
        valid = (chunk < self.chunks) & (tokens < self.vocabulary)
        if self.mask_token is not None:
            valid = valid & (tokens != self.mask_token)
        return torch.clamp(tokens, max=self.vocabulary - 1), valid


class WholeVocabulary(nn.Module):
    """Logits of M rows over all tokens, and draws from weights as many.

    For top-k and top-p, which go over all logits dozens of times, and for a single row, whose
    logits are small. The columns are padded to a multiple of `fan`, so that sums of all are sums of
    sums of `fan`. mask_token: excluded like padding; None for none.
    """

    def __init__(self, table: Tensor, soft_cap: float | None, mask_token: int | None) -> None:
        super().__init__()
        self.vocabulary = table.shape[0]
        self.soft_cap = soft_cap
        self.fan = _fan(self.vocabulary)
        self.fans = -(-self.vocabulary // self.fan)
        self.columns = self.fans * self.fan
        bias = exclusion(torch.arange(self.columns), self.vocabulary, mask_token)
        self.product = product(table, 0, 1, self.columns, bias if soft_cap is None else None)
        bias = None if bias is None or soft_cap is None else bias.view(1, -1)
        self.register_buffer("excluded", bias)
        self.sum_fans = SumFans(self.fans, self.fan)
        self.sum_plain = SumFans(self.fans, self.fan)
        self.sum_moments = SumFans(self.fans, self.fan)
        self.register_buffer("ones", torch.ones(1, self.columns), persistent=False)

    def logits(self, x: Tensor) -> Tensor:
        """[M, H] -> [M, C], with padding and the mask token excluded."""
        value = self.product(x)
        if self.soft_cap is not None:
            value = torch.tanh(value * (1.0 / self.soft_cap)) * self.soft_cap
        return value if self.excluded is None else value + self.excluded

    def draw(self, weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse CDF of uniform [M, 1] in vocabulary order.

        Weights [M, C] -> token [M, 1] int64, sum of the weights [M, 1].
        """
        by_fan = self.sum_fans(weights)
        total = by_fan.sum(dim=1, keepdim=True)
        fan, rest = descend(by_fan, uniform * total)
        picked = torch.gather(weights, 1, fan * self.fan + torch.arange(self.fan))
        within, _ = descend(picked, rest)
        within = with_weight(within, picked)
        return fan * self.fan + within, total


class SumFans(nn.Module):
    """Sums of `fan` neighbours as a product, which is delegated where `sum` is not.

    Each use has a buffer of its own: the partitioner puts the users of one constant into one
    delegate, whatever lies between them, and fails on the cycle.
    """

    def __init__(self, fans: int, fan: int) -> None:
        super().__init__()
        self.fans, self.fan = fans, fan
        self.register_buffer("row", torch.ones(1, fan), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """[M, fans * fan] -> [M, fans]."""
        rows = values.shape[0]
        return F.linear(values.view(rows, self.fans, self.fan), self.row).view(rows, self.fans)


class Linear(nn.Module):
    """A linear layer around a weight that exists already, plain or quantized."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _RowProducts(nn.Module):
    """Products of a hidden state with rows of the table looked up (and dequantized) by token."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(lookup_table(table), requires_grad=False)

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """hidden [M, H], tokens [M, R] -> [M, R]."""
        return _products(F.embedding(tokens, self.weight), hidden)


class _Int8RowProducts(nn.Module):
    """The same for an int8 table with one scale per row, which multiplies the product instead.

    ExecuTorch's `embedding_byte` takes 2.3 ns per number; copying the rows as they are and letting
    XNNPACK widen them takes 0.3 ns.
    """

    def __init__(self, table: IntxUnpackedToInt8Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", table.qdata)
        self.register_buffer("scale", table.scale.to(torch.float32))

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """hidden [M, H], tokens [M, R] -> [M, R]."""
        rows = torch.index_select(self.rows, 0, tokens.reshape(-1))
        rows = torch.ops.quantized_decomposed.dequantize_per_tensor(
            rows, 1.0, 0, -128, 127, torch.int8
        )
        scale = torch.index_select(self.scale, 0, tokens.reshape(-1)).reshape(tokens.shape)
        return _products(rows.reshape(*tokens.shape, -1), hidden) * scale


def product(table: Tensor, start: int, stride: int, columns: int, bias: Tensor | None) -> Linear:
    """Rows start, start + stride, ... of the table as a product, padded to `columns` rows."""
    missing = columns - len(range(start, table.shape[0], stride))
    if not isinstance(table, IntxUnpackedToInt8Tensor):
        rows = F.pad(table[start::stride].to(torch.float32), (0, 0, 0, missing))
        return Linear(rows.contiguous(), bias)
    weight = with_parts(
        table,
        qdata=F.pad(table.qdata[start::stride], (0, 0, 0, missing)).contiguous(),
        scale=F.pad(table.scale[start::stride], (0, 0, 0, missing), value=1.0),
        zero_point=F.pad(table.zero_point[start::stride], (0, 0, 0, missing)),
        activation_quantization="int8_asym_per_token",
    )
    return Linear(weight, bias)


def lookup_table(table: Tensor) -> Tensor:
    """The table `[V, H]` for looking rows up: weight-only, with fp32 scales.

    ExecuTorch's 4-bit embedding kernel reads bf16 scales as if they were fp32.
    """
    if not isinstance(table, IntxUnpackedToInt8Tensor):
        return table
    return with_parts(table, scale=table.scale.to(torch.float32), activation_quantization=None)


def exclusion(tokens: Tensor, vocabulary: int, mask_token: int | None) -> Tensor | None:
    """What is added to the logits of tokens [C] so that padding and the mask token have no weight.

    None if there are none of them.
    """
    excluded = tokens >= vocabulary
    if mask_token is not None:
        excluded |= tokens == mask_token
    return excluded * EXCLUDED if bool(excluded.any()) else None


def descend(weights: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """One level of a hierarchical inverse CDF.

    weights: [M, N], not negative; rest: [M, 1], the mass to pass over. Returns the child in which
    the mass ends [M, 1] int64 (the last, where rounding carries it beyond the end), and what is
    left of it inside that child [M, 1].
    """
    cumulative = torch.cumsum(weights, dim=1)
    index = (cumulative <= rest).to(torch.int64).sum(dim=1, keepdim=True)
    index = torch.clamp(index, max=weights.shape[1] - 1)
    before = torch.gather(cumulative, 1, index) - torch.gather(weights, 1, index)
    return index, torch.relu(rest - before)


def with_weight(drawn: Tensor, weights: Tensor) -> Tensor:
    """`drawn` [M, 1], or the likeliest where rounding carried it to a token without weight."""
    has_weight = torch.gather(weights, 1, drawn) > 0.0
    return torch.where(has_weight, drawn, torch.argmax(weights, dim=1, keepdim=True))


def at_column(by_group: list[Tensor], column: Tensor) -> Tensor:
    """A column [M, 1] of each group's [M, C], [M, groups]."""
    return torch.cat([torch.gather(part, 1, column) for part in by_group], dim=1)


def accumulate(operation: Callable[[Tensor, Tensor], Tensor], parts: list[Tensor]) -> Tensor:
    """Join the parts by an elementwise operation, in order."""
    result = parts[0]
    for part in parts[1:]:
        result = operation(result, part)
    return result


def after(x: Tensor, condition: Tensor) -> Tensor:
    """`x`, made to depend on `condition` (which broadcasts to it), so that it cannot come earlier.

    Lowering sorts nodes by depth and moves them as far as dependencies let it. Without these, the
    logits of all chunks are computed first, and held; and a soft embedding is left for the last
    delegate, for which all exponentials are held. 0 * condition is finite by construction.
    """
    return x + condition * 0.0


def round_to_int8(x: Tensor) -> Tensor:
    """Rows [M, H] rounded as XNNPACK rounds the activations of a dynamically quantized product.

    Asymmetric, 255 steps from min(0, row) to max(0, row), rounding half to even; after
    `xnn_f32_qd8_asymmetric_quantization_params`.
    """
    low = torch.clamp(x.amin(dim=1, keepdim=True), max=0.0)
    high = torch.clamp(x.amax(dim=1, keepdim=True), min=0.0)
    steps = 255.0 / torch.clamp(high - low, min=1e-30)
    zero = torch.round(-128.0 - low * steps)
    quantized = torch.clamp(torch.round(x * steps) + zero, -128.0, 127.0)
    return (quantized - zero) / steps


def check_table(table: Tensor, soft_cap: float | None, chunk_columns: int) -> None:
    """Raise ValueError for a shape or a size without meaning."""
    if table.ndim != 2:
        raise ValueError(f"the table has shape {tuple(table.shape)}; it must be [V, H]")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap is {soft_cap}; it must be positive, or None for no cap")
    if chunk_columns < 1:
        raise ValueError(f"chunk_columns is {chunk_columns}; it must be at least 1")


def inverse_temperature(settings: Tensor) -> Tensor:
    """What logits are multiplied by, [1, 1]: one over the temperature, 1 where that is 0."""
    temperature = settings[0:1]
    divisor = torch.where(temperature > 0.0, temperature, torch.ones_like(temperature))
    return (1.0 / divisor).view(1, 1)


def _fan(columns: int) -> int:
    return 64 if columns >= 1024 else 8


def _is_int8_per_row(table: Tensor) -> bool:
    return (
        isinstance(table, IntxUnpackedToInt8Tensor)
        and table.target_dtype == torch.int8
        and table.block_size[1] == table.shape[1]
        and not table.zero_point.any()
    )


def _products(rows: Tensor, hidden: Tensor) -> Tensor:
    """[M, R, H] rows times [M, H] -> [M, R]."""
    return torch.bmm(rows, hidden.unsqueeze(2)).squeeze(2)
