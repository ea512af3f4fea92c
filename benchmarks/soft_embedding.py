"""How far an int8 soft embedding lies from softmax @ table, by the shape of the distribution.

    python -m benchmarks.soft_embedding

Runs in eager mode, on a table of normal numbers quantized to int8 per row. Columns, all relative
errors of the soft embedding (median over positions):

chunked     as the head does: int8 probabilities per position and chunk, int8 table per hidden unit
whole       the same with one chunk for the whole vocabulary
table       for comparison: the error that quantizing the table itself makes
next layer  for comparison: the soft embedding in int8, as the linear layer that reads it rounds it

stdout: a table for people; the last line is one JSON document.
"""

import json
import math

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchao.quantization import IntxUnpackedToInt8Tensor

from export.heads.uniform_diffusion import DiffusionHead
from export.heads.vocabulary import round_to_int8

VOCABULARY, HIDDEN, POSITIONS, CHUNK_COLUMNS = 262_144, 512, 8, 2048
SEED = 20261123


def main() -> None:
    generator = torch.Generator().manual_seed(SEED)
    plain = torch.randn(VOCABULARY, HIDDEN, generator=generator) * 0.04
    quantized = IntxUnpackedToInt8Tensor.from_hp(plain, (1, HIDDEN), torch.int8)
    table = quantized.dequantize()
    heads = {
        name: DiffusionHead(
            quantized, soft_cap=30.0, canvas_length=POSITIONS, chunk_columns=columns
        )
        for name, columns in (("chunked", CHUNK_COLUMNS), ("whole", VOCABULARY))
    }
    rows = []
    for name, logits in _distributions(generator):
        probabilities = torch.softmax(logits, dim=1)
        exact = probabilities.double() @ table.double()
        errors = {key: _relative(_soft(head, probabilities), exact) for key, head in heads.items()}
        errors["table"] = _relative(probabilities.double() @ plain.double(), exact)
        errors["next layer"] = _relative(round_to_int8(exact.float()), exact)
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
        rows.append({"distribution": name, "entropy_nats": round(entropy, 2), **errors})
    view = Table(title=f"relative error, vocabulary {VOCABULARY}, hidden {HIDDEN}")
    for column in rows[0]:
        view.add_column(column, justify="left" if column == "distribution" else "right")
    for row in rows:
        cells = list(row.values())
        view.add_row(cells[0], f"{cells[1]:.2f}", *(f"{cell:.4f}" for cell in cells[2:]))
    Console(width=100).print(view)
    print(json.dumps({"benchmark": "soft_embedding", "rows": rows}, separators=(",", ":")))


def _distributions(generator: torch.Generator):  # -> Iterator[tuple[str, Tensor]]
    def noise(spread: float) -> Tensor:
        return torch.randn(POSITIONS, VOCABULARY, generator=generator) * spread

    for spread in (1, 3, 6, 10):
        yield f"normal logits, spread {spread}", noise(spread)
    for count, share in ((1, 0.5), (1, 0.99), (10, 0.9), (100, 0.9)):
        logits = noise(1)
        each = math.log(share / (1 - share) / count)
        tokens = torch.randperm(VOCABULARY, generator=generator)[:count]
        logits[:, tokens] = torch.logsumexp(logits, dim=1, keepdim=True) + each
        yield f"{count} of {share} in all, rest spread", logits


def _soft(head: DiffusionHead, probabilities: Tensor) -> Tensor:
    return sum(
        product(probabilities[:, k :: head.chunks]) for k, product in enumerate(head.soft_chunks)
    )


def _relative(value: Tensor, exact: Tensor) -> float:
    return ((value - exact).norm(dim=1) / exact.norm(dim=1)).median().item()


if __name__ == "__main__":
    main()
