"""A random transformer in two forms: plain, with an explicit mask, and as the loops' stage.

The plain form is for references that recompute everything; it shares weights with the stage and
nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from export.backends import LoweredStage, lower_stage, tensor_spec
from export.contract.bundle import Bundle, write_bundle
from export.contract.manifest import (
    Decoding,
    Delegation,
    Experts,
    Manifest,
    ModelInfo,
    Sampler,
    SpecialTokens,
    Stage,
    StyleName,
    TensorSpec,
)
from export.exporter import describe_stage
from export.models.head_stages import autoregressive_head_stage, masked_head_stage
from export.models.staging import StagedModel, StageModule

VOCABULARY, HIDDEN, HEADS, LAYERS, CONTEXT = 37, 16, 2, 2, 64
MASK_TOKEN = 36
SPECIAL = SpecialTokens(eos=(1,), pad=0)
NO_END = SpecialTokens(eos=(), pad=None)

Cache = list[tuple[Tensor, Tensor]]


class Weights(nn.Module):
    """Embeddings of tokens and positions, attention without norms, a tanh MLP."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, scale: float = 1.0) -> nn.Parameter:
            values = scale * torch.randn(*shape, generator=generator)
            return nn.Parameter(values, requires_grad=False)

        self.table = random(VOCABULARY, HIDDEN)
        self.places = random(CONTEXT, HIDDEN)
        # Small, so that probabilities stay far enough from 1 for fp32 to tell them apart.
        self.head = random(VOCABULARY, HIDDEN, scale=0.1)
        scale = HIDDEN**-0.5
        for layer in range(LAYERS):
            for name in "qkvou":
                setattr(self, f"{name}{layer}", random(HIDDEN, HIDDEN, scale=1.5 * scale))

    def of(self, name: str, layer: int) -> Tensor:
        return getattr(self, f"{name}{layer}")


def plain_hidden(
    weights: Weights, tokens: Tensor, visible: Tensor, past: Cache | None = None
) -> tuple[Tensor, Cache]:
    """Hidden states `[N, H]` of `tokens` `[N]` behind the keys and values of `past`.

    visible: `[N, P + N]` bool, what each sees of past and tokens.
    """
    before = past[0][0].shape[0] if past else 0
    x = weights.table[tokens] + weights.places[before : before + len(tokens)]
    present: Cache = []
    size = HIDDEN // HEADS
    for layer in range(LAYERS):
        q, k, v = (x @ weights.of(name, layer) for name in "qkv")
        if past:
            k, v = torch.cat([past[layer][0], k]), torch.cat([past[layer][1], v])
        present.append((k, v))
        mixed = []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            scores = q[:, part] @ k[:, part].T / math.sqrt(size)
            scores = scores.masked_fill(~visible, float("-inf"))
            mixed.append(torch.softmax(scores, dim=-1) @ v[:, part])
        x = x + torch.cat(mixed, dim=1) @ weights.of("o", layer)
        x = x + torch.tanh(x @ weights.of("u", layer))
    return x, present


def plain_logits(weights: Weights, tokens: Tensor, visible: Tensor) -> Tensor:
    """Logits `[N, V]`, everything computed anew."""
    return plain_hidden(weights, tokens, visible)[0] @ weights.head.T


