"""The table of model families, by the `model_type` of a config.json.

A family is described here once: `export.plan` reads its shape, `export.models` builds its graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from export.families.description import Description, PlainFiles
from export.families.fields import model_type_of
from export.families.shapes import ModelShape
from export.families.tokens import ModelFiles

FAMILIES = {
    "diffusion_gemma": "diffusion_gemma",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "hrm_text": "hrm_text",
    # Dense decoders: autoregressive ones, then those of masked diffusion.
    "llama": "dense",
    "qwen2": "dense",
    "qwen3": "dense",
    "Dream": "dense",
    "Fast_dLLM_Qwen": "dense",
    "a2d-llama": "dense",
    "a2d-qwen2": "dense",
    "a2d-qwen3": "dense",
    "llada": "dense",
    "sdar": "dense",
}
"""Of the family NAME, `export/families/NAME.py` has `describe(files, maximum_context)`, and
`export/models/NAME_stages.py` builds what it describes."""


def describe(files: ModelFiles, maximum_context: int | None = None) -> Description[Any]:
    """What a model's files say of it, its weights left unread.

    maximum_context: positions of the KV cache, canvas included; None: the family's default.

    Raises CheckpointError for a model_type that no family has, and for a field that is missing, or
    cannot be, or asks for a variant that is not built.
    """
    family = FAMILIES[model_type_of(files.config, FAMILIES)]
    found: Description[Any] = import_module(f"export.families.{family}").describe(
        files, maximum_context
    )
    return found


def read_shape(config: Mapping[str, Any], name: str = "") -> ModelShape:
    """The shape that a config.json alone describes; `name` is that of its folder.

    Raises what `describe` raises.
    """
    return describe(PlainFiles(Path(name), dict(config))).shape
