"""The table of readers, by the `model_type` of a config.json: each gives a `ModelShape`.

The readers state sizes only; what else a checkpoint may not have is refused by `export.models`
when it is exported. `tests/export/families/test_plan_shapes.py` holds their weights against the
exporter's modules and transformers' models.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from export.families.shapes import ModelShape
from quantize.errors import CheckpointError

READERS = {
    "diffusion_gemma": "export.families.diffusion_gemma",
    "gemma4": "export.families.gemma4",
    "gemma4_text": "export.families.gemma4",
    "hrm_text": "export.families.hrm_text",
    "llama": "export.families.dense",
    "qwen2": "export.families.dense",
    "qwen3": "export.families.dense",
    "Dream": "export.families.dense",
    "Fast_dLLM_Qwen": "export.families.dense",
    "a2d-llama": "export.families.dense",
    "a2d-qwen2": "export.families.dense",
    "a2d-qwen3": "export.families.dense",
    "llada": "export.families.dense",
    "sdar": "export.families.dense",
}
"""Each module has `read_shape(config) -> ModelShape`."""


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes.

    Raises CheckpointError for a model_type that no family has, and for a field that is missing or
    cannot be.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in READERS:
        raise CheckpointError(
            f"config.json has model_type {kind!r}; supported: {', '.join(sorted(READERS))}"
        )
    return import_module(READERS[kind]).read_shape(config)
