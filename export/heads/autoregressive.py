"""The head of autoregressive decoding: from one hidden state to the next token.

It knows neither the model before it nor the loop around it.
"""

import torch
from torch import Tensor, nn

from export.heads.samplers.truncation import truncate
from export.heads.vocabulary import CHUNK_COLUMNS, WholeVocabulary, check_table, inverse_temperature


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
        check_table(table, soft_cap, CHUNK_COLUMNS)
        self.hidden_size = table.shape[1]
        self.truncation = truncation
        self.vocabulary = WholeVocabulary(table, soft_cap, None)

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
        weights = torch.exp(below * inverse_temperature(settings))
        if self.truncation:
            weights = truncate(weights, settings[1:2], settings[2:3], self.vocabulary.ones)
        sample, _ = self.vocabulary.draw(weights, uniform.view(1, 1))
        token = torch.where(settings[0:1] > 0.0, sample, best)
        log_prob = torch.gather(below, 1, token) - torch.log(total)
        return token.view(1), log_prob.view(1), entropy.view(1)
