"""The head of masked diffusion: tokens for masked positions, and which of them to keep.

It knows neither the model before it nor the loop around it.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from export.heads.samplers import masked
from export.heads.samplers.truncation import truncate
from export.heads.vocabulary import (
    CHUNK_COLUMNS,
    EXCLUDED,
    Block,
    ChunkedVocabulary,
    SumFans,
    WholeVocabulary,
    accumulate,
    after,
    at_column,
    check_table,
    descend,
    exclusion,
    inverse_temperature,
    with_weight,
)

CHUNKS_AT_ONCE = 4
"""Chunks that share one correction of the running maximum.

Two take 333 ms where four take 306 (256 rows, 151,936 tokens, hidden 896, int8, two threads).
"""


class VocabularyStatistics(NamedTuple):
    """Statistics of M distributions over a vocabulary, each [M, 1]."""

    sample: Tensor  # int64, drawn
    best: Tensor  # int64, the likeliest, of ties the lowest
    sample_probability: Tensor
    best_probability: Tensor
    second_probability: Tensor
    entropy: Tensor  # nats


class ChunkedDistribution(ChunkedVocabulary):
    """The distribution of M rows over the vocabulary, with a few chunks of its logits at a time.

    The sums are those of online softmax (arXiv 1805.02867) with a running maximum per column, which
    is elementwise.
    """

    def __init__(
        self, table: Tensor, soft_cap: float | None, mask_token: int, chunk_columns: int
    ) -> None:
        def excluded(tokens: Tensor) -> Tensor | None:
            return exclusion(tokens, table.shape[0], mask_token)

        in_product = excluded if soft_cap is None else lambda tokens: None
        super().__init__(table, soft_cap, chunk_columns, in_product, mask_token)
        for k in range(self.chunks):
            bias = None if soft_cap is None else excluded(self.chunk_tokens(k))
            self.register_buffer(f"excluded_{k}", None if bias is None else bias.view(1, -1))
        self.sum_fans = SumFans(self.columns // self.fan, self.fan)
        self.sum_moments = SumFans(self.columns // self.fan, self.fan)

    def forward(self, x: Tensor, gain: Tensor, uniform: Tensor) -> VocabularyStatistics:
        """x: [M, H]; gain: [1, 1], one over the temperature; uniform: [M, 1] in [0, 1)."""
        x = x * (gain if self.soft_cap is None else 1.0 / self.soft_cap)
        maxima, sums, weighted = self._walk(x, gain)

        column_max = accumulate(torch.maximum, maxima)
        best_column = torch.argmax(column_max, dim=1, keepdim=True)
        highest = torch.gather(column_max, 1, best_column)  # [M, 1]
        scales = [torch.exp(part - highest) for part in maxima]
        sums = [part * scale for part, scale in zip(sums, scales, strict=True)]
        weighted = [part * scale for part, scale in zip(weighted, scales, strict=True)]
        column_sums = accumulate(torch.add, sums)
        column_weighted = accumulate(torch.add, weighted)
        by_fan = self.sum_fans(column_sums)
        total = by_fan.sum(dim=1, keepdim=True)
        mean = self.sum_moments(column_weighted).sum(dim=1, keepdim=True) / total
        entropy = torch.relu(torch.log(total) + highest - mean)

        rest = uniform * total
        block, rest = self.descend_to_block(by_fan, column_sums, sums, rest)
        per_group = at_column(maxima, best_column)
        best_group = torch.argmax(per_group, dim=1, keepdim=True)

        tokens, valid = self.block_tokens(block)
        best_tokens, best_valid = self.block_tokens(Block(best_column, best_group))
        again = self._logits_of(x, torch.cat([tokens, best_tokens], dim=1), gain)
        below = again[:, : self.group_chunks] - highest
        weights = torch.exp(torch.clamp(below, max=0.0)) * valid.to(torch.float32)
        drawn, _ = descend(weights, rest)
        drawn = with_weight(drawn, weights)

        excluded = (1.0 - best_valid.to(torch.float32)) * EXCLUDED
        candidates = again[:, self.group_chunks :] + excluded
        best = torch.argmax(candidates, dim=1, keepdim=True)
        second = torch.maximum(
            torch.scatter(candidates, 1, best, EXCLUDED).amax(dim=1, keepdim=True),
            torch.maximum(
                torch.scatter(per_group, 1, best_group, EXCLUDED).amax(dim=1, keepdim=True),
                torch.scatter(column_max, 1, best_column, EXCLUDED).amax(dim=1, keepdim=True),
            ),
        )
        return VocabularyStatistics(
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
            top: Tensor | None = None
            total: Tensor | None = None
            moment: Tensor | None = None
            for first in range(start, end, CHUNKS_AT_ONCE):
                last = min(first + CHUNKS_AT_ONCE, end)
                logits = [self._logits(x, k, gain) for k in range(first, last)]
                before = top
                top = accumulate(torch.maximum, logits if before is None else [before, *logits])
                if before is not None:
                    correction = torch.exp(before - top)
                    total, moment = total * correction, moment * correction
                for value in logits:
                    exponential = torch.exp(value - top)
                    product = exponential * value
                    total = exponential if total is None else total + exponential
                    moment = product if moment is None else moment + product
                assert total is not None and moment is not None
                x = after(x, total[:, :1] + moment[:, :1])
            maxima.append(top)
            sums.append(total)
            weighted.append(moment)
        return maxima, sums, weighted

    def _logits(self, x: Tensor, k: int, gain: Tensor) -> Tensor:
        value = self.values(x, k)
        if self.soft_cap is None:
            return value
        value = value * (gain * self.soft_cap)
        excluded = getattr(self, f"excluded_{k}")
        return value if excluded is None else value + excluded

    def _logits_of(self, x: Tensor, tokens: Tensor, gain: Tensor) -> Tensor:
        """The walk's logits of tokens [M, R]; excluded ones are not marked."""
        value = self.values_of(x, tokens)
        return value if self.soft_cap is None else value * (gain * self.soft_cap)


