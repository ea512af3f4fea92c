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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from quantize.atomic_folder import atomic_folder
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

# Called with bytes of source weights done, bytes in all, and the weight just worked on.
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

    In memory at a time, beside torchao's temporaries: one matrix (an expert, a projection), of
    which 64 MiB with min-max scales. Output files are reserved at their full size first, so a
    full disk is found before the work. `destination` appears when it is whole. `overwrite`
    replaces an earlier result of this function, nothing else. The same source, recipe and
    versions give the same bytes. Raises CheckpointError, RecipeError and OutputError.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.is_quantized:
        raise CheckpointError(
            f"{source} is quantized already; quantize the checkpoint that it was made from."
        )
    plan = plan_weights(checkpoint, recipe)
    shards = _split_into_shards(plan.weights, max_shard_bytes)
    with atomic_folder(destination, overwrite=overwrite, is_ours=_is_quantized_folder) as folder:
        for name in COPIED_FILES:
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, folder / name)
        rows: list[ReportRow] = []
        writers = [
            SafetensorsWriter(folder / file, _specs(weights)) for file, weights in shards.items()
        ]
        try:
            done, total = 0, sum(weight.bytes_before for weight in plan.weights)
            for writer, weights in zip(writers, shards.values(), strict=True):
                for weight in weights:
                    rows.append(_write_weight(checkpoint, weight, writer))
                    done += weight.bytes_before
                    if progress is not None:
                        progress(done, total, weight.name)
                writer.close()
        finally:
            for writer in writers:
                writer.abandon()
        if len(shards) > 1:
            _write_json(folder / INDEX_FILE, _index(shards))
        document = _recipe_document(recipe, plan, rows)
        _write_json(folder / RECIPE_FILE, document)
    return report_from_recipe_json(document)


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


def _matrices(checkpoint: Checkpoint, weight: PlannedWeight) -> Iterator[torch.Tensor]:
    """The weight's fp32 matrices in order: experts one by one, large matrices by rows."""
    if len(weight.shape) == 3:
        for index in range(weight.shape[0]):
            yield checkpoint.get(weight.name, index)
    elif weight.scheme.scale_algorithm == "hqq":
        # torchao ends its search when no scale of the whole matrix moves any more: pieces
        # could end it at another step and so differ in the last bit.
        yield checkpoint.get(weight.name)
    else:
        rows, width = weight.shape
        step = max(1, _PIECE_ELEMENTS // width)
        for start in range(0, rows, step):
            yield checkpoint.get_rows(weight.name, start, min(start + step, rows))


def _write_weight(
    checkpoint: Checkpoint, weight: PlannedWeight, writer: SafetensorsWriter
) -> ReportRow:
    scheme = weight.scheme
    elements = math.prod(weight.shape)
    if scheme is None:
        writer.append(weight.name, checkpoint.get_as_stored(weight.name))
        return ReportRow(weight.name, "kept", elements, weight.bytes_before, weight.bytes_after)
    signal = noise = 0.0
    for matrix in _matrices(checkpoint, weight):
        if not torch.isfinite(matrix).all():
            raise CheckpointError(
                f"Tensor {weight.name} of {checkpoint.folder} holds values that are not finite; "
                "fetch the checkpoint again."
            )
        quantized = quantize_weight(matrix, scheme)
        packed = pack_int4(quantized.qdata) if scheme.bits == 4 else quantized.qdata
        writer.append(f"{weight.name}.qdata", packed)
        writer.append(f"{weight.name}.scale", quantized.scale)
        signal += _energy(matrix)
        noise += _energy(matrix - quantized.dequantize())
    return ReportRow(
        weight.name,
        scheme.label,
        elements,
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


def _recipe_document(recipe: Recipe, plan: Plan, rows: list[ReportRow]) -> dict:
    import torchao

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
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchao": torchao.__version__,
        },
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
