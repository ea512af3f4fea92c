"""Programs of one graph with different weights: lowered once, the rest by exchanging the weights.

The layers of a model have few graphs. One of each is lowered with random weights, no two of which
are equal, so that each is found again in the program file by its bytes. For every layer the file is
then written anew with the layer's own weights in these places. XNNPACK names what it packs by the
SHA-256 of the bytes, and shares what it packed between programs by that name, so names are
exchanged too.

Sound, because the lowering never looks at the numbers of a weight: all bytes of the program that
were not found to be a weight must be a constant of the module or of the graph, which is checked.
`tests/export/backends/test_templates.py` holds the programs against those lowered in full.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

import msgspec
from torch import Tensor, nn

from export.backends import LoweredStage
from export.backends.executorch_1_5_1 import (
    DIGEST,
    Part,
    data_key,
    digest_of_key,
    raw_bytes,
    serialized_parts,
)
from export.backends.xnnpack.lowering import lower_stage
from export.contract.manifest import Delegation, TensorSpec
from export.host.program_file import Extent, read_program_layout
from export.models.staging import StageModule, Template
from export.models.weights import RandomWeights, Weights
from quantize.errors import LoweringError
from quantize.files.durable import replacing, sync, write_json

SMALL_CONSTANT = 64
"""Bytes up to which a constant of the graph need not be known: scalars that passes make."""

COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie in the file, and by which key XNNPACK finds them (None: they are
    a constant outside of the delegates)."""

    name: str
    index: int | None
    part: Part
    start: int
    size: int
    key: str | None


@dataclass(frozen=True)
class ProgramTemplate:
    """A program file with random weights, and the places of its weights in it."""

    file: Path
    places: tuple[Place, ...]

    def instantiate(self, weights: Weights, destination: Path) -> None:
        """Write the program with `weights`, under the names that the template's stage has for them.

        `destination` appears whole or not at all. Raises CheckpointError for weights that cannot
        be read, LoweringError for those of another shape, OSError.
        """
        layout = read_program_layout(self.file)
        with self.file.open("rb") as source, replacing(destination) as target:
            os.truncate(target.fileno(), self.file.stat().st_size)
            weighed = {place.start for place in self.places if place.key is not None}
            for extent in (*layout.constants, *layout.named.values()):
                if extent.start not in weighed:
                    _copy(source, target, extent)
            keys: dict[bytes, bytes] = {}
            taken: set[str] = set()
            for place, data in self._bytes(weights):
                if len(data) != place.size:
                    raise LoweringError(
                        f"tensor {place.name} has {len(data)} bytes of {place.part}, its template "
                        f"has {place.size}; export the layers as one stage"
                    )
                target.seek(place.start)
                target.write(data)
                if place.key is not None:
                    key = data_key(data, place.part, taken)
                    keys[digest_of_key(place.key)] = digest_of_key(key)
            for extent in (layout.header, *layout.delegates):
                renamed = DIGEST.sub(
                    lambda found: keys.get(found.group(), found.group()), _read(source, extent)
                )
                target.seek(extent.start)
                target.write(renamed)

    def _bytes(self, weights: Weights) -> Iterator[tuple[Place, bytes]]:
        """What belongs in each place; a tensor is read once."""
        last: tuple[str, int | None] | None = None
        parts: dict[Part, bytes] = {}
        for place in self.places:
            if (place.name, place.index) != last:
                last = place.name, place.index
                parts = _parts(weights, *last)
            yield place, parts.get(place.part, b"")


def instantiate(stage: StageModule, folder: Path) -> LoweredStage:
    """Lower a stage from its template's program, which is made in `folder` if it is not there.

    Raises what `make_template` and `ProgramTemplate.instantiate` raise.
    """
    template = stage.template
    if template is None:
        raise ValueError(f"the stage {stage.name} has no template")
    described, file = folder / f"{template.name}.json", folder / f"{template.name}.pte"
    if not described.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made, lowered = make_template(stage, template, file)
        sync(file)
        # The description appears last: where it is, the program is whole.
        write_json(
            described,
            {
                "outputs": msgspec.to_builtins(lowered.outputs),
                "delegation": msgspec.to_builtins(lowered.delegation),
                "places": [asdict(place) for place in made.places],
            },
        )
        del made, lowered  # they hold all weights
    document = json.loads(described.read_text(encoding="utf-8"))
    program = ProgramTemplate(file, tuple(Place(**place) for place in document["places"]))
    return LoweredStage(
        write=lambda path: program.instantiate(template.weights, path),
        outputs=msgspec.convert(document["outputs"], tuple[TensorSpec, ...]),
        delegation=msgspec.convert(document["delegation"], Delegation),
    )


