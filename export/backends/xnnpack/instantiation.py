"""Programs of one graph with different weights: lowered once, the rest by exchanging the weights.

The layers of a model have few graphs. One of each is lowered with random weights, no two of which
are equal, so that each is found again in the program file by its bytes. For every layer the file is
then written anew with the layer's own weights in these places. XNNPACK names what it packs by the
SHA-256 of the bytes, and shares what it packed between programs by that name, so names are
exchanged too.

Sound, because the lowering never looks at the numbers of a weight: all bytes of the program that
were not found to be a weight must be a constant of the module or of the graph, which is checked.
`tests/export/backends/test_stamping.py` holds stamped programs against those lowered in full.

Written against ExecuTorch 1.5 with XNNPACK.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Literal

import torch
from torch import Tensor, nn

from export.backends import LoweredStage, Output, lower_stage
from export.contract.bundle import Delegation
from export.host.program_file import Extent, read_program_layout
from export.models.staging import Form, StageModule
from export.models.weights import RandomWeights, Weights
from quantize.errors import LoweringError
from quantize.files.durable import sync

Part = Literal["integers", "scales", "fp32 scales", "plain"]
"""What of a tensor; scales are bf16 where rows have groups, fp32 where they are of whole rows."""

SMALL_CONSTANT = 64
"""Bytes up to which a constant of the graph need not be known: scalars that passes make."""

_KEY = re.compile(rb"[0-9a-f]{64}")
_SCALES = "scale_"


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
class Template:
    """A program file with random weights, and the places of its weights in it."""

    file: Path
    places: tuple[Place, ...]

    def stamp(self, weights: Weights, destination: Path) -> None:
        """Write the program with `weights`, which go by the names of the form's first stage.

        `destination` appears whole or not at all. Raises CheckpointError for weights that cannot
        be read, LoweringError for those of another shape, OSError.
        """
        layout = read_program_layout(self.file)
        temporary = destination.with_name(f".{destination.name}.partial")
        try:
            with self.file.open("rb") as source, temporary.open("wb") as target:
                os.truncate(target.fileno(), self.file.stat().st_size)
                weighed = {place.start for place in self.places if place.key is not None}
                for extent in layout.constants:
                    _copy(source, target, extent)
                for extent in layout.named.values():
                    if extent.start not in weighed:
                        _copy(source, target, extent)
                keys: dict[bytes, bytes] = {}
                taken: set[str] = set()
                for place, data in self._bytes(weights):
                    if len(data) != place.size:
                        raise LoweringError(
                            f"tensor {place.name} has {len(data)} bytes of {place.part}, its form "
                            f"has {place.size}; export the layers as one stage"
                        )
                    target.seek(place.start)
                    target.write(data)
                    if place.key is not None:
                        key = _free_key(data, place.part, taken)
                        keys[_digest(place.key)] = _digest(key)
                for extent in (layout.header, *layout.delegates):
                    source.seek(extent.start)
                    renamed = _KEY.sub(
                        lambda found: keys.get(found.group(), found.group()),
                        source.read(extent.size),
                    )
                    target.seek(extent.start)
                    target.write(renamed)
                target.flush()
                os.fsync(target.fileno())
            os.replace(temporary, destination)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()

    def _bytes(self, weights: Weights) -> Iterator[tuple[Place, bytes]]:
        """What belongs in each place; a tensor is read once."""
        last: tuple[str, int | None] | None = None
        parts: dict[Part, bytes] = {}
        for place in self.places:
            if (place.name, place.index) != last:
                last = place.name, place.index
                parts = _parts(weights, *last)
            yield place, parts.get(place.part, b"")


class Forms:
    """Lowers stages that have a form: the form once, the stage from it.

    The programs with random weights are kept in `folder`, where a later process finds them.
    """

    def __init__(self, folder: Path, backend: str) -> None:
        self._folder, self._backend = folder, backend
        self._made: dict[str, tuple[Template, LoweredStage]] = {}

    def lower(self, stage: StageModule) -> LoweredStage:
        """The program of a stage with a form. Raises what `make_template` and `stamp` raise."""
        form = stage.form
        if form is None:
            raise ValueError(f"the stage {stage.name} has no form")
        described = self._folder / f"{form.name}.json"
        if form.name not in self._made:
            if not described.exists():
                self._make(stage, form, described)
            self._made[form.name] = _read(described)
        template, lowered = self._made[form.name]
        return replace(lowered, write=lambda path: template.stamp(form.weights, path))

    def _make(self, stage: StageModule, form: Form, described: Path) -> None:
        """Lower a form; what was lowered is not kept, as it holds all weights."""
        self._folder.mkdir(exist_ok=True)
        file = described.with_suffix(".pte")
        template, lowered = make_template(stage, form, self._backend, file)
        document = {
            "outputs": [
                [str(output.dtype).removeprefix("torch."), output.shape, output.dynamic]
                for output in lowered.outputs
            ],
            "delegation": asdict(lowered.delegation),
            "places": [asdict(place) for place in template.places],
        }
        # The description appears last and whole: where it is, the program is whole.
        temporary = described.with_suffix(".partial")
        temporary.write_text(json.dumps(document), encoding="utf-8")
        for path in (file, temporary):
            sync(path)
        os.replace(temporary, described)


def _read(described: Path) -> tuple[Template, LoweredStage]:
    """What `Forms` has described there."""
    document = json.loads(described.read_text(encoding="utf-8"))
    places = tuple(Place(**place) for place in document["places"])
    outputs = tuple(
        Output(getattr(torch, dtype), tuple(shape), tuple(dynamic))
        for dtype, shape, dynamic in document["outputs"]
    )
    lowered = LoweredStage(_unwritten, outputs, Delegation(**document["delegation"]))
    return Template(described.with_suffix(".pte"), places), lowered


def _unwritten(path: Path) -> None:
    raise ValueError(f"a form is stamped, not written to {path}")


def make_template(
    stage: StageModule, form: Form, backend: str, file: Path
) -> tuple[Template, LoweredStage]:
    """Lower a form with random weights into `file`.

    Raises LoweringError for a program in which the weights are not all found, or in which there
    are bytes that are no weight and no constant.
    """
    weights = RandomWeights(form.weights)
    module = form.build(weights)
    lowered = lower_stage(replace(stage, module=module), backend)
    lowered.write(file)
    asked = list(dict.fromkeys(weights.asked))
    constants = {_raw(buffer) for buffer in _constants(module)}
    return Template(file, _find(file, weights, asked, constants, form.name)), lowered


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
    form: str,
) -> tuple[Place, ...]:
    layout = read_program_layout(file)
    with file.open("rb") as source:

        def read(extent: Extent) -> bytes:
            source.seek(extent.start)
            return source.read(extent.size)

        outside = [(extent, read(extent)) for extent in layout.constants]
        places: list[Place] = []
        covered: dict[int, int] = {}
        for name, index in asked:
            found: dict[str, list[Place]] = {}
            for part, data in _parts(weights, name, index).items():
                hits = found.setdefault(part.removeprefix("fp32 "), [])
                key = _key(data, part)
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
                        f"the {what} of {name} are in the program of {form} {len(hits)} times, not "
                        "once, so other layers cannot be made from it; export the layers as one "
                        "stage, and report this with the config"
                    )
                places.append(hits[0])
                covered[hits[0].start] = hits[0].size
        for extent in layout.named.values():
            if extent.start not in covered and extent.size > SMALL_CONSTANT:
                _check_constant(read(extent), constants, form)
        for extent, content in outside:
            is_covered = any(0 <= at - extent.start < extent.size for at in covered)
            if not is_covered and extent.size > SMALL_CONSTANT:
                _check_constant(content, constants, form)
    return tuple(places)


def _check_constant(content: bytes, constants: set[bytes], form: str) -> None:
    known = any(
        content[: len(constant)] == constant and not any(content[len(constant) :])
        for constant in constants
        if constant
    )
    if not known and any(content):
        raise LoweringError(
            f"the program of {form} has {len(content)} bytes that are neither a weight nor a "
            "constant, so other layers cannot be made from it; export the layers as one stage, "
            "and report this with the config"
        )


def _occurrences(content: bytes, data: bytes) -> Iterator[int]:
    at = content.find(data)
    while at >= 0:
        yield at
        at = content.find(data, at + 1)


def _parts(weights: Weights, name: str, index: int | None) -> dict[Part, bytes]:
    """A tensor's bytes as XNNPACK's serializer writes them (`node_visitor.py`, ExecuTorch 1.5)."""
    packed = weights.get_packed(name, index)
    if packed is None:
        return {"plain": _raw(weights.get(name, index).to(torch.float32))}
    integers, scale = packed.qdata, packed.scale
    if packed.bits == 4:
        integers = integers ^ 0x88  # counted from -8 there, two's complement here
    return {
        "integers": _raw(integers),
        "scales": _raw(scale.to(torch.bfloat16)),
        "fp32 scales": _raw(scale.to(torch.float32)),
    }


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _key(data: bytes, part: Part, behind: bytes = b"") -> str:
    digest = hashlib.sha256(data + behind).hexdigest()
    return _SCALES + digest if part.endswith("scales") else digest


def _free_key(data: bytes, part: Part, taken: set[str]) -> str:
    """The key of some bytes; another one for bytes that the program has already."""
    key = _key(data, part)
    number = 0
    while key in taken:
        number += 1
        key = _key(data, part, number.to_bytes(4, "little"))
    taken.add(key)
    return key


def _digest(key: str) -> bytes:
    return key.removeprefix(_SCALES).encode()


def _copy(source: IO[bytes], target: IO[bytes], extent: Extent) -> None:
    source.seek(extent.start)
    target.seek(extent.start)
    left = extent.size
    while left:
        piece = source.read(min(left, 1 << 22))
        target.write(piece)
        left -= len(piece)
