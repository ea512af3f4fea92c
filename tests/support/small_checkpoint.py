"""A small checkpoint of random weights: what is hard to quantize is in it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

LINEAR = "model.layers.0.self_attn.q_proj.weight"
EXPERTS = "model.layers.0.experts.down_proj"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"


def random_weight(*shape: int, seed: int) -> torch.Tensor:
    """Weights with what is hard to quantize: outliers, a row of zeros, a row of one sign."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator) * 0.02
    rows = weight.view(-1, shape[-1])
    rows[0, 0] = 3.0
    rows[1] = 0.0
    rows[2] = rows[2].abs() + 0.01
    return weight


def write_source(folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "made_up"}')
    save_file(tensors or small_tensors(), folder / "model.safetensors")
    return folder


def small_tensors() -> dict[str, torch.Tensor]:
    return {
        LINEAR: random_weight(24, 128, seed=0),
        EXPERTS: random_weight(4, 8, 128, seed=1),
        EMBEDDING: random_weight(32, 128, seed=2),
        NORM: torch.linspace(0.5, 1.5, 128).bfloat16(),
    }
