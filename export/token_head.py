"""Heads that turn hidden states into tokens, for autoregressive and for masked decoding.

They know neither the model before them nor the loop around them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from export.samplers import masked, truncation
from export.staging import StageModule

AUTOREGRESSIVE_HEAD_INPUTS = ("hidden", "row", "settings", "uniform")
AUTOREGRESSIVE_HEAD_OUTPUTS = ("token", "log_prob", "entropy")
MASKED_HEAD_INPUTS = ("hidden", "rows", "settings", "quota", "uniform")
MASKED_HEAD_OUTPUTS = ("token", "accepted", "score", "entropy")

_EXCLUDED = -1.0e4
"""Logit of a token that is never sampled."""


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
        self.vocabulary, self.hidden_size = table.shape
        self.truncation = truncation
        self.soft_cap = soft_cap
        self.weight = nn.Parameter(_dynamic(table), requires_grad=False)

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
        logits = F.linear(x, self.weight)
        if self.soft_cap is not None:
            logits = torch.tanh(logits * (1.0 / self.soft_cap)) * self.soft_cap
        distance = logits.amax(dim=1, keepdim=True) - logits
        exponentials = torch.exp(-distance)
        total = exponentials.sum(dim=1, keepdim=True)
        entropy = torch.log(total) + (exponentials * distance).sum(dim=1, keepdim=True) / total
        temperature = settings[0:1]
        distance_tempered = distance / _divisor(temperature)
        weights = torch.exp(-distance_tempered)
        if self.truncation:
            kept = truncation.distances_kept(distance_tempered, settings[1:2], settings[2:3])
            weights = torch.where(distance_tempered <= kept, weights, torch.zeros_like(weights))
        sample = _draw(weights, uniform.view(1, 1))
        best = torch.argmax(logits, dim=1, keepdim=True)
        token = torch.where(temperature > 0.0, sample, best)
        log_prob = -torch.gather(distance, 1, token) - torch.log(total)
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
    ) -> None:
        super().__init__()
        _check(table, soft_cap)
        if not 0 <= mask_token < table.shape[0]:
            raise ValueError(
                f"mask_token is {mask_token}; it must be one of the {table.shape[0]} tokens"
            )
        self.vocabulary, self.hidden_size = table.shape
        self.truncation = truncation
        self.soft_cap = soft_cap
        self.weight = nn.Parameter(_dynamic(table), requires_grad=False)
        excluded = torch.zeros(1, self.vocabulary)
        excluded[0, mask_token] = _EXCLUDED
        self.register_buffer("excluded", excluded, persistent=False)

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
        logits = F.linear(x, self.weight)
        if self.soft_cap is not None:
            logits = torch.tanh(logits * (1.0 / self.soft_cap)) * self.soft_cap
        logits = logits + self.excluded
        temperature = settings[0:1]
        distance = (logits.amax(dim=1, keepdim=True) - logits) / _divisor(temperature)
        weights = torch.exp(-distance)
        if self.truncation:
            kept = truncation.distances_kept(distance, settings[1:2], settings[2:3])
            weights = torch.where(distance <= kept, weights, torch.zeros_like(weights))
        total = weights.sum(dim=1, keepdim=True)
        entropy = torch.log(total) + (weights * distance).sum(dim=1, keepdim=True) / total
        sample = _draw(weights, uniform.view(count, 1))
        best = torch.argmax(logits, dim=1, keepdim=True)
        token = torch.where(temperature > 0.0, sample, best)
        confidence = torch.gather(weights, 1, token) / total
        others = torch.scatter(weights, 1, best, 0.0)
        margin = (1.0 - others.amax(dim=1, keepdim=True)) / total
        score = masked.score(
            confidence.view(count), entropy.view(count), margin.view(count), settings[4:5]
        )
        accepted = masked.accept(score, quota, settings[3:4])
        return token.view(count), accepted.to(torch.int64), score, entropy.view(count)


def autoregressive_head_stage(
    table: Tensor,
    prefill_length: int,
    hidden_size: int,
    *,
    truncation: bool = True,
    soft_cap: float | None = None,
) -> StageModule:
    """The stage "head" of autoregressive decoding, for up to `prefill_length` rows of hidden."""
    return StageModule(
        name="head",
        role="head",
        module=AutoregressiveHead(table, truncation=truncation, soft_cap=soft_cap),
        example_inputs=(
            torch.zeros(1, prefill_length, hidden_size),
            torch.zeros(1, dtype=torch.int64),
            torch.tensor([0.0, 1.0, 0.0]),
            torch.full((1,), 0.5),
        ),
        input_names=AUTOREGRESSIVE_HEAD_INPUTS,
        output_names=AUTOREGRESSIVE_HEAD_OUTPUTS,
        dynamic={"hidden": {1: "tokens"}},
    )


def masked_head_stage(
    table: Tensor,
    prefill_length: int,
    canvas_length: int,
    hidden_size: int,
    *,
    mask_token: int,
    truncation: bool = True,
    soft_cap: float | None = None,
) -> StageModule:
    """The stage "head" of masked decoding: up to `canvas_length` + 1 of `prefill_length` rows."""
    rows = canvas_length + 1
    return StageModule(
        name="head",
        role="head",
        module=MaskedHead(table, mask_token=mask_token, truncation=truncation, soft_cap=soft_cap),
        example_inputs=(
            torch.zeros(1, prefill_length, hidden_size),
            torch.zeros(rows, dtype=torch.int64),
            torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0]),
            torch.ones(1, dtype=torch.int64),
            torch.full((rows,), 0.5),
        ),
        input_names=MASKED_HEAD_INPUTS,
        output_names=MASKED_HEAD_OUTPUTS,
        dynamic={"hidden": {1: "tokens"}, "rows": {0: "rows"}, "uniform": {0: "rows"}},
    )


def _divisor(temperature: Tensor) -> Tensor:
    """What logits are divided by: the temperature, 1 in place of 0."""
    return torch.where(temperature > 0.0, temperature, torch.ones_like(temperature))


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF in vocabulary order: weights [M, V], uniform [M, 1] -> [M, 1] int64."""
    cumulative = torch.cumsum(weights, dim=1)
    rest = uniform * cumulative[:, -1:]
    passed = (cumulative <= rest).to(torch.int64).sum(dim=1, keepdim=True)
    return torch.clamp(passed, max=weights.shape[1] - 1)


def _dynamic(table: Tensor) -> Tensor:
    """The table as the weight of a product with int8 dynamic activations, if it is quantized."""
    if not isinstance(table, IntxUnpackedToInt8Tensor):
        return table.to(torch.float32)
    return IntxUnpackedToInt8Tensor(
        qdata=table.qdata,
        scale=table.scale,
        zero_point=table.zero_point,
        target_dtype=table.target_dtype,
        block_size=table.block_size,
        dtype=table.dtype,
        activation_quantization="int8_asym_per_token",
    )


def _check(table: Tensor, soft_cap: float | None) -> None:
    if table.ndim != 2:
        raise ValueError(f"the table has shape {tuple(table.shape)}; it must be [V, H]")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap is {soft_cap}; it must be positive, or None for no cap")
