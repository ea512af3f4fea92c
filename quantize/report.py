"""What quantization did to each weight: bytes before and after, and signal-to-noise ratio.

It computes tables from measured numbers; showing them is the command line's business.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from quantize.errors import CheckpointError

_LAYER = re.compile(r"^(.*?\b(?:layers|blocks|h)\.\d+)\.")


@dataclass(frozen=True)
class ReportRow:
    """One weight, one layer, or the whole model.

    scheme: a label such as `int4 g32, int8 act`, `kept`, or several joined by ` + `.
    bytes_before: as stored in the source; bytes_after: as stored now, scales included.
    signal_energy: sum of w^2, noise_energy: sum of (w - w_quantized)^2, both over quantized
    weights only.
    """

    name: str
    scheme: str
    elements: int
    bytes_before: int
    bytes_after: int
    signal_energy: float = 0.0
    noise_energy: float = 0.0

    @property
    def bits_per_weight(self) -> float:
        """8 * bytes_after / elements."""
        return 8 * self.bytes_after / self.elements if self.elements else 0.0

    @property
    def snr_db(self) -> float | None:
        """10 * log10(sum w^2 / sum (w - w_quantized)^2) in dB; None where nothing was lost."""
        if self.noise_energy <= 0.0 or self.signal_energy <= 0.0:
            return None
        return 10.0 * math.log10(self.signal_energy / self.noise_energy)


@dataclass(frozen=True)
class QuantizationReport:
    """Rows per weight in the model's order, and notes on what was skipped or changed."""

    recipe_name: str
    tensors: tuple[ReportRow, ...]
    notes: tuple[str, ...] = ()

    def by_layer(self) -> tuple[ReportRow, ...]:
        """One row per decoder layer, and one per module outside the layers."""
        layers: dict[str, list[ReportRow]] = {}
        for row in self.tensors:
            layers.setdefault(layer_of(row.name), []).append(row)
        return tuple(_sum(name, rows) for name, rows in layers.items())

    def total(self) -> ReportRow:
        """One row for the whole model."""
        return _sum("total", self.tensors)


def layer_of(name: str) -> str:
    """`model.decoder.layers.3` for a weight of that layer, the module's name elsewhere.

    A module of several weights, such as `model.decoder.self_conditioning`, is one row.
    """
    match = _LAYER.match(name)
    if match:
        return match.group(1)
    module = name.removesuffix(".weight")
    return ".".join(module.split(".")[:3])


def natural_order(name: str) -> tuple:
    """A sort key by which layer 10 comes after layer 9."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


def report_from_recipe_json(recipe: dict) -> QuantizationReport:
    """The report of a quantized folder, from `Checkpoint.recipe`.

    Raises CheckpointError if what the quantizer wrote there is missing or of another type.
    """
    try:
        rows = tuple(
            ReportRow(
                name,
                str(entry["label"]),
                math.prod(int(size) for size in entry["shape"]),
                int(entry["bytes_before"]),
                int(entry["bytes_after"]),
                float(entry.get("signal_energy", 0.0)),
                float(entry.get("noise_energy", 0.0)),
            )
            for name, entry in recipe["tensors"].items()
        )
        notes = tuple(str(note) for note in recipe["notes"])
        return QuantizationReport(str(recipe["recipe"]["name"]), rows, notes)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"The recipe.json of the checkpoint has no usable report ({error!r}); "
            "quantize the checkpoint again."
        ) from error


def _sum(name: str, rows: Iterable[ReportRow]) -> ReportRow:
    rows = tuple(rows)
    return ReportRow(
        name,
        " + ".join(sorted({row.scheme for row in rows})),
        sum(row.elements for row in rows),
        sum(row.bytes_before for row in rows),
        sum(row.bytes_after for row in rows),
        sum(row.signal_energy for row in rows),
        sum(row.noise_energy for row in rows),
    )
