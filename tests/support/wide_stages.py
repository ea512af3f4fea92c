"""A random autoregressive model cut into stages whose weights outweigh all else, for XNNPACK.

Its text depends on every weight: each stage is a wide tanh MLP over the rows. No attention and no
cache, so that lowering takes seconds.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from export.contract.bundle import Bundle
from export.contract.manifest import Decoding, Experts, ModelInfo, Sampler, SpecialTokens
from export.models.head_stages import autoregressive_head_stage
from export.models.staging import StagedModel, StageModule
from tests.support.tiny_decoder import lowered_bundle

VOCABULARY, HIDDEN, WIDE, PREFILL, CONTEXT = 64, 256, 4096, 8, 64
STAGE_BYTES = 2 * HIDDEN * WIDE * 4
LAYERS = ("first", "second", "third", "fourth", "fifth")
PROMPT = [3, 17, 9, 33, 5]


class Mlp(nn.Module):
    """Rows `[1, N, H]` through a wide MLP. The factor is a tensor: XNNPACK takes it along without
    packing it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.up = nn.Linear(HIDDEN, WIDE, bias=False)
        self.down = nn.Linear(WIDE, HIDDEN, bias=False)
        for layer in (self.up, self.down):
            values = torch.randn(layer.weight.shape, generator=generator)
            layer.weight = nn.Parameter(values * HIDDEN**-0.5, requires_grad=False)
        self.register_buffer("factor", torch.tensor([0.37]))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.down(torch.tanh(self.up(x)) * self.factor))


class FirstMlp(Mlp):
    """The same behind the embedding, which mixes each row with the mean of all."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        generator = torch.Generator().manual_seed(seed + 100)
        self.register_buffer("table", torch.randn(VOCABULARY, HIDDEN, generator=generator))

    def forward(self, tokens: Tensor, start: Tensor, block_length: Tensor) -> Tensor:
        x = torch.nn.functional.embedding(tokens, self.table)
        place = torch.sin(start.to(torch.float32) * block_length.to(torch.float32))
        return super().forward(x + x.mean(1, keepdim=True) + place)


def staged() -> StagedModel:
    """The model as a family would build it."""
    rows = torch.zeros(1, PREFILL, HIDDEN)
    tokens = torch.zeros(1, PREFILL, dtype=torch.int64)
    one = torch.ones(1, dtype=torch.int64)
    generator = torch.Generator().manual_seed(7)
    first = StageModule(
        name=LAYERS[0],
        role="layers",
        module=FirstMlp(0).eval(),
        example_inputs=(tokens, one, one),
        input_names=("tokens", "start", "block_length"),
        output_names=("hidden",),
        dynamic={"tokens": {1: "tokens"}},
    )
    others = tuple(
        StageModule(
            name=name,
            role="layers",
            module=Mlp(seed).eval(),
            example_inputs=(rows,),
            input_names=("hidden",),
            output_names=("hidden",),
            dynamic={"hidden": {1: "tokens"}},
        )
        for seed, name in enumerate(LAYERS[1:], start=1)
    )
    head = autoregressive_head_stage(
        0.25 * torch.randn(VOCABULARY, HIDDEN, generator=generator), PREFILL, HIDDEN,
        truncation=False,
    )  # fmt: skip
    return StagedModel(
        info=ModelInfo("wide", "wide", VOCABULARY, HIDDEN, 1, CONTEXT),
        style="autoregressive",
        sampler=Sampler("autoregressive", {}),
        special_tokens=SpecialTokens(),
        experts=Experts(),
        stages=(first, *others, head),
        decoding=Decoding(prefill_length=PREFILL, shift=1),
    )


def make_bundle(folder: Path) -> Bundle:
    """The model lowered; some ten seconds."""
    return lowered_bundle(staged(), folder)
