"""Carries out a recipe on a checkpoint folder with torchao, one weight at a time.

How one matrix is rounded is `rounding`'s business, what an interrupted call has done `resuming`'s.
"""

from __future__ import annotations

import functools
import platform
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quantize.checkpoint import (
    CONFIG_FILE,
    FORMAT,
    GENERATION_CONFIG_FILE,
    RECIPE_FILE,
    SCHEMA_VERSION,
    Checkpoint,
    open_checkpoint,
)
from quantize.errors import CheckpointError, RecipeError
from quantize.files.atomic_folder import resumable_folder
from quantize.files.durable import write_json
from quantize.files.journal import Journal, work_text
from quantize.files.json_files import read_json_object
from quantize.files.safetensors_folder import INDEX_FILE, SINGLE_FILE
from quantize.files.safetensors_writer import SafetensorsWriter, TensorSpec
from quantize.ordered_map import in_order
from quantize.planning import Plan, PlannedWeight, plan_weights, stored_weights
from quantize.recipe import Recipe
from quantize.report import (
    QuantizationReport,
    ReportRow,
    layer_of,
    report_from_recipe_json,
)
from quantize.resuming import DoneWork, FinishedWeights
from quantize.rounding import ELEMENTS_IN_ALL, pieces_of, quantize_piece

