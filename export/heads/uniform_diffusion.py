"""The head of uniform diffusion: from hidden states to the next canvas.

It knows neither the model before it nor the loop around it, and no canvas of logits is ever held:
the vocabulary is walked in chunks. Per logit the walk costs, beside the two matrix products, a
tanh, an exp and six multiplications or additions (`benchmarks/vocabulary_head.py` measures them).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from export.heads.samplers import entropy_bound
from export.heads.vocabulary import (
    CHUNK_COLUMNS,
    Block,
    ChunkedVocabulary,
    Linear,
    accumulate,
    after,
    at_column,
    check_table,
    descend,
)

_HIGHEST_SUM = 80.0
"""Largest exponent that a sum over the vocabulary may reach: exp(88.7) is the fp32 maximum."""

_LOWEST = -80.0
"""Exponents are cut here: below lie denormals, whose inverse (a quantization scale) is infinite."""

_HEADROOM = 40.0
"""How far a row's largest exponent may lie under zero: exp(_LOWEST) is then 1e-17 of it."""

_PADDING_LOGIT = -1.0e4
"""Raw logit of a padding row: far below any real one, also where there is no soft cap."""


class DiffusionHead(ChunkedVocabulary):
    """Soft-capped, tempered softmax over a tied vocabulary, with the entropy-bound sampler.

    A quantized table multiplies int8 dynamic activations, and for the soft embedding (softmax @
    table) probabilities in int8 per position and chunk multiply the table in int8 per hidden unit
    and chunk.

    Args:
        table: embedding table tied with the head, [V, H]: fp32, or a torchao
            `IntxUnpackedToInt8Tensor` (int8 per row, or int4 in groups along H).
        soft_cap: logits are `soft_cap * tanh(raw / soft_cap)`; None for no cap.
        canvas_length: T.
        chunk_columns: at most this many logits per position are held at once.

    Raises:
        ValueError: a shape or a size without meaning, with the value seen.
    """

    def __init__(
        self,
        table: Tensor,
        *,
        soft_cap: float | None,
        canvas_length: int,
        chunk_columns: int = CHUNK_COLUMNS,
    ) -> None:
        check_table(table, soft_cap, chunk_columns)
        if canvas_length < 1:
            raise ValueError(f"canvas_length is {canvas_length}; it must be at least 1")
        super().__init__(table, soft_cap, chunk_columns, self._padding_bias)
        self.canvas_length = canvas_length
        self.highest = _HIGHEST_SUM - math.log(self.vocabulary)
        self.padding_value = _PADDING_LOGIT if soft_cap is None else -1.0
        self.soft_chunks = nn.ModuleList(
            self._soft_chunk(chunk.weight) for chunk in self.logit_chunks
        )
        tokens = torch.stack([self.chunk_tokens(k) for k in range(self.chunks)], dim=1)
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
        first = self.values(hidden, 0)
        shift = self._shift(first, gain)
        sums, maxima, weighted, soft = self._walk(hidden, first, gain, shift)

        block_max = accumulate(torch.maximum, maxima)
        last = block_max[:, :1] + weighted[:, :1] + soft[:, :1]
        block_sums = after(accumulate(torch.add, sums), last)
        fans = block_sums.reshape(self.canvas_length, -1, self.fan)
        fan_sums = F.linear(fans, self.fan_row).squeeze(2)
        total = fan_sums.sum(dim=1, keepdim=True)  # [T, 1]
        rest = uniform.reshape(-1, 1) * total
        sample_block, rest = self.descend_to_block(fan_sums, block_sums, sums, rest)
        best_column = torch.argmax(block_max, dim=1, keepdim=True)
        best_group = torch.argmax(at_column(maxima, best_column), dim=1, keepdim=True)

        sample_tokens, sample_valid = self.block_tokens(sample_block)
        best_tokens, best_valid = self.block_tokens(Block(best_column, best_group))
        tokens = torch.cat([sample_tokens, best_tokens, targets.reshape(-1, 1)], dim=1)
        again = self.values_of(hidden, tokens)  # [T, 2R + 1], before the gain
        rows = self.group_chunks
        exponentials = self._exponentials(again[:, :rows], gain, shift)
        exponentials = exponentials * sample_valid.to(torch.float32)
        draw, _ = descend(exponentials, rest)
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
        weighted: Tensor | None = None
        soft: Tensor | None = None
        for k in range(self.chunks):
            value = first if soft is None else self.values(after(hidden, soft[:, :1]), k)
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

    def fan_columns(self, fan: Tensor) -> Tensor:
        """See `ChunkedVocabulary`. The reshape keeps programs the bytes that they have been."""
        return super().fan_columns(fan).reshape(-1, self.fan)

    def _padding_bias(self, tokens: Tensor) -> Tensor | None:
        padding = tokens >= self.vocabulary
        return torch.where(padding, _PADDING_LOGIT, 0.0) if bool(padding.any()) else None

    def _soft_chunk(self, weight: Tensor) -> Linear:
        if not self.int8_activations:
            return Linear(weight.t().contiguous(), None)
        columns = weight.dequantize().t().contiguous()
        transposed = IntxUnpackedToInt8Tensor.from_hp(
            columns,
            (1, self.columns),
            torch.int8,
            activation_quantization="int8_asym_per_token",
        )
        return Linear(transposed, None)
