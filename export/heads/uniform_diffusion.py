"""The vocabulary head: from hidden states to the next canvas, with no canvas of logits ever held.

It knows neither the model before it nor the loop around it. The vocabulary is walked in chunks, and
**chunk k holds the tokens k, k + n, k + 2n, ...** of n chunks, so that column j of every chunk
belongs to the same n consecutive tokens. Summing (or taking the maximum of) the chunks elementwise
then yields sums (maxima) over blocks of consecutive tokens, in vocabulary order, without one
reduction over the vocabulary. From those block sums a token is drawn by inverse CDF: descend to
the block, look up its few rows of the table, compute their logits once more, finish there.

Per logit the walk costs, beside the two matrix products, a tanh, an exp and six multiplications or
additions (`benchmarks/vocabulary_head.py` measures them).
"""

import math
from typing import Literal

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed::dequantize_per_tensor
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from export.contract.styles.uniform_diffusion import UniformDiffusionSettings
from export.heads.lookup import lookup_table
from export.heads.samplers import entropy_bound

Arithmetic = Literal["fp32", "int8"]

CHUNK_COLUMNS = 2048
"""Logits per position and chunk. [256, 2048] in fp32 are 2 MiB: halves of it stay in the caches of
two cores. Measured: 4096 takes 7 % longer, 1024 the same; lowering time goes with the chunks."""

REREAD_ROWS = 16
"""Most rows of the table looked up again per position to finish a draw; bounds [T, rows, H]."""

_HIGHEST_SUM = 80.0
"""Largest exponent that a sum over the vocabulary may reach: exp(88.7) is the fp32 maximum."""

_LOWEST = -80.0
"""Exponents are cut here: below lie denormals, whose inverse (a quantization scale) is infinite."""

_HEADROOM = 40.0
"""How far a row's largest exponent may lie under zero: exp(_LOWEST) is then 1e-17 of it."""

_PADDING_LOGIT = -1.0e4
"""Raw logit of a padding row: far below any real one, also where there is no soft cap."""


