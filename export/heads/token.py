"""Heads that turn hidden states into tokens, for autoregressive and for masked decoding.

They know neither the model before them nor the loop around them. A token is drawn by inverse CDF of
one uniform number, in vocabulary order. What is needed of a vocabulary is gathered in one of two
ways: `_Walked` holds a few chunks of the logits at a time and looks the rows of the table that
matter up again; `_Held` holds all logits of the rows, which top-k and top-p need (they go over them
dozens of times), and which for the single row of autoregressive decoding are small.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from export.heads.samplers import masked
from export.heads.samplers.truncation import truncate
from export.heads.uniform_diffusion import (
    _accumulate,
    _after,
    _descend,
    _int8_per_row,
    _Int8Lookup,
    _is_int8_per_row,
    _Linear,
    _Lookup,
)

CHUNK_COLUMNS = 2048
"""Logits per row and chunk. [256, 2048] in fp32 are 2 MiB."""

CHUNKS_AT_ONCE = 4
"""Chunks that share one correction of the running maximum.

Two take 333 ms where four take 306 (256 rows, 151,936 tokens, hidden 896, int8, two threads).
"""

BLOCK_TOKENS = 16
"""Tokens per block whose sum is kept, and which are looked up again to finish a draw."""

_EXCLUDED = -1.0e9
"""Logit of a token that is never sampled, and of padding; finite, so that 0 * it is 0."""


class _Found(NamedTuple):
    """What a masked head needs of the distribution over a vocabulary, each [M, 1]."""

    sample: Tensor  # int64, drawn
    best: Tensor  # int64, the likeliest, of ties the lowest
    sample_probability: Tensor
    best_probability: Tensor
    second_probability: Tensor
    entropy: Tensor  # nats


class _Walked(nn.Module):
    """The distribution of M rows over the vocabulary, chunk by chunk.

    **Chunk k holds the tokens k, k + n, k + 2n, ...** of n chunks, as in
    `export.heads.uniform_diffusion`: operations between chunks, elementwise, are reductions over
    consecutive tokens. The sums are those of online softmax (arXiv 1805.02867) with a running
    maximum per column, which is elementwise, too.
    """

    def __init__(
        self,
        table: Tensor,
        soft_cap: float | None,
        mask_token: int,
        chunk_columns: int = CHUNK_COLUMNS,
    ) -> None:
        super().__init__()
        self.vocabulary, self.hidden_size = table.shape
        self.soft_cap = soft_cap
        self.mask_token = mask_token
        self.int8_activations = isinstance(table, IntxUnpackedToInt8Tensor)
        self.chunks = -(-self.vocabulary // chunk_columns)
        columns = -(-self.vocabulary // self.chunks)
        self.fan = 64 if columns >= 1024 else 8
        self.columns = -(-columns // self.fan) * self.fan
        self.groups = -(-self.chunks // BLOCK_TOKENS)
        self.group_chunks = -(-self.chunks // self.groups)
        self.groups = -(-self.chunks // self.group_chunks)
        self.lookup = _Int8Lookup(table) if _is_int8_per_row(table) else _Lookup(table)
        layers, excluded = [], []
        for k in range(self.chunks):
            tokens = torch.arange(self.columns) * self.chunks + k
            bias = ((tokens >= self.vocabulary) | (tokens == mask_token)) * _EXCLUDED
            bias = bias if bool(bias.any()) else None
            in_product = bias if soft_cap is None else None
            layers.append(_product(table, k, self.chunks, self.columns, in_product))
            excluded.append(None if soft_cap is None else bias)
        self.logit_chunks = nn.ModuleList(layers)
        for k, bias in enumerate(excluded):
            self.register_buffer(f"excluded_{k}", None if bias is None else bias.view(1, -1))
        self.sum_fans = _SumFans(self.columns // self.fan, self.fan)
        self.sum_moments = _SumFans(self.columns // self.fan, self.fan)

    def forward(self, x: Tensor, gain: Tensor, uniform: Tensor) -> _Found:
        """x: [M, H]; gain: [1, 1], one over the temperature; uniform: [M, 1] in [0, 1)."""
        x = x * (gain if self.soft_cap is None else 1.0 / self.soft_cap)
        maxima, sums, weighted = self._walk(x, gain)

        column_max = _accumulate(torch.maximum, maxima)
        best_column = torch.argmax(column_max, dim=1, keepdim=True)
        highest = torch.gather(column_max, 1, best_column)  # [M, 1]
        scales = [torch.exp(part - highest) for part in maxima]
        sums = [part * scale for part, scale in zip(sums, scales, strict=True)]
        weighted = [part * scale for part, scale in zip(weighted, scales, strict=True)]
        column_sums = _accumulate(torch.add, sums)
        column_weighted = _accumulate(torch.add, weighted)
        by_fan = self.sum_fans(column_sums)
        total = by_fan.sum(dim=1, keepdim=True)
        mean = self.sum_moments(column_weighted).sum(dim=1, keepdim=True) / total
        entropy = torch.relu(torch.log(total) + highest - mean)

        rest = uniform * total
        fan, rest = _descend(by_fan, rest)
        picked = fan * self.fan + torch.arange(self.fan)
        within, rest = _descend(torch.gather(column_sums, 1, picked), rest)
        column = fan * self.fan + within
        per_group = [torch.gather(part, 1, column) for part in sums]
        group, rest = _descend(torch.cat(per_group, dim=1), rest)
        per_group = torch.cat([torch.gather(part, 1, best_column) for part in maxima], dim=1)
        best_group = torch.argmax(per_group, dim=1, keepdim=True)

        tokens, valid = self._block_tokens(column, group)
        best_tokens, best_valid = self._block_tokens(best_column, best_group)
        again = self._logits_again(x, torch.cat([tokens, best_tokens], dim=1), gain)
        below = again[:, : self.group_chunks] - highest
        weights = torch.exp(torch.clamp(below, max=0.0)) * valid.to(torch.float32)
        drawn, _ = _descend(weights, rest)
        # Rounding may carry a draw beyond the last token that has a weight.
        has_weight = torch.gather(weights, 1, drawn) > 0.0
        drawn = torch.where(has_weight, drawn, torch.argmax(weights, dim=1, keepdim=True))

        excluded = (1.0 - best_valid.to(torch.float32)) * _EXCLUDED
        candidates = again[:, self.group_chunks :] + excluded
        best = torch.argmax(candidates, dim=1, keepdim=True)
        second = torch.maximum(
            torch.scatter(candidates, 1, best, _EXCLUDED).amax(dim=1, keepdim=True),
            torch.maximum(
                torch.scatter(per_group, 1, best_group, _EXCLUDED).amax(dim=1, keepdim=True),
                torch.scatter(column_max, 1, best_column, _EXCLUDED).amax(dim=1, keepdim=True),
            ),
        )
        return _Found(
            sample=torch.gather(tokens, 1, drawn),
            best=torch.gather(best_tokens, 1, best),
            sample_probability=torch.gather(weights, 1, drawn) / total,
            best_probability=1.0 / total,
            second_probability=torch.exp(torch.clamp(second - highest, max=0.0)) / total,
            entropy=entropy,
        )

    def _walk(self, x: Tensor, gain: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per group of chunks and column: the largest logit, and sums of exp and of exp * logit.

        The exponents are differences from that largest logit. Each is [M, C].
        """
        maxima: list[Tensor] = []
        sums: list[Tensor] = []
        weighted: list[Tensor] = []
        for start in range(0, self.chunks, self.group_chunks):
            end = min(start + self.group_chunks, self.chunks)
            top = total = moment = None
            for first in range(start, end, CHUNKS_AT_ONCE):
                logits = []
                for k in range(first, min(first + CHUNKS_AT_ONCE, end)):
                    logits.append(self._logits(x, k, gain))
                before, top = (
                    top,
                    _accumulate(torch.maximum, logits if top is None else [top, *logits]),
                )
                if before is not None:
                    correction = torch.exp(before - top)
                    total, moment = total * correction, moment * correction
                for value in logits:
                    exponential = torch.exp(value - top)
                    product = exponential * value
                    total = exponential if total is None else total + exponential
                    moment = product if moment is None else moment + product
                x = _after(x, total[:, :1] + moment[:, :1])
            maxima.append(top)
            sums.append(total)
            weighted.append(moment)
        return maxima, sums, weighted

    def _logits(self, x: Tensor, k: int, gain: Tensor) -> Tensor:
        value = self.logit_chunks[k](x)
        if self.soft_cap is None:
            return value
        value = torch.tanh(value) * (gain * self.soft_cap)
        excluded = getattr(self, f"excluded_{k}")
        return value if excluded is None else value + excluded

    def _block_tokens(self, column: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [M, R] of a block ([M, 1] each), and which of them may be sampled, bool [M, R]."""
        chunk = group * self.group_chunks + torch.arange(self.group_chunks)
        tokens = column * self.chunks + chunk
        valid = (chunk < self.chunks) & (tokens < self.vocabulary) & (tokens != self.mask_token)
        return torch.clamp(tokens, max=self.vocabulary - 1), valid

    def _logits_again(self, x: Tensor, tokens: Tensor, gain: Tensor) -> Tensor:
        """The walk's logits of tokens [M, R], from rows looked up; excluded ones are not marked."""
        if self.int8_activations:
            x = _int8_per_row(x)
        value = self.lookup(x, tokens)
        return value if self.soft_cap is None else torch.tanh(value) * (gain * self.soft_cap)


class _Held(nn.Module):
    """Logits of M rows over the whole vocabulary, and draws from weights as many.

    The columns are padded to a multiple of `fan`, so that sums of all are sums of sums of `fan`.
    """

    def __init__(self, table: Tensor, soft_cap: float | None, mask_token: int | None) -> None:
        super().__init__()
        self.vocabulary = table.shape[0]
        self.soft_cap = soft_cap
        self.fan = 64 if self.vocabulary >= 1024 else 8
        self.fans = -(-self.vocabulary // self.fan)
        self.columns = self.fans * self.fan
        tokens = torch.arange(self.columns)
        excluded = tokens >= self.vocabulary
        if mask_token is not None:
            excluded |= tokens == mask_token
        bias = excluded * _EXCLUDED if bool(excluded.any()) else None
        self.product = _product(table, 0, 1, self.columns, bias if soft_cap is None else None)
        bias = None if bias is None or soft_cap is None else bias.view(1, -1)
        self.register_buffer("excluded", bias)
        self.sum_fans = _SumFans(self.fans, self.fan)
        self.sum_plain = _SumFans(self.fans, self.fan)
        self.sum_moments = _SumFans(self.fans, self.fan)
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
        fan, rest = _descend(by_fan, uniform * total)
        picked = torch.gather(weights, 1, fan * self.fan + torch.arange(self.fan))
        within, _ = _descend(picked, rest)
        # Rounding may carry a draw beyond the last token that has a weight.
        has_weight = torch.gather(picked, 1, within) > 0.0
        within = torch.where(has_weight, within, torch.argmax(picked, dim=1, keepdim=True))
        return fan * self.fan + within, total

    def forward(
        self, x: Tensor, gain: Tensor, uniform: Tensor, top_p: Tensor, top_k: Tensor
    ) -> _Found:
        """What `_Walked` finds, of the distribution that top-k and top-p leave."""
        logits = self.logits(x)
        best = torch.argmax(logits, dim=1, keepdim=True)
        below = (logits - torch.gather(logits, 1, best)) * gain
        weights = truncate(torch.exp(below), top_p, top_k, self.ones)
        sample, total = self.draw(weights, uniform)
        moment = self.sum_moments(weights * below).sum(dim=1, keepdim=True)
        return _Found(
            sample=sample,
            best=best,
            sample_probability=torch.gather(weights, 1, sample) / total,
            best_probability=1.0 / total,
            second_probability=torch.scatter(weights, 1, best, 0.0).amax(dim=1, keepdim=True)
            / total,
            entropy=torch.relu(torch.log(total) - moment / total),
        )


class _SumFans(nn.Module):
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


class AutoregressiveHead(nn.Module):
    """The next token of one row, and how likely it was.

    Args:
        table: embedding table of the head, [V, H]: fp32 or `IntxUnpackedToInt8Tensor`.
        truncation: whether top-k and top-p are in the graph.
        soft_cap: logits are `soft_cap * tanh(raw / soft_cap)`; None for no cap.

    Raises:
        ValueError: a shape or a size without meaning, with the value seen.
    """

    def __init__(
        self, table: Tensor, *, truncation: bool = True, soft_cap: float | None = None
    ) -> None:
        super().__init__()
        _check(table, soft_cap)
        self.hidden_size = table.shape[1]
        self.truncation = truncation
        self.vocabulary = _Held(table, soft_cap, None)

    def forward(
        self, hidden: Tensor, row: Tensor, settings: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sample from one row.

        Args:
            hidden: [1, N, H] fp32, after the final norm.
            row: [1] int64, which of the N rows.
            settings: [3] fp32: temperature (0: the likeliest token, of ties the lowest), top_p
                (1: off), top_k (0: off).
            uniform: [1] fp32 in [0, 1).

        Returns:
            token [1] int64; log_prob [1] fp32, nats of that token, and entropy [1] fp32, nats,
            both of the softmax at temperature 1 without truncation.
        """
        x = torch.index_select(hidden.view(hidden.shape[1], self.hidden_size), 0, row)
        logits = self.vocabulary.logits(x)
        best = torch.argmax(logits, dim=1, keepdim=True)
        below = logits - torch.gather(logits, 1, best)
        plain = torch.exp(below)
        total = self.vocabulary.sum_plain(plain).sum(dim=1, keepdim=True)
        moment = self.vocabulary.sum_moments(plain * below).sum(dim=1, keepdim=True)
        entropy = torch.relu(torch.log(total) - moment / total)
        weights = torch.exp(below * _gain(settings))
        if self.truncation:
            weights = truncate(weights, settings[1:2], settings[2:3], self.vocabulary.ones)
        sample, _ = self.vocabulary.draw(weights, uniform.view(1, 1))
        token = torch.where(settings[0:1] > 0.0, sample, best)
        log_prob = torch.gather(below, 1, token) - torch.log(total)
        return token.view(1), log_prob.view(1), entropy.view(1)


class MaskedHead(nn.Module):
    """Tokens for the masked positions of a canvas, and which of them to keep.

    All refers to the tempered and truncated distribution, as in Dream, SDAR and Fast-dLLM v2
    (LLaDA, which truncates nothing, takes the confidence from the plain softmax; at temperature 0
    all agree).

    Args:
        table: embedding table of the head, [V, H]: fp32 or `IntxUnpackedToInt8Tensor`.
        mask_token: the token that is never sampled; it has no part in the distribution.
        truncation: whether top-k and top-p are in the graph.
        soft_cap: logits are `soft_cap * tanh(raw / soft_cap)`; None for no cap.
        chunk_columns: without truncation, about so many logits per row make a chunk.

    Raises:
        ValueError: a shape or a size without meaning, with the value seen.
    """

    def __init__(
        self,
        table: Tensor,
        *,
        mask_token: int,
        truncation: bool = True,
        soft_cap: float | None = None,
        chunk_columns: int = CHUNK_COLUMNS,
    ) -> None:
        super().__init__()
        _check(table, soft_cap)
        if not 0 <= mask_token < table.shape[0]:
            raise ValueError(
                f"mask_token is {mask_token}; it must be one of the {table.shape[0]} tokens"
            )
        if chunk_columns < 1:
            raise ValueError(f"chunk_columns is {chunk_columns}; it must be at least 1")
        self.hidden_size = table.shape[1]
        self.truncation = truncation
        self.vocabulary = (
            _Held(table, soft_cap, mask_token)
            if truncation
            else _Walked(table, soft_cap, mask_token, chunk_columns)
        )

    def forward(
        self, hidden: Tensor, rows: Tensor, settings: Tensor, quota: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One denoising step's decision.

        Args:
            hidden: [1, N, H] fp32, after the final norm.
            rows: [M] int64, of the N rows those that predict a masked position.
            settings: [5] fp32, see `masked.SETTINGS`; temperature 0: the likeliest token (of ties
                the lowest), all else as at temperature 1.
            quota: [1] int64, how many positions are accepted at least.
            uniform: [M] fp32 in [0, 1).

        Returns:
            token [M] int64, accepted [M] int64 0 or 1, score [M] fp32, entropy [M] fp32 nats.
        """
        count = rows.shape[0]
        x = torch.index_select(hidden.view(hidden.shape[1], self.hidden_size), 0, rows)
        uniform = uniform.view(count, 1)
        if self.truncation:
            found = self.vocabulary(x, _gain(settings), uniform, settings[1:2], settings[2:3])
        else:
            found = self.vocabulary(x, _gain(settings), uniform)
        sampled = settings[0:1] > 0.0
        token = torch.where(sampled, found.sample, found.best)
        confidence = torch.where(sampled, found.sample_probability, found.best_probability)
        margin = torch.relu(found.best_probability - found.second_probability)
        entropy = found.entropy.view(count)
        score = masked.score(confidence.view(count), entropy, margin.view(count), settings[4:5])
        accepted = masked.accept(score, quota, settings[3:4])
        return token.view(count), accepted.to(torch.int64), score, entropy


def _gain(settings: Tensor) -> Tensor:
    """What logits are multiplied by, [1, 1]: one over the temperature, 1 where that is 0."""
    temperature = settings[0:1]
    divisor = torch.where(temperature > 0.0, temperature, torch.ones_like(temperature))
    return (1.0 / divisor).view(1, 1)


def _product(table: Tensor, start: int, stride: int, columns: int, bias: Tensor | None) -> _Linear:
    """Rows start, start + stride, ... of the table as a product, padded to `columns` rows.

    A quantized table multiplies int8 dynamic activations.
    """
    missing = columns - len(range(start, table.shape[0], stride))
    if not isinstance(table, IntxUnpackedToInt8Tensor):
        rows = F.pad(table[start::stride].to(torch.float32), (0, 0, 0, missing))
        return _Linear(rows.contiguous(), bias)
    weight = IntxUnpackedToInt8Tensor(
        qdata=F.pad(table.qdata[start::stride], (0, 0, 0, missing)).contiguous(),
        scale=F.pad(table.scale[start::stride], (0, 0, 0, missing), value=1.0),
        zero_point=F.pad(table.zero_point[start::stride], (0, 0, 0, missing)),
        target_dtype=table.target_dtype,
        block_size=table.block_size,
        dtype=table.dtype,
        activation_quantization="int8_asym_per_token",
    )
    return _Linear(weight, bias)


def _check(table: Tensor, soft_cap: float | None) -> None:
    if table.ndim != 2:
        raise ValueError(f"the table has shape {tuple(table.shape)}; it must be [V, H]")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap is {soft_cap}; it must be positive, or None for no cap")
