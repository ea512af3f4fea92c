"""A model with the signatures of the stages that is small enough to check by hand.

Layers: every position sees the sum of its own embedding and, scaled down, those of all cached
tokens it may see. Head: full logits at once, the sampler as the reference states it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.contract.manifest import Manifest, ModelInfo, Sampler, SpecialTokens, Stage, TensorSpec
from export.contract.styles.base import LAYERS_OUTPUTS
from export.contract.styles.uniform_diffusion import UniformDiffusion
from export.host.eager import eager_stage
from export.host.loops.uniform_diffusion import UniformDiffusionModel
from export.host.stages import LoadedStages
from export.models.staging import StageModule

INFO = ModelInfo(
    family="toy",
    name="toy",
    vocabulary_size=29,
    hidden_size=8,
    canvas_length=6,
    maximum_context=40,
)
SPECIAL = SpecialTokens(eos=(1,), pad=0, bos=2)
SETTINGS = {
    "max_steps": 5,
    "t_min": 0.4,
    "t_max": 0.8,
    "entropy_bound": 0.5,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
}


class ToyLayers(nn.Module):
    def __init__(self, info: ModelInfo = INFO, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(info.vocabulary_size, info.hidden_size, generator=generator)
        self.register_buffer("table", table)
        self.register_buffer("cache", torch.zeros(info.maximum_context, info.hidden_size))
        self.register_buffer("offsets", torch.arange(info.canvas_length))
        self.register_buffer("keys", torch.arange(info.maximum_context))

    def forward(self, tokens: Tensor, start: Tensor, denoise: Tensor, signal: Tensor) -> Tensor:
        own = torch.nn.functional.embedding(tokens.squeeze(0), self.table)
        positions = start + self.offsets
        torch.ops.aten.index_put_(self.cache, [positions], own)
        last = start + (self.offsets.shape[0] - 1)
        newest = torch.where(denoise == 1, last, positions).unsqueeze(-1)
        weights = (self.keys <= newest).to(torch.float32) / (1.0 + newest.to(torch.float32))
        seen = weights @ self.cache
        condition = signal.squeeze(0) * denoise.to(torch.float32)
        return (own + seen + 0.5 * condition).unsqueeze(0)


class ToyHead(nn.Module):
    def __init__(self, info: ModelInfo = INFO, seed: int = 0, sharpness: float = 2.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(info.vocabulary_size, info.hidden_size, generator=generator)
        self.register_buffer("table", table)
        self.register_buffer("ids", torch.arange(info.vocabulary_size))
        self.register_buffer("places", torch.arange(info.canvas_length))
        self.sharpness = sharpness

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
        temperature = settings[1] + (settings[2] - settings[1]) * step / settings[0]
        logits = self.sharpness * (hidden.squeeze(0) @ self.table.t()) / temperature
        log_probs = torch.log_softmax(logits, dim=-1)
        probs = log_probs.exp()
        entropy = -(probs * log_probs).sum(-1)
        argmax = logits.argmax(-1)
        below = (probs.cumsum(-1) <= uniform.squeeze(0).unsqueeze(-1)).to(torch.int64).sum(-1)
        sample = torch.clamp(below, max=self.ids.shape[0] - 1)
        mine, other = entropy.unsqueeze(-1), entropy.unsqueeze(0)
        tie = (other == mine) & (self.places.unsqueeze(0) < self.places.unsqueeze(-1))
        before = torch.where((other < mine) | tie, other, torch.zeros_like(other)).sum(-1)
        accepted = before <= settings[3]
        next_canvas = torch.where(accepted, sample, random_tokens.squeeze(0))
        unchanged = (argmax == previous_argmax.squeeze(0)).to(torch.int64).min()
        stable = (stable_steps + 1) * unchanged
        finished = (stable >= settings[4]) & (entropy.mean() < settings[5])
        picked = (self.ids == targets.squeeze(0).unsqueeze(-1)).to(torch.float32)
        target_log_prob = (log_probs * picked).sum(-1)
        signal = probs @ self.table
        return (
            next_canvas.unsqueeze(0),
            argmax.unsqueeze(0),
            entropy.unsqueeze(0),
            accepted.to(torch.int64).unsqueeze(0),
            stable,
            finished.to(torch.int64),
            target_log_prob.unsqueeze(0),
            signal.unsqueeze(0),
        )


def eager_model(layers: nn.Module, head: nn.Module, info: ModelInfo) -> UniformDiffusionModel:
    """Modules with the stages' signatures, run by PyTorch, as the loop calls them."""
    style = UniformDiffusion
    stages = (
        StageModule("layers", "layers", layers, (), style.layers_inputs, LAYERS_OUTPUTS),
        StageModule("head", "head", head, (), style.head_inputs, style.head_outputs),
    )
    first, last = map(eager_stage, stages)
    return UniformDiffusionModel(LoadedStages(info, [first], last))


def specs(names: tuple[str, ...], info: ModelInfo = INFO) -> tuple[TensorSpec, ...]:
    """The tensors of the contract between loop and stages, by name."""
    size = info.canvas_length
    wide = ("float32", (1, size, info.hidden_size))
    one, ids, reals = ("int64", (1,)), ("int64", (1, size)), ("float32", (1, size))
    table = {
        "tokens": ids, "start": one, "denoise": one, "signal": wide, "hidden": wide,
        "canvas": ids, "previous_argmax": ids, "stable_steps": one, "step": one,
        "settings": ("float32", (6,)), "uniform": reals, "random_tokens": ids, "targets": ids,
        "next_canvas": ids, "argmax": ids, "entropy": reals, "accepted": ids, "finished": one,
        "target_log_prob": reals,
    }  # fmt: skip
    return tuple(TensorSpec(name, *table[name]) for name in names)


def example_inputs(names: tuple[str, ...], info: ModelInfo = INFO) -> tuple[Tensor, ...]:
    """Zeros (a settings vector of ones) to export a stage with."""
    made = []
    for spec in specs(names, info):
        made.append(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)))
    return tuple(tensor + (name == "settings") for name, tensor in zip(names, made, strict=True))


def manifest(info: ModelInfo = INFO, **changes: object) -> Manifest:
    """The manifest of a toy bundle with the files layers.pte and head.pte."""
    fields = {
        "model": info,
        "style": "uniform_diffusion",
        "sampler": Sampler("entropy_bound", dict(SETTINGS)),
        "special_tokens": SPECIAL,
        "stages": (
            Stage("layers", "layers", "portable", "layers.pte",
                  specs(UniformDiffusion.layers_inputs, info), specs(("hidden",), info)),
            Stage("head", "head", "portable", "head.pte",
                  specs(UniformDiffusion.head_inputs, info),
                  specs(UniformDiffusion.head_outputs, info)),
        ),
        "versions": {"executorch": "1.5.1"},
    }  # fmt: skip
    return Manifest(**(fields | changes))


def lower(module: nn.Module, names: tuple[str, ...], info: ModelInfo = INFO) -> bytes:
    """The module as an ExecuTorch program of portable operators."""
    from executorch.exir import to_edge

    exported = torch.export.export(module.eval(), example_inputs(names, info), strict=True)
    return to_edge(exported).to_executorch().buffer