class DiffusionHead(nn.Module):
    """Soft-capped, tempered softmax over a tied vocabulary, with the entropy-bound sampler.

    Args:
        table: embedding table tied with the head, [V, H]: fp32, or a torchao
            `IntxUnpackedToInt8Tensor` (int8 per row, or int4 in groups along H).
        soft_cap: logits are `soft_cap * tanh(raw / soft_cap)`; None for no cap.
        canvas_length: T.
        chunk_columns: at most this many logits per position are held at once.
        logits: "int8" multiplies int8 dynamic activations by the quantized table; "fp32" multiplies
            in fp32. None: "int8" for a quantized table, "fp32" for a plain one.
        soft_embedding: arithmetic of softmax @ table: "fp32", or "int8": probabilities quantized
            per position and chunk, the transposed table per hidden unit and chunk. None: like
            `logits`.

    Raises:
        ValueError: a shape, a size or a choice without meaning, with the value seen.
    """

    def __init__(
        self,
        table: Tensor,
        *,
        soft_cap: float | None,
        canvas_length: int,
        chunk_columns: int = CHUNK_COLUMNS,
        logits: Arithmetic | None = None,
        soft_embedding: Arithmetic | None = None,
    ) -> None:
        super().__init__()
        quantized = isinstance(table, IntxUnpackedToInt8Tensor)
        logits = logits or ("int8" if quantized else "fp32")
        soft_embedding = soft_embedding or logits
        _check_arguments(table, soft_cap, canvas_length, chunk_columns, logits, soft_embedding)
        if quantized and logits == "fp32":
            table = table.dequantize()
        self.logits_arithmetic = logits
        self.soft_embedding_arithmetic = soft_embedding
        self.vocabulary, self.hidden_size = table.shape
        self.canvas_length = canvas_length
        self.soft_cap = soft_cap
        self.highest = _HIGHEST_SUM - math.log(self.vocabulary)
        self.padding_value = _PADDING_LOGIT if soft_cap is None else -1.0

        self.chunks = -(-self.vocabulary // chunk_columns)
        columns = -(-self.vocabulary // self.chunks)
        self.fan = 64 if columns >= 1024 else 8
        self.columns = -(-columns // self.fan) * self.fan
        self.groups = -(-self.chunks // REREAD_ROWS)
        self.group_chunks = -(-self.chunks // self.groups)
        self.groups = -(-self.chunks // self.group_chunks)

        self.lookup = _Int8Lookup(table) if _is_int8_per_row(table) else _Lookup(table)
        self.logit_chunks = nn.ModuleList(self._logit_chunk(table, k) for k in range(self.chunks))
        self.soft_chunks = nn.ModuleList(self._soft_chunk(table, k) for k in range(self.chunks))
        tokens = torch.arange(self.columns).reshape(-1, 1) * self.chunks + torch.arange(self.chunks)
        padding = (tokens >= self.vocabulary).to(torch.float32)
        per_group = [part.sum(dim=1) for part in padding.split(self.group_chunks, dim=1)]
        # Sums of short rows are products, which are delegated where `sum` is not (of long rows the
        # rounding would show in the entropy, a difference of sums). A buffer, because a product
        # with a constant made in the graph would not be delegated either.
        self.register_buffer("fan_row", torch.ones(1, self.fan), persistent=False)
        self.register_buffer("padding_rows", torch.stack(per_group), persistent=False)  # [G, C]
        self.padding_total = int(padding.sum())
        self.padded_groups = [bool(part.any()) for part in per_group]

    def forward(
        self,
        hidden: Tensor,
        canvas: Tensor,
        previous_argmax: Tensor,
        stable_steps: Tensor,
        step: Tensor,
        settings: Tensor,
        uniform: Tensor,
        random_tokens: Tensor,
        targets: Tensor,
    ) -> tuple[Tensor, ...]:
        """One denoising step's decision.

        Args:
            hidden: [1, T, H] fp32, after the final norm.
            canvas: [1, T] int64, the tokens that were denoised (part of every sampler's interface;
                this one accepts or draws again, and never keeps a token).
            previous_argmax: [1, T] int64, -1 on the first step.
            stable_steps: [1] int64, of the step before, 0 on the first.
            step: [1] int64, steps that remain, N..1.
            settings: [6] fp32, see `entropy_bound.SETTINGS`.
            uniform: [1, T] fp32 in [0, 1).
            random_tokens: [1, T] int64, what is not accepted becomes these.
            targets: [1, T] int64, whose log-probability is wanted.

        Returns:
            next_canvas [1, T], argmax [1, T], entropy [1, T] in nats, accepted [1, T] 0/1,
            stable_steps [1], finished [1] 0/1, target_log_prob [1, T] in nats,
            signal [1, T, H] = softmax @ table * sqrt(H). Integers are int64, the others fp32; all
            but the integers refer to the processed (capped, tempered) logits.
        """
        hidden = hidden.reshape(self.canvas_length, self.hidden_size)
        if self.soft_cap is not None:
            hidden = hidden * (1.0 / self.soft_cap)
        gain = (self.soft_cap or 1.0) / entropy_bound.temperature(settings, step).reshape(1, 1)
        first = self._values(hidden, 0)
        shift = self._shift(first, gain)
        sums, maxima, weighted, soft = self._walk(hidden, first, gain, shift)

        block_max = _accumulate(torch.maximum, maxima)
        last = block_max[:, :1] + weighted[:, :1] + soft[:, :1]
        block_sums = _after(_accumulate(torch.add, sums), last)
        fans = block_sums.reshape(self.canvas_length, -1, self.fan)
        fan_sums = F.linear(fans, self.fan_row).squeeze(2)
        total = fan_sums.sum(dim=1, keepdim=True)  # [T, 1]
        rest = uniform.reshape(-1, 1) * total
        fan, rest = _descend(fan_sums, rest)
        picked = (fan * self.fan + torch.arange(self.fan)).reshape(-1, self.fan)
        within, rest = _descend(torch.gather(block_sums, 1, picked), rest)
        sample_block = fan * self.fan + within
        per_group = [torch.gather(part, 1, sample_block) for part in sums]
        sample_group, rest = _descend(torch.cat(per_group, dim=1), rest)

        best_block = torch.argmax(block_max, dim=1, keepdim=True)
        per_group = [torch.gather(part, 1, best_block) for part in maxima]
        best_group = torch.argmax(torch.cat(per_group, dim=1), dim=1, keepdim=True)

        sample_tokens, sample_valid = self._block_tokens(sample_block, sample_group)
        best_tokens, best_valid = self._block_tokens(best_block, best_group)
        tokens = torch.cat([sample_tokens, best_tokens, targets.reshape(-1, 1)], dim=1)
        again = self._logits_again(hidden, tokens)  # [T, 2R + 1], before the gain
        rows = self.group_chunks
        exponentials = self._exponentials(again[:, :rows], gain, shift)
        exponentials = exponentials * sample_valid.to(torch.float32)
        draw, _ = _descend(exponentials, rest)
        sample = torch.gather(sample_tokens, 1, draw).reshape(1, -1)
        candidates = torch.where(
            best_valid, again[:, rows : 2 * rows], torch.full((), _PADDING_LOGIT)
        )
        best = torch.argmax(candidates, dim=1, keepdim=True)
        argmax = torch.gather(best_tokens, 1, best).reshape(1, -1)

        log_total = torch.log(total)
        mean = F.linear(weighted.reshape(fans.shape), self.fan_row).sum(dim=1)
        if self.padding_total:
            mean = mean - self._padding(gain, shift) * (self.padding_total * self.padding_value)
        entropy = torch.relu(log_total + shift - gain * (mean / total)).reshape(1, -1)
        target_log_prob = (again[:, 2 * rows :] * gain - shift - log_total).reshape(1, -1)
        signal = soft * (math.sqrt(self.hidden_size) / total)

        decision = entropy_bound.decide(
            sample, argmax, entropy, previous_argmax, stable_steps, settings, random_tokens
        )
        return (
            decision.next_canvas,
            argmax,
            entropy,
            decision.accepted,
            decision.stable_steps,
            decision.finished,
            target_log_prob,
            signal.unsqueeze(0),
        )

    def _shift(self, first: Tensor, gain: Tensor) -> Tensor:
        """What is taken off the exponents of a row, [T, 1], known before the walk.

        It replaces the running maximum of online softmax, which would cost several passes. A cap
        bounds the exponents by +-gain, so a constant does (at the released settings gain is 75),
        unless a row lies so low that it would vanish; without a cap it is the largest exponent of
        the first chunk. What still exceeds the range is cut by `_exponentials`: that changes a
        result only where two tokens of a row are both some 1e29 times as likely as the first
        chunk's best.
        """
        seen = first.amax(dim=1, keepdim=True) * gain
        if self.soft_cap is None:
            return seen
        return torch.minimum(torch.relu(gain - self.highest), seen + _HEADROOM)

    def _values(self, hidden: Tensor, k: int) -> Tensor:
        """Logits of chunk k, over the cap where there is one: [T, C] in -1..1."""
        value = self.logit_chunks[k](hidden)
        return value if self.soft_cap is None else torch.tanh(value)

    def _exponentials(self, value: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        return torch.exp(F.hardtanh(value * gain - shift, _LOWEST, self.highest))

    def _padding(self, gain: Tensor, shift: Tensor) -> Tensor:
        """The exponential that every padding row contributes, [T, 1]."""
        return torch.exp(torch.clamp(gain * self.padding_value - shift, min=_LOWEST))

    def _walk(
        self, hidden: Tensor, first: Tensor, gain: Tensor, shift: Tensor
    ) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """All that is needed of the vocabulary, chunk by chunk (`first`: values of chunk 0).

        Returns block sums of exp and block maxima (one [T, C] per group of chunks), the sum of
        exp * value [T, C], and exp @ table [T, H].
        """
        sums: list[Tensor] = []
        maxima: list[Tensor] = []
        weighted = soft = None
        for k in range(self.chunks):
            value = self._values(_after(hidden, soft[:, :1]), k) if k else first
            exponential = self._exponentials(value, gain, shift)
            product = exponential * value
            part = self.soft_chunks[k](exponential)
            if k % self.group_chunks == 0:
                sums.append(exponential)
                maxima.append(value)
            else:
                sums[-1] = sums[-1] + exponential
                maxima[-1] = torch.maximum(maxima[-1], value)
            weighted = product if weighted is None else weighted + product
            soft = part if soft is None else soft + part
        if self.padding_total:
            padding = self._padding(gain, shift)
            for group, padded in enumerate(self.padded_groups):
                if padded:
                    rows = self.padding_rows[group : group + 1]
                    sums[group] = torch.relu(sums[group] - rows * padding)
        return sums, maxima, weighted, soft

    def _block_tokens(self, block: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [T, R] of a block's group ([T, 1] each), and which of them exist, bool [T, R]."""
        chunk = group * self.group_chunks + torch.arange(self.group_chunks)
        tokens = block * self.chunks + chunk
        valid = (chunk < self.chunks) & (tokens < self.vocabulary)
        return torch.clamp(tokens, max=self.vocabulary - 1), valid

    def _logits_again(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The walk's values (tanh of the scaled logit) of tokens [T, R], from rows looked up."""
        if self.logits_arithmetic == "int8":
            hidden = _int8_per_row(hidden)
        value = self.lookup(hidden, tokens)
        return torch.tanh(value) if self.soft_cap is not None else value

    def _logit_chunk(self, table: Tensor, k: int) -> nn.Module:
        missing = self.columns - len(range(k, self.vocabulary, self.chunks))
        bias = None
        if missing:
            bias = torch.zeros(self.columns)
            bias[-missing:] = _PADDING_LOGIT
        if not isinstance(table, IntxUnpackedToInt8Tensor):
            rows = F.pad(table[k :: self.chunks].to(torch.float32), (0, 0, 0, missing))
            return _Linear(rows.contiguous(), bias)
        return _Linear(
            IntxUnpackedToInt8Tensor(
                qdata=F.pad(table.qdata[k :: self.chunks], (0, 0, 0, missing)).contiguous(),
                scale=F.pad(table.scale[k :: self.chunks], (0, 0, 0, missing), value=1.0),
                zero_point=F.pad(table.zero_point[k :: self.chunks], (0, 0, 0, missing)),
                target_dtype=table.target_dtype,
                block_size=table.block_size,
                dtype=table.dtype,
                activation_quantization="int8_asym_per_token",
            ),
            bias,
        )

    def _soft_chunk(self, table: Tensor, k: int) -> nn.Module:
        rows = _rows(table, k, self.chunks)
        rows = F.pad(rows, (0, 0, 0, self.columns - rows.shape[0]))
        columns = rows.t().contiguous()
        if self.soft_embedding_arithmetic == "fp32":
            return _Linear(columns, None)
        return _Linear(
            IntxUnpackedToInt8Tensor.from_hp(
                columns,
                (1, self.columns),
                torch.int8,
                activation_quantization="int8_asym_per_token",
            ),
            None,
        )


class _Linear(nn.Module):
    """A linear layer around a weight that exists already, plain or quantized."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _Lookup(nn.Module):
    """Products of a hidden state with rows of the table looked up (and dequantized) by token."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(lookup_table(table), requires_grad=False)

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """hidden [T, H], tokens [T, R] -> [T, R]."""
        return _products(F.embedding(tokens, self.weight), hidden)


class _Int8Lookup(nn.Module):
    """The same for an int8 table with one scale per row, which multiplies the product instead.

    ExecuTorch's `embedding_byte` takes 2.3 ns per number; copying the rows as they are and letting
    XNNPACK widen them takes 0.3 ns.
    """

    def __init__(self, table: IntxUnpackedToInt8Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", table.qdata)
        self.register_buffer("scale", table.scale.to(torch.float32))

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """hidden [T, H], tokens [T, R] -> [T, R]."""
        rows = torch.index_select(self.rows, 0, tokens.reshape(-1))
        rows = torch.ops.quantized_decomposed.dequantize_per_tensor(
            rows, 1.0, 0, -128, 127, torch.int8
        )
        scale = torch.index_select(self.scale, 0, tokens.reshape(-1)).reshape(tokens.shape)
        return _products(rows.reshape(*tokens.shape, -1), hidden) * scale


def head_example_inputs(canvas_length: int, hidden_size: int) -> tuple[Tensor, ...]:
    """Inputs to export a head with, of the shapes and types of `DiffusionHead.forward`."""
    tokens = torch.zeros(1, canvas_length, dtype=torch.int64)
    return (
        torch.zeros(1, canvas_length, hidden_size),
        tokens,
        tokens - 1,
        torch.zeros(1, dtype=torch.int64),
        torch.ones(1, dtype=torch.int64),
        torch.from_numpy(UniformDiffusionSettings().as_array()),
        torch.full((1, canvas_length), 0.5),
        tokens.clone(),
        tokens.clone(),
    )


def head_partitioners() -> list:
    """Partitioners to lower a head with: the plain XNNPACK one, alone.

    With `XnnpackDynamicallyQuantizedPartitioner` before it, the logit products of all chunks, which
    do not depend on one another, become one delegate that holds a whole canvas of logits. The plain
    one takes quantized products too, and puts the walk into a single delegate in program order.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return [XnnpackPartitioner()]


def _rows(table: Tensor, start: int, stride: int) -> Tensor:
    """Rows start, start + stride, ... of a table, fp32, without dequantizing the others."""
    if not isinstance(table, IntxUnpackedToInt8Tensor):
        return table[start::stride].to(torch.float32)
    quantized = table.qdata[start::stride].to(torch.float32)
    scale = table.scale[start::stride].to(torch.float32)
    zero = table.zero_point[start::stride].to(torch.float32)
    group = table.block_size[1]
    grouped = quantized.reshape(quantized.shape[0], -1, group)
    return ((grouped - zero.unsqueeze(2)) * scale.unsqueeze(2)).reshape(quantized.shape)


def _is_int8_per_row(table: Tensor) -> bool:
    return (
        isinstance(table, IntxUnpackedToInt8Tensor)
        and table.target_dtype == torch.int8
        and table.block_size[1] == table.shape[1]
        and not table.zero_point.any()
    )


def _products(rows: Tensor, hidden: Tensor) -> Tensor:
    """[T, R, H] rows times [T, H] -> [T, R]."""
    return torch.bmm(rows, hidden.unsqueeze(2)).squeeze(2)


def _accumulate(operation, parts: list[Tensor]) -> Tensor:
    result = parts[0]
    for part in parts[1:]:
        result = operation(result, part)
    return result


def _after(x: Tensor, condition: Tensor) -> Tensor:
    """`x`, made to depend on `condition` (which broadcasts to it), so that it cannot come earlier.

    Lowering sorts nodes by depth and moves them as far as dependencies let it. Without these, the
    logits of all chunks are computed first, and held; and the soft embedding is left for the last
    delegate, for which all exponentials are held. 0 * condition is finite by construction.
    """
    return x + condition * 0.0


def _descend(weights: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """One level of a hierarchical inverse CDF.

    weights: [T, N], not negative; rest: [T, 1], the mass to pass over. Returns the child in which
    the mass ends [T, 1] int64 (the last, where rounding carries it beyond the end), and what is
    left of it inside that child [T, 1].
    """
    cumulative = torch.cumsum(weights, dim=1)
    index = (cumulative <= rest).to(torch.int64).sum(dim=1, keepdim=True)
    index = torch.clamp(index, max=weights.shape[1] - 1)
    before = torch.gather(cumulative, 1, index) - torch.gather(weights, 1, index)
    return index, torch.relu(rest - before)


def _int8_per_row(x: Tensor) -> Tensor:
    """Rows [T, H] rounded as XNNPACK rounds the activations of a dynamically quantized product.

    Asymmetric, 255 steps from min(0, row) to max(0, row), rounding half to even; after
    `xnn_f32_qd8_asymmetric_quantization_params`.
    """
    low = torch.clamp(x.amin(dim=1, keepdim=True), max=0.0)
    high = torch.clamp(x.amax(dim=1, keepdim=True), min=0.0)
    steps = 255.0 / torch.clamp(high - low, min=1e-30)
    zero = torch.round(-128.0 - low * steps)
    quantized = torch.clamp(torch.round(x * steps) + zero, -128.0, 127.0)
    return (quantized - zero) / steps


def _check_arguments(
    table: Tensor,
    soft_cap: float | None,
    canvas_length: int,
    chunk_columns: int,
    logits: str,
    soft_embedding: str,
) -> None:
    if table.ndim != 2:
        raise ValueError(f"the table has shape {tuple(table.shape)}; it must be [V, H]")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap is {soft_cap}; it must be positive, or None for no cap")
    if canvas_length < 1 or chunk_columns < 1:
        raise ValueError(
            f"canvas_length is {canvas_length} and chunk_columns {chunk_columns}; "
            "both must be at least 1"
        )
    for name, value in (("logits", logits), ("soft_embedding", soft_embedding)):
        if value not in ("fp32", "int8"):
            raise ValueError(f'{name} is {value!r}; it must be "fp32", "int8" or None')
    if logits == "int8" and not isinstance(table, IntxUnpackedToInt8Tensor):
        raise ValueError('logits is "int8", but the table is not quantized; quantize it first')