def make_template(
    stage: StageModule, template: Template, file: Path
) -> tuple[ProgramTemplate, LoweredStage]:
    """Lower a template with random weights into `file`.

    Raises LoweringError for a program in which the weights are not all found, or in which there
    are bytes that are no weight and no constant.
    """
    weights = RandomWeights(template.weights)
    module = template.build(weights)
    lowered = lower_stage(replace(stage, module=module))
    lowered.write(file)
    asked = list(dict.fromkeys(weights.asked))
    constants = {raw_bytes(buffer) for buffer in _constants(module)} - {b""}
    return ProgramTemplate(file, _find(file, weights, asked, constants, template.name)), lowered


def _constants(module: nn.Module) -> Iterator[Tensor]:
    """Tensors of a module that do not come from a checkpoint."""
    for name, buffer in module.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if leaf in module.get_submodule(owner)._non_persistent_buffers_set:
            yield buffer


def _find(
    file: Path,
    weights: RandomWeights,
    asked: list[tuple[str, int | None]],
    constants: set[bytes],
    stage: str,
) -> tuple[Place, ...]:
    layout = read_program_layout(file)
    with file.open("rb") as source:
        outside = [(extent, _read(source, extent)) for extent in layout.constants]
        places: list[Place] = []
        for name, index in asked:
            found: dict[str, list[Place]] = {}
            for part, data in _parts(weights, name, index).items():
                hits = found.setdefault(part.removeprefix("fp32 "), [])
                key = data_key(data, part)
                if key in layout.named:
                    start = layout.named[key].start
                    hits.append(Place(name, index, part, start, len(data), key))
                    continue
                hits += [
                    Place(name, index, part, extent.start + at, len(data), None)
                    for extent, content in outside
                    for at in _occurrences(content, data)
                ]
            for what, hits in found.items():
                if len(hits) != 1:
                    raise LoweringError(
                        f"the {what} of {name} are in the program of {stage} {len(hits)} times, "
                        "not once, so other layers cannot be made from it; export the layers as "
                        "one stage, and report this with the config"
                    )
                places.append(hits[0])
        covered = {place.start for place in places}
        for extent in (*layout.named.values(), *layout.constants):
            end = extent.start + extent.size
            if extent.size > SMALL_CONSTANT and not any(extent.start <= at < end for at in covered):
                _check_constant(_read(source, extent), constants, stage)
    return tuple(places)


def _check_constant(content: bytes, constants: set[bytes], stage: str) -> None:
    known = any(
        content[: len(constant)] == constant and not any(content[len(constant) :])
        for constant in constants
    )
    if not known and any(content):
        raise LoweringError(
            f"the program of {stage} has {len(content)} bytes that are neither a weight nor a "
            "constant, so other layers cannot be made from it; export the layers as one stage, "
            "and report this with the config"
        )


def _occurrences(content: bytes, data: bytes) -> Iterator[int]:
    at = content.find(data)
    while at >= 0:
        yield at
        at = content.find(data, at + 1)


def _parts(weights: Weights, name: str, index: int | None) -> dict[Part, bytes]:
    packed = weights.get_packed(name, index)
    return serialized_parts(weights.get(name, index) if packed is None else packed)


def _read(source: IO[bytes], extent: Extent) -> bytes:
    source.seek(extent.start)
    return source.read(extent.size)


def _copy(source: IO[bytes], target: IO[bytes], extent: Extent) -> None:
    target.seek(extent.start)
    for start in range(extent.start, extent.start + extent.size, COPY_BYTES):
        size = min(COPY_BYTES, extent.start + extent.size - start)
        target.write(_read(source, Extent(start, size)))
