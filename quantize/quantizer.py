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
from quantize.files.journal import Journal, work_text
from quantize.files.json_files import read_json_object
from quantize.files.safetensors_folder import INDEX_FILE, SINGLE_FILE
from quantize.files.safetensors_writer import SafetensorsWriter, TensorSpec
from quantize.ordered_map import in_order
from quantize.packing import pack_int4
from quantize.planning import Plan, PlannedWeight, StoredWeight, plan_weights
from quantize.recipe import Recipe, Scheme
from quantize.report import (
    QuantizationReport,
    ReportRow,
    layer_of,
    report_from_recipe_json,
)

COPIED_FILES = (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
# Rows of a matrix are quantized this many elements at a time, 16 MiB in fp32 (an expert of
# DiffusionGemma 26B-A4B has as many), and no more than so many are in work or wait to be written,
# however many processors there are. Quantizing a piece takes some 120 MB.
_PIECE_ELEMENTS = 2**22
_ELEMENTS_IN_ALL = 32 * _PIECE_ELEMENTS
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
    present = _present_weights(checkpoint)
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
        done = _Done(journal.records)
        _note_shards(present, source, folder, journal, done)
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
            _write_json(folder / INDEX_FILE, _index(plan))
        rows = [_row(weight, *done.energies[weight.name]) for weight in plan.weights]
        _write_json(folder / RECIPE_FILE, _recipe_document(recipe, plan, rows))


def _no_progress(done: int, total: int, name: str) -> None:
    """Where nobody asked for it."""


def _present_weights(checkpoint: Checkpoint) -> list[StoredWeight]:
    return [
        StoredWeight(
            name,
            checkpoint.file(name),
            checkpoint.stored_dtype(name),
            checkpoint.shape(name),
            checkpoint.stored_bytes(name),
        )
        for name in sorted(checkpoint.names())
    ]


def _refuse_nothing(plan: Plan, recipe: Recipe, source: Path) -> None:
    if all(weight.scheme is None for weight in plan.weights):
        raise RecipeError(
            f"The recipe {recipe.name} quantizes none of the {len(plan.weights)} weights of "
            f"{source}; give it patterns that match their names."
        )


def _work(source: Path, recipe: Recipe) -> str:
    """A text that differs whenever the result could, but for the shards: see `_Done`."""
    names = (*COPIED_FILES, INDEX_FILE)
    return work_text(
        (source / name for name in names if (source / name).is_file()),
        recipe=recipe.to_json(),
        versions=_versions(),
        schema_version=SCHEMA_VERSION,
    )


class _Done:
    """What the journal knows: the shards that were seen, their weights, and which are written.

    `shards` maps a file to the size and time it had, `stored` and `energies` a weight's name to
    what it is in the source, and to its signal and noise once it is whole in the result.
    """

    def __init__(self, records: list[dict]):
        self.shards: dict[str, list[int]] = {}
        self.stored: dict[str, StoredWeight] = {}
        self.energies: dict[str, tuple[float, float]] = {}
        for record in records:
            if "shard" in record:
                self.add_shard(record)
            else:
                self.energies[record["tensor"]] = record["signal"], record["noise"]

    def rest(self, plan: Plan) -> list[PlannedWeight]:
        """What is not whole in the result yet."""
        return [weight for weight in plan.weights if weight.name not in self.energies]

    def add_shard(self, record: dict) -> None:
        """A shard that is new, or not the one that it was: of that, nothing is done."""
        file = record["shard"]
        for name in [name for name, weight in self.stored.items() if weight.file == file]:
            del self.stored[name]
            self.energies.pop(name, None)
        self.shards[file] = record["size_and_time"]
        for name, dtype, shape, nbytes in record["weights"]:
            self.stored[name] = StoredWeight(name, file, dtype, tuple(shape), nbytes)


def _note_shards(
    present: list[StoredWeight], source: Path, folder: Path, journal: Journal, done: _Done
) -> None:
    """Tells the journal of shards that are new or changed; what was made of the latter goes."""
    by_file: dict[str, list[StoredWeight]] = {}
    for weight in present:
        by_file.setdefault(weight.file, []).append(weight)
    for file, weights in by_file.items():
        stat = (source / file).stat()
        size_and_time = [stat.st_size, stat.st_mtime_ns]
        if done.shards.get(file) == size_and_time:
            continue
        (folder / file).unlink(missing_ok=True)
        record = {
            "shard": file,
            "size_and_time": size_and_time,
            "weights": [[w.name, w.dtype, list(w.shape), w.nbytes] for w in weights],
        }
        journal.append([record])
        done.add_shard(record)


def quantize_weight(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Quantizes one fp32 matrix `[out, in]` as torchao does, to an IntxUnpackedToInt8Tensor."""
    from torchao.quantization import quantize_

    out_features, in_features = weight.shape
    linear = torch.nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    quantize_(linear, _torchao_config(scheme))
    return linear.weight.data


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
        return (
            self.weight.elements if self.rows is None else shape[1] * (self.rows[1] - self.rows[0])
        )


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

    def __init__(self, writers: dict[str, SafetensorsWriter], journal: Journal):
        self._writers = writers
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
        for file in {weight.stored.file for weight, _, _ in self._waiting}:
            self._writers[file].flush()
        self._journal.append(
            {"tensor": weight.name, "signal": signal, "noise": noise}
            for weight, signal, noise in self._waiting
        )
        self._waiting.clear()
        self._flushed_at = time.monotonic()


def _write_weights(
    checkpoint: Checkpoint,
    plan: Plan,
    folder: Path,
    journal: Journal,
    done: _Done,
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
    done: _Done,
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

    finished = _Finished(writers, journal)
    signal = noise = 0.0
    try:
        with closing(
            in_order(
                functools.partial(_quantize_piece, checkpoint),
                (piece for weight in todo for piece in _pieces(weight)),
                size=lambda piece: piece.elements,
                size_in_all=_ELEMENTS_IN_ALL,
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


def _energy(matrix: torch.Tensor) -> float:
    # Rows in fp32, their sum in fp64: a large matrix in fp64 would double the memory.
    return float(matrix.square().sum(dim=1).sum(dtype=torch.float64))


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
