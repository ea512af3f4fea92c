"""What a recipe makes of each weight of a checkpoint, decided from names and shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from quantize.checkpoint import FLOAT_TYPES, Checkpoint
from quantize.errors import CheckpointError
from quantize.files.safetensors_writer import TensorSpec
from quantize.packing import packed_width
from quantize.recipe import Recipe, Scheme
from quantize.report import natural_order


@dataclass(frozen=True)
class StoredWeight:
    """A weight of the source: where it lies, its type as safetensors spells it, its bytes there."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def stored_weights(checkpoint: Checkpoint) -> list[StoredWeight]:
    """The weights of a checkpoint's shards that are there, by name."""
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


@dataclass(frozen=True)
class PlannedWeight:
    """One weight of the source, and its scheme with the final group size (None: kept)."""

    stored: StoredWeight
    scheme: Scheme | None

    @property
    def name(self) -> str:
        """Its Hugging Face name."""
        return self.stored.name

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the source."""
        return self.stored.shape

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that it becomes on disk."""
        if self.scheme is None:
            return {self.name: TensorSpec(self.stored.dtype, self.shape)}
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

    @property
    def by_file(self) -> dict[str, list[PlannedWeight]]:
        """The weights of each file, files in order of their names."""
        files: dict[str, list[PlannedWeight]] = {}
        for weight in sorted(self.weights, key=lambda weight: weight.stored.file):
            files.setdefault(weight.stored.file, []).append(weight)
        return files


def plan_weights(stored: Iterable[StoredWeight], recipe: Recipe, source: Path) -> Plan:
    """Decides on every weight of the folder `source` before any is read.

    Raises RecipeError for a weight that cannot take its scheme, CheckpointError for a type that
    cannot be quantized.
    """
    weights: list[PlannedWeight] = []
    skipped: dict[str, list[int]] = {}
    smaller: dict[str, list[str]] = {}
    unnamed: list[str] = []
    for weight in sorted(stored, key=lambda weight: natural_order(weight.name)):
        rule = recipe.rule_for(weight.name)
        scheme = None
        if rule is None:
            if len(weight.shape) > 1:
                unnamed.append(weight.name)
        elif rule.treatment == "skip":
            skipped.setdefault(", ".join(rule.patterns), []).append(weight.nbytes)
            continue
        elif isinstance(rule.treatment, Scheme):
            scheme = rule.treatment.for_shape(weight.name, weight.shape)
            if weight.dtype not in FLOAT_TYPES:
                raise CheckpointError(
                    f"Tensor {weight.name} of {source} is stored as {weight.dtype}, which "
                    "cannot be quantized; start from bfloat16, float16 or float32."
                )
            if scheme.group_size != rule.treatment.group_size:
                change = f"{scheme.group_size} instead of {rule.treatment.group_size}"
                smaller.setdefault(change, []).append(weight.name)
        weights.append(PlannedWeight(weight, scheme))
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
