"""A stage that runs several times in a pass, each time with a slot of its cache."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs
from torch import Tensor, nn

from export.contract.manifest import Call
from export.host.bundle_engine import open_engine
from export.host.eager import eager_engine
from export.models.staging import StagedModel, StageModule
from quantize.errors import BundleError
from tests.support.tiny_decoder import (
    CONTEXT,
    HIDDEN,
    SPECIAL,
    VOCABULARY,
    Weights,
    hollow_bundle,
    lowered_bundle,
    staged,
)


@functools.cache
def weights() -> Weights:
    return Weights(5)


def prompt_of(length: int) -> list[int]:
    return np.random.default_rng(0).integers(2, VOCABULARY, length).tolist()


SLOTS = 3


class Embed(nn.Module):
    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.embedding(tokens, self.table)


class Stack(nn.Module):
    """Adds the mean of what the slot's earlier inputs were, turned by one matrix for all slots."""

    def __init__(self, table: Tensor, rows: int) -> None:
        super().__init__()
        self.register_buffer("turn", table[:HIDDEN].clone())
        self.register_buffer("cache", torch.zeros(1, SLOTS * CONTEXT, HIDDEN))
        self.register_buffer("offsets", torch.arange(rows))
        self.register_buffer("keys", torch.arange(CONTEXT))

    def forward(self, state: Tensor, slot: Tensor, start: Tensor, block_length: Tensor) -> Tensor:
        rows = state.shape[1]
        positions = start + self.offsets[:rows]
        x = state.view(rows, HIDDEN)
        # ExecuTorch writes in place along one axis only.
        first = slot * CONTEXT
        torch.ops.aten.index_put_(self.cache, [None, first + positions], x.unsqueeze(0))
        held = torch.index_select(self.cache, 1, first + self.keys)
        last = (positions // block_length).unsqueeze(-1)
        sees = (self.keys // block_length <= last).to(torch.float32)
        total = torch.bmm(sees.unsqueeze(0), held).view(rows, HIDDEN)
        mean = total / (positions + 1).to(torch.float32).unsqueeze(-1)
        return torch.tanh(x + torch.mm(mean, self.turn)).view(1, rows, HIDDEN)


def scheduled(prefill_length: int = 8) -> StagedModel:
    """Embedding, then one stack three times, each time with a slot of its cache."""
    model = staged(weights(), "autoregressive", prefill_length=prefill_length, special=SPECIAL)
    table = weights().table
    number = torch.zeros(1, dtype=torch.int64)
    embed = StageModule(
        "embed", "layers", Embed(table), (torch.zeros(1, prefill_length, dtype=torch.int64),),
        ("tokens",), ("state",), dynamic={"tokens": {1: "tokens"}},
    )  # fmt: skip
    stack = StageModule(
        "stack", "layers", Stack(table, prefill_length),
        (torch.zeros(1, prefill_length, HIDDEN), number, number, number + 1),
        ("state", "slot", "start", "block_length"), ("state",), mutates_buffers=True,
        dynamic={"state": {1: "tokens"}},
    )  # fmt: skip
    calls = [
        Call("embed", outputs={"state": "a"}),
        Call("stack", {"state": "a"}, {"state": "b"}, {"slot": 0}),
        Call("stack", {"state": "b"}, {"state": "a"}, {"slot": 1}),
        Call("stack", {"state": "a"}, {"state": "hidden"}, {"slot": 2}),
    ]
    return replace(model, stages=(embed, stack, model.stages[-1]), schedule=tuple(calls))


def plain_scheduled(prompt: list[int], count: int) -> list[int]:
    table, tokens = weights().table, list(prompt)
    for _ in range(count):
        x = table[torch.tensor(tokens)]
        counts = torch.arange(1, len(tokens) + 1)[:, None]
        for _slot in range(SLOTS):
            x = torch.tanh(x + (x.cumsum(0) / counts) @ table[:HIDDEN])
        tokens.append(int((x[-1] @ weights().head.T).argmax()))
    return tokens[len(prompt) :]


def test_a_schedule_runs_one_stage_several_times() -> None:
    prompt = prompt_of(19)
    found = eager_engine(scheduled()).session().generate(prompt, 16, force_steps=1)
    assert list(found.tokens) == plain_scheduled(prompt, 16)


@pytest.mark.slow
def test_a_bundle_with_a_schedule_gives_the_tokens_of_the_eager_model(tmp_path: Path) -> None:
    bundle = lowered_bundle(scheduled(), tmp_path)
    ours = open_engine(bundle, threads=1).session()
    for length in (19, 1):
        ours.truncate(0)
        found = ours.generate(prompt_of(length), 16, force_steps=1)
        assert list(found.tokens) == plain_scheduled(prompt_of(length), 16)


BAD_SCHEDULES: dict[str, tuple[dict[int, Call], str]] = {
    "a head in the pass": ({0: Call("head")}, "schedules the stage head, which is its head"),
    "a value that nothing gives": (
        {1: Call("stack", {"state": "c"}, {}, {"slot": 0})},
        "takes c, which nothing before it gives",
    ),
    "a constant of no input": (
        {1: Call("stack", {"state": "a"}, {"state": "b"}, {"slot": 0, "depth": 1})},
        "a tensor 'depth', which it does not have",
    ),
    "a constant for a large input": (
        {1: Call("stack", {}, {"state": "b"}, {"slot": 0, "state": 1})},
        r"takes state as float32 \[1, 8, 16\] and is given int64 \[1\]",
    ),
    "a value of another shape": (
        {1: Call("stack", {"state": "a", "slot": "a"}, {"state": "b"})},
        r"takes slot as int64 \[1\] and is given float32",
    ),
    "no hidden states": ({3: Call("stack", {"state": "a"}, {}, {"slot": 2})}, "not understand"),
}


@pytest.mark.parametrize("case", BAD_SCHEDULES)
def test_a_schedule_that_cannot_run_is_refused(case: str, tmp_path: Path) -> None:
    changes, says = BAD_SCHEDULES[case]
    bundle = hollow_bundle(scheduled(), tmp_path)
    calls = tuple(changes.get(i, call) for i, call in enumerate(bundle.manifest.schedule))
    changed = structs.replace(bundle, manifest=structs.replace(bundle.manifest, schedule=calls))
    with pytest.raises(BundleError, match=says) as caught:
        open_engine(changed)
    assert "\n" not in str(caught.value)
