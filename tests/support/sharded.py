"""Weights in shards with their index, as Hugging Face folders have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"


def save_shards(folder: Path, shards: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write the weights of each file, and the index of them all."""
    for file, weights in shards.items():
        save_file(dict(weights), folder / file)
    weight_map = {name: file for file, weights in shards.items() for name in weights}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
