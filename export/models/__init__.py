"""Model graphs: a checkpoint's stages, built from what its family says of it.

`build_stages(request)` of `export/models/NAME_stages.py` builds the family NAME of
`export.families.FAMILIES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Literal

from export.contract.manifest import ModelInfo, Sampler
from export.families import FAMILIES, describe
from export.families.fields import model_type_of
from export.families.samplers import TRUNCATION
from export.families.tokens import mask_token_of, special_tokens_of
from quantize.checkpoint import Checkpoint
from quantize.errors import CheckpointError

if TYPE_CHECKING:
    from export.models.staging import StagedModel

CUT_FAMILIES = frozenset({"dense", "diffusion_gemma"})
"""Families whose layers can be cut into stages."""


def stage_model(
    checkpoint: Checkpoint,
    *,
    maximum_context: int | None = None,
    experts: Literal["auto", "dense", "gather"] = "auto",
    truncation: bool | None = None,
    layers_per_stage: int | None = None,
) -> StagedModel:
    """Build a checkpoint's stages with its weights loaded.

    Args:
        checkpoint: fp32 or int4.
        maximum_context: positions of the KV cache, canvas included; None: the family's default.
        experts: how a mixture of experts is computed; `auto` takes the cheaper by estimate.
        truncation: whether top-p and top-k are in the graph of the head, which costs time and
            memory; None: if the checkpoint's own settings use them.
        layers_per_stage: cut the layers into stages of so many, each with its own program; None:
            all layers are one stage.

    Raises:
        CheckpointError: an architecture that no family has, or a checkpoint that does not fit.
    """
    model_type = model_type_of(checkpoint.config, FAMILIES)
    if layers_per_stage is not None and FAMILIES[model_type] not in CUT_FAMILIES:
        can = sorted(kind for kind, family in FAMILIES.items() if family in CUT_FAMILIES)
        raise CheckpointError(
            f"the layers of {model_type} cannot be cut into stages of {layers_per_stage}; leave "
            f"that out, or take one of {', '.join(can)}"
        )
    description = describe(checkpoint, maximum_context)
    shape, tokens = description.shape, description.tokens
    sampler = _with_truncation(description.sampler, shape.truncation, truncation, model_type)
    mask_token = None
    if shape.style.masks:
        mask_token = mask_token_of(checkpoint, tokens, shape.vocabulary_size)
    special_tokens = special_tokens_of(checkpoint, tokens, shape.vocabulary_size)
    # Imported here: they import torchao, which the refusals above should not wait for.
    from export.models.building import BuildRequest
    from export.models.staging import StagedModel

    request = BuildRequest(checkpoint, description, sampler, mask_token, experts, layers_per_stage)
    built = import_module(f"export.models.{FAMILIES[model_type]}_stages").build_stages(request)
    return StagedModel(
        info=ModelInfo(
            family=shape.family,
            name=checkpoint.folder.resolve().name,
            vocabulary_size=shape.vocabulary_size,
            hidden_size=shape.hidden_size,
            canvas_length=shape.canvas_length,
            maximum_context=shape.default_context,
        ),
        style=shape.style.name,
        sampler=sampler,
        special_tokens=special_tokens,
        experts=built.experts,
        stages=built.stages,
        notes=(*description.notes, *built.notes, *_folder_notes(checkpoint)),
        decoding=description.decoding(mask_token),
        schedule=description.schedule,
    )


def _with_truncation(
    sampler: Sampler, is_used: bool, asked: bool | None, model_type: str
) -> Sampler:
    """The sampler with the settings that its graph heeds: top-p and top-k if they are in it."""
    if asked and not sampler.settings.keys() >= set(TRUNCATION):
        raise CheckpointError(
            f"the sampler of {model_type} has no top-p and top-k; leave out --truncation"
        )
    left_out = () if (is_used if asked is None else asked) else TRUNCATION
    kept = {name: value for name, value in sampler.settings.items() if name not in left_out}
    return Sampler(sampler.name, kept)


def _folder_notes(checkpoint: Checkpoint) -> list[str]:
    """What a folder brings that is not used: Python code, and a tokenizer in an older form."""
    folder, notes = checkpoint.folder, []
    if not (folder / "tokenizer.json").is_file() and (folder / "vocab.json").is_file():
        notes.append(
            "the tokenizer is given as vocab.json and merges.txt, which is not read: save it as "
            "tokenizer.json with transformers to give the bundle one"
        )
    if checkpoint.config.get("auto_map"):
        notes.append(
            "config.json names Python code of the checkpoint (auto_map): not needed, and not run"
        )
    return notes
