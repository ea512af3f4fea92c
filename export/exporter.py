"""From a checkpoint to a bundle: stages built, lowered, checked, described and sealed."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import Literal

import msgspec

from export.backends import LoweredStage, find_backend, tensor_spec
from export.contract.bundle import Bundle, Progress, open_bundle, resumable_bundle
from export.contract.manifest import Manifest, Stage, TokenizerInfo, parse_stage
from export.contract.validation import VERSION
from export.host.process import return_large_blocks
from export.host.tokenizer import TokenizerFiles, tokenizer_files
from export.models import stage_model
from export.models.staging import StagedModel, StageModule
from quantize.checkpoint import open_checkpoint
from quantize.files.durable import sync
from quantize.files.journal import work_text

TOOL_CHAIN = ("executorch", "torch", "torchao")
TOKENIZER_FILE = "tokenizer.json"
TEMPLATES_FOLDER = ".templates"
"""Holds the programs that others are instantiated from, a folder a backend, until all are there."""


def export_bundle(
    source: str | Path,
    destination: str | Path,
    *,
    maximum_context: int | None = None,
    experts: Literal["auto", "dense", "gather"] = "auto",
    truncation: bool | None = None,
    layers_per_stage: int | None = None,
    backend: str = "xnnpack",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Lower a checkpoint folder into a bundle folder, which appears whole or not at all.

    A call that was killed or interrupted leaves a hidden folder beside it, from which the next call
    with the same source, options and versions goes on after the last whole stage.

    Args:
        source: Hugging Face folder, or an int4 folder of `quantize`.
        destination: the new bundle; replaced only with `overwrite`, and only if it is a bundle.
        maximum_context: positions of the KV cache, canvas included; None: the family's default.
        experts: how a mixture of experts is computed; `auto` takes the cheaper by estimate.
        truncation: whether top-p and top-k can be set; None: if the checkpoint's settings do.
        layers_per_stage: cut the layers into stages of so many, each with its own program, which
            are lowered once for each graph they have; None: all layers are one stage.
        backend: one of `export.backends.BACKENDS`.
        progress: called with (done, total, what); the unit is one piece of work.

    Raises:
        UserError: a checkpoint, tokenizer, option or destination that cannot be used, an operator
            that did not reach the backend, a full disk.
    """
    lowering = find_backend(backend)
    return_large_blocks()
    checkpoint = open_checkpoint(Path(source))
    tokenizer = tokenizer_files(checkpoint.folder)
    work = _work(
        checkpoint.folder, [maximum_context, experts, truncation, layers_per_stage, backend]
    )
    with resumable_bundle(destination, work, overwrite=overwrite) as (writer, journal):
        report = progress or (lambda done, total, what: None)
        report(0, 1, "loading the weights")
        model = stage_model(
            checkpoint,
            maximum_context=maximum_context,
            experts=experts,
            truncation=truncation,
            layers_per_stage=layers_per_stage,
        )
        if tokenizer is not None:
            _check_tokenizer(tokenizer, model)
            writer.path(TOKENIZER_FILE).write_bytes(tokenizer.file.read_bytes())
        templates = writer.folder / TEMPLATES_FOLDER
        described: dict[str, Stage] = {}
        for record in journal.records:
            found = parse_stage(record)
            described[found.name] = found
        total = len(model.stages) + 2
        for done, stage in enumerate(model.stages, start=1):
            report(done, total, f"lowering {stage.name}")
            if stage.name in described:
                continue
            if stage.template is None:
                lowered = lowering.lower(stage)
            else:
                lowered = lowering.instantiate(stage, templates / backend)
            described[stage.name] = describe_stage(stage, lowered, backend)
            path = writer.path(described[stage.name].file)
            lowered.write(path)
            sync(path)
            journal.append([msgspec.to_builtins(described[stage.name])])
        shutil.rmtree(templates, ignore_errors=True)
        report(total - 1, total, "sealing")
        writer.finish(
            Manifest(
                model=model.info,
                style=model.style,
                sampler=model.sampler,
                special_tokens=model.special_tokens,
                stages=tuple(described[stage.name] for stage in model.stages),
                versions=_versions(),
                experts=model.experts,
                tokenizer=(
                    None
                    if tokenizer is None
                    else TokenizerInfo(TOKENIZER_FILE, tokenizer.chat_template)
                ),
                recipe=None if checkpoint.recipe is None else _recipe_summary(checkpoint.recipe),
                notes=model.notes,
                decoding=model.decoding,
                schedule=model.schedule,
            )
        )
    return open_bundle(Path(destination), verify=False)


def _work(source: Path, options: list[object]) -> str:
    """A text that differs whenever the bundle could."""
    return work_text(
        (path for path in sorted(source.iterdir()) if path.is_file()),
        source=str(source.resolve()),
        options=options,
        versions=_versions(),
        schema_version=VERSION,
    )


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in TOOL_CHAIN}


def _check_tokenizer(tokenizer: TokenizerFiles, model: StagedModel) -> None:
    """Refuse a tokenizer of another model before the work, not on the phone."""
    tokenizer.open(model.info.vocabulary_size, model.special_tokens)


def describe_stage(stage: StageModule, lowered: LoweredStage, backend: str) -> Stage:
    """Return the stage as the manifest has it."""
    return Stage(
        name=stage.name,
        role=stage.role,
        backend=backend,
        file=f"{stage.name}.pte",
        inputs=tuple(
            tensor_spec(name, tensor.dtype, tensor.shape, stage.dynamic.get(name, ()))
            for name, tensor in zip(stage.input_names, stage.example_inputs, strict=True)
        ),
        outputs=lowered.outputs,
        delegation=lowered.delegation,
    )


def _recipe_summary(recipe: dict) -> dict:
    """The recipe without its table of every tensor, which stays with the int4 checkpoint."""
    return {key: value for key, value in recipe.items() if key != "tensors"}