COPIED_FILES = (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
# Called with bytes of source weights done, bytes in all, and the weight just worked on; what an
# earlier, interrupted call did is reported before any work.
Progress = Callable[[int, int, str], None]


def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> QuantizationReport:
    """Quantizes the Hugging Face folder `source` into the new folder `destination`.

    All processors work, each on a piece of at most 16 MiB in fp32 (with min-max scales; on a whole
    matrix with HQQ's), as long as no more than thirty-two such pieces are in memory. Every shard
    becomes one of the same name, which is reserved at its full size first, so a full disk is found
    before the work. `destination` appears when it is whole. A call that was killed or interrupted
    leaves a hidden folder beside it, from which the next call with the same source, recipe and
    versions goes on after the last whole tensor. `overwrite` replaces an earlier result of this
    function, nothing else. The same source, recipe and versions give the same bytes, on any number
    of processors and with any interruptions. Raises CheckpointError, RecipeError and OutputError.
    """
    _quantize(open_checkpoint(source), destination, recipe, progress, overwrite)
    return read_report(destination)


def quantize_available(
    source: str | Path,
    destination: str | Path,
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Quantizes the shards of `source` that are there; a later call goes on with others.

    A shard that was quantized is not needed any more, so a checkpoint can be fetched, quantized
    and deleted shard by shard; index and config.json stay. Gives the names of the shards that are
    still to come; when there are none, `destination` is there, with the bytes that
    `quantize_checkpoint` writes. Until then what was done is kept, whatever goes wrong. Raises as
    `quantize_checkpoint` does, and OutputError for unfinished work of another recipe or version.
    """
    checkpoint = open_checkpoint(source, partial=True)
    try:
        _quantize(checkpoint, destination, recipe, progress, overwrite, partial=True)
    except _ShardsMissing as error:
        return error.files
    return ()


def read_report(folder: str | Path) -> QuantizationReport:
    """What quantizing an int4 folder did; raises CheckpointError."""
    return report_from_recipe_json(read_json_object(Path(folder) / RECIPE_FILE))


class _ShardsMissing(Exception):
    """All that is there is done."""

    def __init__(self, files: tuple[str, ...]):
        super().__init__(files)
        self.files = files


def _quantize(
    checkpoint: Checkpoint,
    destination: str | Path,
    recipe: Recipe,
    progress: Progress | None,
    overwrite: bool,
    *,
    partial: bool = False,
) -> None:
    source = checkpoint.folder
    if checkpoint.is_quantized:
        raise CheckpointError(
            f"{source} is quantized already; quantize the checkpoint that it was made from."
        )
    present = stored_weights(checkpoint)
    # Before the destination is looked at: the recipe's errors come first.
    plan = plan_weights(present, recipe, source)
    if not checkpoint.missing:
        _refuse_nothing(plan, recipe, source)
    work = _work(source, recipe)
    with resumable_folder(
        destination,
        work,
        overwrite=overwrite,
        is_ours=_is_quantized_folder,
        irreplaceable=partial,
    ) as (folder, journal):
        done = DoneWork(journal.records)
        done.note_shards(present, source, folder, journal)
        plan = plan_weights(done.stored.values(), recipe, source)
        for name in COPIED_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        _write_weights(checkpoint, plan, folder, journal, done, progress or _no_progress)
        undone = {weight.stored.file for weight in done.rest(plan)}
        to_come = tuple(f for f in checkpoint.missing if f not in done.shards or f in undone)
        if to_come:
            raise _ShardsMissing(to_come)
        _refuse_nothing(plan, recipe, source)
        if [*done.shards] != [SINGLE_FILE]:
            write_json(folder / INDEX_FILE, _index(plan))
        rows = [_row(weight, *done.energies[weight.name]) for weight in plan.weights]
        write_json(folder / RECIPE_FILE, _recipe_document(recipe, plan, rows))


def _no_progress(done: int, total: int, name: str) -> None:
    """Where nobody asked for it."""


def _refuse_nothing(plan: Plan, recipe: Recipe, source: Path) -> None:
    if all(weight.scheme is None for weight in plan.weights):
        raise RecipeError(
            f"The recipe {recipe.name} quantizes none of the {len(plan.weights)} weights of "
            f"{source}; give it patterns that match their names."
        )


def _work(source: Path, recipe: Recipe) -> str:
    """A text that differs whenever the result could, but for the shards: see `DoneWork`."""
    names = (*COPIED_FILES, INDEX_FILE)
    return work_text(
        (source / name for name in names if (source / name).is_file()),
        recipe=recipe.to_json(),
        versions=_versions(),
        schema_version=SCHEMA_VERSION,
    )


def _write_weights(
    checkpoint: Checkpoint,
    plan: Plan,
    folder: Path,
    journal: Journal,
    done: DoneWork,
    progress: Progress,
) -> None:
    """Writes the weights that are not done yet, into files as the plan says."""
    writers: dict[str, SafetensorsWriter] = {}
    to_write = {weight.stored.file for weight in done.rest(plan)} - {*checkpoint.missing}
    try:
        for file, weights in plan.by_file.items():
            if file not in to_write:
                continue
            writers[file] = writer = SafetensorsWriter(folder / file, _specs(weights))
            for weight in weights:
                if weight.name in done.energies:
                    for part in weight.specs:
                        writer.skip(part)
        _write_pieces(checkpoint, plan, writers, journal, done, progress)
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()


def _write_pieces(
    checkpoint: Checkpoint,
    plan: Plan,
    writers: dict[str, SafetensorsWriter],
    journal: Journal,
    done: DoneWork,
    progress: Progress,
) -> None:
    total = sum(weight.stored.nbytes for weight in plan.weights)
    rest = done.rest(plan)
    done_bytes = total - sum(weight.stored.nbytes for weight in rest)
    todo = [weight for weight in rest if weight.stored.file in writers]
    if done_bytes:
        progress(done_bytes, total, "done before")
    if not todo:
        return
    import torchao.quantization  # noqa: F401 (once, before the threads)

    finished = FinishedWeights(writers, journal)
    signal = noise = 0.0
    try:
        with closing(
            in_order(
                functools.partial(quantize_piece, checkpoint),
                (piece for weight in todo for piece in pieces_of(weight)),
                size=lambda piece: piece.elements,
                size_in_all=ELEMENTS_IN_ALL,
            )
        ) as results:
            for piece, quantized in results:
                weight = piece.weight
                for part, tensor in quantized.parts.items():
                    writers[weight.stored.file].append(part, tensor)
                signal, noise = signal + quantized.signal, noise + quantized.noise
                done_bytes += weight.stored.nbytes * piece.elements // (weight.elements or 1)
                if piece.is_last:
                    done.energies[weight.name] = signal, noise
                    finished.add(weight, signal, noise)
                    signal = noise = 0.0
                progress(done_bytes, total, weight.name)
    finally:
        finished.flush()


def _row(weight: PlannedWeight, signal: float, noise: float) -> ReportRow:
    return ReportRow(
        weight.name,
        "kept" if weight.scheme is None else weight.scheme.label,
        weight.elements,
        weight.stored.nbytes,
        weight.bytes_after,
        signal,
        noise,
    )


def _specs(weights: list[PlannedWeight]) -> dict[str, TensorSpec]:
    return {name: spec for weight in weights for name, spec in weight.specs.items()}


def _index(plan: Plan) -> dict:
    return {
        "metadata": {"total_size": sum(weight.bytes_after for weight in plan.weights)},
        "weight_map": {name: w.stored.file for w in plan.weights for name in w.specs},
    }


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchao": version("torchao"),
    }


def _recipe_document(recipe: Recipe, plan: Plan, rows: list[ReportRow]) -> dict:
    tensors = {}
    for weight, row in zip(plan.weights, rows, strict=True):
        entry: dict[str, Any] = {
            "scheme": asdict(weight.scheme) if weight.scheme is not None else None,
            "label": row.scheme,
            "layer": layer_of(weight.name),
            "shape": list(weight.shape),
            "bytes_before": row.bytes_before,
            "bytes_after": row.bytes_after,
        }
        if weight.scheme is not None:
            entry["snr_db"] = row.snr_db
            entry["signal_energy"] = row.signal_energy
            entry["noise_energy"] = row.noise_energy
        tensors[weight.name] = entry
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "recipe": recipe.to_json(),
        "versions": _versions(),
        "tensors": tensors,
        "notes": list(plan.notes),
    }


def _is_quantized_folder(folder: Path) -> bool:
    try:
        return read_json_object(folder / RECIPE_FILE).get("format") == FORMAT
    except CheckpointError:
        return False