class TinyLayers(nn.Module):
    """The same weights as a stage with a KV cache."""

    def __init__(self, weights: Weights, prefill_length: int = CONTEXT) -> None:
        super().__init__()
        self.weights = weights
        for layer in range(LAYERS):
            for name in ("key", "value"):
                shape = (HEADS, CONTEXT, HIDDEN // HEADS)
                self.register_buffer(f"{name}_cache{layer}", torch.zeros(shape))
        self.register_buffer("offsets", torch.arange(prefill_length))
        self.register_buffer("key_positions", torch.arange(CONTEXT))

    def forward(self, tokens: Tensor, start: Tensor, block_length: Tensor) -> Tensor:
        weights, rows, size = self.weights, tokens.shape[1], HIDDEN // HEADS
        positions = start + self.offsets[:rows]
        last = (positions // block_length + 1) * block_length
        last = torch.minimum(last, start + rows)
        mask = torch.where(self.key_positions < last.unsqueeze(-1), 0.0, -1e4)
        x = torch.nn.functional.embedding(tokens, weights.table).view(rows, HIDDEN)
        x = x + torch.index_select(weights.places, 0, positions)
        for layer in range(LAYERS):
            keys = getattr(self, f"key_cache{layer}")
            values = getattr(self, f"value_cache{layer}")
            q, k, v = (
                (x @ weights.of(name, layer)).view(rows, HEADS, size).transpose(0, 1)
                for name in "qkv"
            )
            torch.ops.aten.index_put_(keys, [None, positions], k)
            torch.ops.aten.index_put_(values, [None, positions], v)
            scores = torch.bmm(q, keys.transpose(1, 2)) * size**-0.5 + mask
            mixed = torch.bmm(torch.softmax(scores, dim=-1), values)
            mixed = mixed.transpose(0, 1).reshape(rows, HIDDEN)
            x = x + mixed @ weights.of("o", layer)
            x = x + torch.tanh(x @ weights.of("u", layer))
        return x.unsqueeze(0)


def layers_stage(weights: Weights, prefill_length: int) -> StageModule:
    """TinyLayers for calls of up to `prefill_length` rows."""
    return StageModule(
        name="layers",
        role="layers",
        module=TinyLayers(weights, prefill_length).eval(),
        example_inputs=(
            torch.zeros(1, prefill_length, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
            torch.ones(1, dtype=torch.int64),
        ),
        input_names=("tokens", "start", "block_length"),
        output_names=("hidden",),
        mutates_buffers=True,
        dynamic={"tokens": {1: "tokens"}},
    )


def staged(
    weights: Weights,
    style: StyleName,
    *,
    canvas_length: int = 1,
    special: SpecialTokens = NO_END,
    settings: dict[str, float] | None = None,
    **decoding: Any,
) -> StagedModel:
    """The whole model of either style; `decoding` as in `Decoding`."""
    is_masked = style == "masked_diffusion"
    fields = {"prefill_length": CONTEXT, "shift": 0 if is_masked else 1} | decoding
    if is_masked:
        fields = {"mask_token": MASK_TOKEN} | fields
        settings = {"steps_per_canvas": canvas_length} | (settings or {})
        head = masked_head_stage(
            weights.head,
            fields["prefill_length"],
            canvas_length,
            HIDDEN,
            mask_token=MASK_TOKEN,
            truncation=False,
        )
    else:
        head = autoregressive_head_stage(
            weights.head, fields["prefill_length"], HIDDEN, truncation=False
        )
    return StagedModel(
        info=ModelInfo("tiny", "tiny", VOCABULARY, HIDDEN, canvas_length, CONTEXT),
        style=style,
        sampler=Sampler("masked" if is_masked else style, settings or {}),
        special_tokens=special,
        experts=Experts(),
        stages=(layers_stage(weights, fields["prefill_length"]), head),
        decoding=Decoding(**fields),
    )


def lowered_bundle(model: StagedModel, folder: Path) -> Bundle:
    """The model as a bundle for XNNPACK; half a minute."""
    return _bundle(model, folder, lambda stage: lower_stage(stage, "xnnpack"))


def hollow_bundle(model: StagedModel, folder: Path) -> Bundle:
    """The model as a bundle that says what it holds, and holds no programs."""

    def pretend(stage: StageModule) -> LoweredStage:
        values = stage.module(*stage.example_inputs)
        values = values if isinstance(values, tuple) else (values,)
        return LoweredStage(
            write=lambda path: path.write_bytes(b"nothing") and None,
            outputs=tuple(
                tensor_spec(name, value.dtype, value.shape)
                for name, value in zip(stage.output_names, values, strict=True)
            ),
            delegation=Delegation(0, {}, {}),
        )

    return _bundle(model, folder, pretend)


def _bundle(
    model: StagedModel, folder: Path, lower: Callable[[StageModule], LoweredStage]
) -> Bundle:
    stages: list[Stage] = []
    for stage in model.stages:
        lowered = lower(stage)
        lowered.write(folder / f"{stage.name}.pte")
        stages.append(describe_stage(stage, lowered, "xnnpack"))
    manifest = Manifest(
        model=model.info,
        style=model.style,
        sampler=model.sampler,
        special_tokens=model.special_tokens,
        stages=tuple(stages),
        versions={},
        decoding=model.decoding,
        schedule=model.schedule,
    )
    files = {stage.file: folder / stage.file for stage in stages}
    return write_bundle(folder / "bundle", manifest, files)


def with_stage(bundle: Bundle, index: int, change: Callable[[Stage], Stage]) -> Bundle:
    """The bundle with one stage of its manifest replaced."""
    stages = list(bundle.manifest.stages)
    stages[index] = change(stages[index])
    return replace(bundle, manifest=replace(bundle.manifest, stages=tuple(stages)))


def resized(stage: Stage, name: str, shape: tuple[int, ...]) -> Stage:
    """The stage with another shape of one of its inputs."""

    def change(spec: TensorSpec) -> TensorSpec:
        return replace(spec, shape=shape) if spec.name == name else spec

    return replace(stage, inputs=tuple(map(change, stage.inputs)))
