"""What the tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that can be quantized in a moment: three small linears."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "none"}')
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"model.layers.{i}.self_attn.q_proj.weight": torch.randn(32, 64, generator=generator)
        for i in range(3)
    }
    save_file(weights, folder / "model.safetensors")
    return folder
