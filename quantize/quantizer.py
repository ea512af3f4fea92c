"""Carries out a recipe on a checkpoint folder with torchao, one weight at a time.

Which weight gets which scheme is the recipe's business; how integers lie on disk is `packing`'s.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from quantize.atomic_folder import resumable_folder
from quantize.checkpoint import (
    CONFIG_FILE,
    FLOAT_TYPES,
    FORMAT,
    GENERATION_CONFIG_FILE,
    RECIPE_FILE,
    SCHEMA_VERSION,
    Checkpoint,
    open_checkpoint,
)
from quantize.errors import CheckpointError, RecipeError
from quantize.journal import Journal, work_text
from quantize.json_files import read_json_object
from quantize.packing import pack_int4, packed_width
from quantize.recipe import Recipe, Scheme
from quantize.report import (
    QuantizationReport,
    ReportRow,
    layer_of,
    natural_order,
    report_from_recipe_json,
)
from quantize.safetensors_folder import INDEX_FILE, SINGLE_FILE
from quantize.safetensors_writer import SafetensorsWriter, TensorSpec
from quantize.working_ahead import in_order

COPIED_FILES = (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
MAX_SHARD_BYTES = 4 * 2**30
# Rows of a matrix are quantized this many elements at a time: 64 MiB in fp32. Smaller pieces
# took more memory, not less: glibc returns blocks above 32 MiB at once, and fragments its heap
# with those below (peak above the program for 65,536 x 2816: 370 MB, with half of it 890 MB).
_PIECE_ELEMENTS = 2**24
# Of finished tensors, so much output or so much time is flushed together: what a kill may cost
# beside the tensor in work.
_FLUSH_BYTES = 64 * 2**20
_FLUSH_AFTER_S = 1.0

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
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> QuantizationReport:
    """Quantizes the Hugging Face folder `source` into the new folder `destination`.

    Up to four processors work, each on a piece of at most 64 MiB in fp32 (with min-max scales; on
    a whole matrix with HQQ's), and no more than two pieces for each are in memory. Output files are
    reserved at their full size first, so a full disk is found before the work. `destination`
    appears when it is whole. A call that was killed or interrupted leaves a hidden folder beside
    it, from which the next call with the same source, recipe and versions goes on after the last
    whole tensor. `overwrite` replaces an earlier result of this function, nothing else. The same
    source, recipe and versions give the same bytes, on any number of processors and with any
    interruptions. Raises CheckpointError, RecipeError and OutputError.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.is_quantized:
        raise CheckpointError(
            f"{source} is quantized already; quantize the checkpoint that it was made from."
        )
    plan = plan_weights(checkpoint, recipe)
    shards = _split_into_shards(plan.weights, max_shard_bytes)
    work = _work(checkpoint.folder, recipe, max_shard_bytes)
    with resumable_folder(destination, work, overwrite=overwrite, is_ours=_is_quantized_folder) as (
        folder,
        journal,
    ):
        for name in COPIED_FILES:
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, folder / name)
        writers = [
            SafetensorsWriter(folder / file, _specs(weights)) for file, weights in shards.items()
        ]
        try:
            writer_of = {
                weight.name: writer
                for writer, weights in zip(writers, shards.values(), strict=True)
                for weight in weights
            }
            energies = _write_weights(
                checkpoint, plan.weights, writer_of, journal, progress or _no_progress
            )
            for writer in writers:
                writer.close()
        finally:
            for writer in writers:
                writer.abandon()
        if len(shards) > 1:
            _write_json(folder / INDEX_FILE, _index(shards))
        rows = [_row(weight, *energies[weight.name]) for weight in plan.weights]
        document = _recipe_document(recipe, plan, rows)
        _write_json(folder / RECIPE_FILE, document)
    return report_from_recipe_json(document)


def _no_progress(done: int, total: int, name: str) -> None:
    """Where nobody asked for it."""