class TruncatedDistribution(WholeVocabulary):
    """The distribution of M rows over the vocabulary after top-k and top-p, all logits held."""

    def forward(
        self, x: Tensor, gain: Tensor, uniform: Tensor, top_p: Tensor, top_k: Tensor
    ) -> VocabularyStatistics:
        """Statistics of the distribution that top-k and top-p leave; see `ChunkedDistribution`."""
        logits = self.logits(x)
        best = torch.argmax(logits, dim=1, keepdim=True)
        below = (logits - torch.gather(logits, 1, best)) * gain
        weights = truncate(torch.exp(below), top_p, top_k, self.ones)
        sample, total = self.draw(weights, uniform)
        moment = self.sum_moments(weights * below).sum(dim=1, keepdim=True)
        return VocabularyStatistics(
            sample=sample,
            best=best,
            sample_probability=torch.gather(weights, 1, sample) / total,
            best_probability=1.0 / total,
            second_probability=torch.scatter(weights, 1, best, 0.0).amax(dim=1, keepdim=True)
            / total,
            entropy=torch.relu(torch.log(total) - moment / total),
        )


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
        check_table(table, soft_cap, chunk_columns)
        if not 0 <= mask_token < table.shape[0]:
            raise ValueError(
                f"mask_token is {mask_token}; it must be one of the {table.shape[0]} tokens"
            )
        self.hidden_size = table.shape[1]
        self.truncation = truncation
        self.vocabulary = (
            TruncatedDistribution(table, soft_cap, mask_token)
            if truncation
            else ChunkedDistribution(table, soft_cap, mask_token, chunk_columns)
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
            found = self.vocabulary(
                x, inverse_temperature(settings), uniform, settings[1:2], settings[2:3]
            )
        else:
            found = self.vocabulary(x, inverse_temperature(settings), uniform)
        sampled = settings[0:1] > 0.0
        token = torch.where(sampled, found.sample, found.best)
        confidence = torch.where(sampled, found.sample_probability, found.best_probability)
        margin = torch.relu(found.best_probability - found.second_probability)
        entropy = found.entropy.view(count)
        score = masked.score(confidence.view(count), entropy, margin.view(count), settings[4:5])
        accepted = masked.accept(score, quota, settings[3:4])
        return token.view(count), accepted.to(torch.int64), score, entropy