def _work(source: Path, recipe: Recipe, max_shard_bytes: int) -> str:
    """A text that differs whenever the result could."""
    files = sorted(path for path in source.iterdir() if path.suffix == ".safetensors")
    files += [source / name for name in (*COPIED_FILES, INDEX_FILE) if (source / name).is_file()]
    return work_text(
        files,
        recipe=recipe.to_json(),
        versions=_versions(),
        schema_version=SCHEMA_VERSION,
        max_shard_bytes=max_shard_bytes,
    )


def quantize_weight(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Quantizes one fp32 matrix `[out, in]` as torchao does, to an IntxUnpackedToInt8Tensor."""
    from torchao.quantization import quantize_

    out_features, in_features = weight.shape
    linear = torch.nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    quantize_(linear, _torchao_config(scheme))
    return linear.weight.data


@dataclass(frozen=True)
class PlannedWeight:
    """One weight of the source, and its scheme with the final group size (None: kept)."""

    name: str
    shape: tuple[int, ...]
    stored_dtype: str
    bytes_before: int
    scheme: Scheme | None

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that it becomes on disk."""
        if self.scheme is None:
            return {self.name: TensorSpec(self.stored_dtype, self.shape)}
        *outer, width = self.shape
        if self.scheme.bits == 4:
            qdata = TensorSpec("U8", (*outer, packed_width(width)))
        else:
            qdata = TensorSpec("I8", self.shape)
        groups = width // (self.scheme.group_size or width)
        scale_dtype = {"bfloat16": "BF16", "float32": "F32"}[self.scheme.scale_dtype]
        scale = TensorSpec(scale_dtype, (*outer, groups))
        return {f"{self.name}.qdata": qdata, f"{self.name}.scale": scale}

    @property
    def bytes_after(self) -> int:
        """Bytes that it takes on disk, its scales included."""
        return sum(spec.nbytes for spec in self.specs.values())


@dataclass(frozen=True)
class Plan:
    """Every weight that will be written, layer by layer, and notes on what is unusual."""

    weights: tuple[PlannedWeight, ...]
    notes: tuple[str, ...]


def plan_weights(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Decides on every weight from names and shapes alone, before any is read.

    Raises RecipeError for a weight that cannot take its scheme and for a recipe that quantizes
    nothing, CheckpointError for a type that cannot be quantized.
    """
    weights: list[PlannedWeight] = []
    skipped: dict[str, list[int]] = {}
    smaller: dict[str, list[str]] = {}
    unnamed: list[str] = []
    for name in sorted(checkpoint.names(), key=natural_order):
        shape, stored_dtype = checkpoint.shape(name), checkpoint.stored_dtype(name)
        bytes_before = checkpoint.stored_bytes(name)
        rule = recipe.rule_for(name)
        scheme = None
        if rule is None:
            if len(shape) > 1:
                unnamed.append(name)
        elif rule.treatment == "skip":
            skipped.setdefault(", ".join(rule.patterns), []).append(bytes_before)
            continue
        elif isinstance(rule.treatment, Scheme):
            scheme = rule.treatment.for_shape(name, shape)
            if stored_dtype not in FLOAT_TYPES:
                raise CheckpointError(
                    f"Tensor {name} of {checkpoint.folder} is stored as {stored_dtype}, which "
                    "cannot be quantized; start from bfloat16, float16 or float32."
                )
            if scheme.group_size != rule.treatment.group_size:
                change = f"{scheme.group_size} instead of {rule.treatment.group_size}"
                smaller.setdefault(change, []).append(name)
        weights.append(PlannedWeight(name, shape, stored_dtype, bytes_before, scheme))
    if all(weight.scheme is None for weight in weights):
        raise RecipeError(
            f"The recipe {recipe.name} quantizes none of the {len(weights)} weights of "
            f"{checkpoint.folder}; give it patterns that match their names."
        )
    notes = [
        f"skipped {len(sizes)} tensors ({sum(sizes):,} bytes) that match {patterns}"
        for patterns, sizes in skipped.items()
    ]
    notes += [
        f"group size {change} for {len(names)} weights whose inputs it does not divide, "
        f"the first being {names[0]}"
        for change, names in smaller.items()
    ]
    if unnamed:
        notes.append(
            f"kept {len(unnamed)} tensors of two or more axes that no rule names, "
            f"the first being {unnamed[0]}"
        )
    return Plan(tuple(weights), tuple(notes))


@functools.cache
def _torchao_config(scheme: Scheme):
    # Imported here: it takes seconds, and the command line's --help must not.
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
    )
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    weight_dtype = {4: torch.int4, 8: torch.int8}[scheme.bits]
    granularity = PerAxis(0) if scheme.group_size is None else PerGroup(scheme.group_size)
    scale_dtype = getattr(torch, scheme.scale_dtype)
    algorithm = {
        "minmax": IntxChooseQParamsAlgorithm.AFFINE,
        "hqq": IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
    }[scheme.scale_algorithm]
    if scheme.activation == "int8_dynamic":
        return Int8DynamicActivationIntxWeightConfig(
            weight_dtype=weight_dtype,
            weight_granularity=granularity,
            weight_scale_dtype=scale_dtype,
            intx_choose_qparams_algorithm=algorithm,
        )
    return IntxWeightOnlyConfig(
        weight_dtype=weight_dtype,
        granularity=granularity,
        scale_dtype=scale_dtype,
        intx_choose_qparams_algorithm=algorithm,
    )


@dataclass(frozen=True)
class _Piece:
    """A part of a weight that is worked on at once: an expert, or rows of a matrix; else all."""

    weight: PlannedWeight
    index: int | None = None
    rows: tuple[int, int] | None = None
    is_last: bool = True

    @property
    def elements(self) -> int:
        shape = self.weight.shape
        if self.index is not None:
            return math.prod(shape[1:])
        return math.prod(shape) if self.rows is None else shape[1] * (self.rows[1] - self.rows[0])


@dataclass(frozen=True)
class _Quantized:
    """What becomes of a piece: parts of tensors to write, and energies as of `ReportRow`."""

    parts: dict[str, torch.Tensor]
    signal: float = 0.0
    noise: float = 0.0


def _pieces(weight: PlannedWeight) -> Iterator[_Piece]:
    """In order: experts one by one, large matrices by rows."""
    if weight.scheme is None:
        yield _Piece(weight)
    elif len(weight.shape) == 3:
        experts = weight.shape[0]
        for index in range(experts):
            yield _Piece(weight, index=index, is_last=index == experts - 1)
    elif weight.scheme.scale_algorithm == "hqq":
        # torchao ends its search when no scale of the whole matrix moves any more: pieces
        # could end it at another step and so differ in the last bit.
        yield _Piece(weight)
    else:
        rows, width = weight.shape
        step = max(1, _PIECE_ELEMENTS // width)
        for start in range(0, rows, step):
            end = min(start + step, rows)
            yield _Piece(weight, rows=(start, end), is_last=end == rows)


def _quantize_piece(checkpoint: Checkpoint, piece: _Piece) -> _Quantized:
    name, scheme = piece.weight.name, piece.weight.scheme
    if scheme is None:
        return _Quantized({name: checkpoint.get_as_stored(name)})
    if piece.rows is not None:
        matrix = checkpoint.get_rows(name, *piece.rows)
    else:
        matrix = checkpoint.get(name, piece.index)
    if not torch.isfinite(matrix).all():
        raise CheckpointError(
            f"Tensor {name} of {checkpoint.folder} holds values that are not finite; "
            "fetch the checkpoint again."
        )
    quantized = quantize_weight(matrix, scheme)
    packed = pack_int4(quantized.qdata) if scheme.bits == 4 else quantized.qdata
    return _Quantized(
        {f"{name}.qdata": packed, f"{name}.scale": quantized.scale},
        _energy(matrix),
        _energy(matrix - quantized.dequantize()),
    )


class _Finished:
    """Weights that are whole in their files: flushes them, and only then tells the journal."""

    def __init__(self, writer_of: dict[str, SafetensorsWriter], journal: Journal):
        self._writer_of = writer_of
        self._journal = journal
        self._waiting: list[tuple[PlannedWeight, float, float]] = []
        self._flushed_at = time.monotonic()

    def add(self, weight: PlannedWeight, signal: float, noise: float) -> None:
        self._waiting.append((weight, signal, noise))
        waiting_bytes = sum(weight.bytes_after for weight, _, _ in self._waiting)
        waited_s = time.monotonic() - self._flushed_at
        if waiting_bytes >= _FLUSH_BYTES or waited_s >= _FLUSH_AFTER_S:
            self.flush()

    def flush(self) -> None:
        for writer in {self._writer_of[weight.name] for weight, _, _ in self._waiting}:
            writer.flush()
        self._journal.append(
            {"tensor": weight.name, "signal": signal, "noise": noise}
            for weight, signal, noise in self._waiting
        )
        self._waiting.clear()
        self._flushed_at = time.monotonic()


def _write_weights(
    checkpoint: Checkpoint,
    weights: tuple[PlannedWeight, ...],
    writer_of: dict[str, SafetensorsWriter],
    journal: Journal,
    progress: Progress,
) -> dict[str, tuple[float, float]]:
    """Writes the weights that the journal does not have yet; gives signal and noise of all."""
    energies = {entry["tensor"]: (entry["signal"], entry["noise"]) for entry in journal.records}
    done, total = 0, sum(weight.bytes_before for weight in weights)
    for weight in weights:
        if weight.name in energies:
            done += weight.bytes_before
            for part in weight.specs:
                writer_of[weight.name].skip(part)
    if done:
        progress(done, total, "done before")
    todo = [weight for weight in weights if weight.name not in energies]
    import torchao.quantization  # noqa: F401 (once, before the threads)

    finished = _Finished(writer_of, journal)
    signal = noise = 0.0
    try:
        with closing(
            in_order(
                functools.partial(_quantize_piece, checkpoint),
                (piece for weight in todo for piece in _pieces(weight)),
                size=lambda piece: piece.elements,
                size_of_two=2 * _PIECE_ELEMENTS,
            )
        ) as results:
            for piece, quantized in results:
                weight = piece.weight
                for part, tensor in quantized.parts.items():
                    writer_of[weight.name].append(part, tensor)
                signal, noise = signal + quantized.signal, noise + quantized.noise
                done += weight.bytes_before * piece.elements // (math.prod(weight.shape) or 1)
                if piece.is_last:
                    energies[weight.name] = signal, noise
                    finished.add(weight, signal, noise)
                    signal = noise = 0.0
                progress(done, total, weight.name)
    finally:
        finished.flush()
    return energies


def _row(weight: PlannedWeight, signal: float, noise: float) -> ReportRow:
    return ReportRow(
        weight.name,
        "kept" if weight.scheme is None else weight.scheme.label,
        math.prod(weight.shape),
        weight.bytes_before,
        weight.bytes_after,
        signal,
        noise,
    )


def _energy(matrix: torch.Tensor) -> float:
    # Rows in fp32, their sum in fp64: a large matrix in fp64 would double the memory.
    return float(matrix.square().sum(dim=1).sum(dtype=torch.float64))


def _split_into_shards(
    weights: tuple[PlannedWeight, ...], max_bytes: int
) -> dict[str, list[PlannedWeight]]:
    groups: list[list[PlannedWeight]] = [[]]
    filled = 0
    for weight in weights:
        if groups[-1] and filled + weight.bytes_after > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(weight)
        filled += weight.bytes_after
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {
        f"model-{number:05}-of-{len(groups):05}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def _specs(weights: list[PlannedWeight]) -> dict[str, TensorSpec]:
    return {name: spec for weight in weights for name, spec in weight.specs.items()}


def _index(shards: dict[str, list[PlannedWeight]]) -> dict:
    return {
        "metadata": {"total_size": sum(w.bytes_after for ws in shards.values() for w in ws)},
        "weight_map": {name: file for file, ws in shards.items() for name in _specs(ws)},
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
        entry = {
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


def _write_json(path: Path, value: dict) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _is_quantized_folder(folder: Path) -> bool:
    try:
        return read_json_object(folder / RECIPE_FILE).get("format") == FORMAT
    except CheckpointError:
        return False
