"""Has a bundle's programs loaded with their packed weights mapped from a file.

Joins what knows one thing each: `packed_file` where the file lies, `pack_weights` how it is made,
`xnnpack_weights` how the backend is given it, `streaming` what of it is in memory when. Who loads
the programs is `runtime`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from export.contract.bundle import Bundle
from export.contract.manifest import Stage
from export.host.process import resident_bytes, storage_read_bytes
from export.host.program_file import read_program_layout, read_program_memory
from export.host.streaming import pack_weights
from export.host.streaming.mapped_bytes import MappedBytes
from export.host.streaming.packed_file import PackedFile, Packing, default_folder
from export.host.streaming.read_ahead import (
    MARGIN_BYTES,
    Region,
    StageWeights,
    WeightStreamer,
    mapped,
    refusal,
)
from export.host.streaming.residency import leanest_residency
from export.host.streaming.xnnpack_weights import PackedWeights
from quantize.errors import InputError

LARGE_TABLES_BYTES = 8 << 20
"""Tables of a program up to this stay in memory. Larger ones are streamed with a head, which goes
through all of its vocabulary, and read row by row elsewhere: there they are embeddings."""

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class MemoryOptions:
    """How the weights are held. budget_bytes: of resident memory, the process's own included; None:
    as much as there is. folder: where packed weights lie; None: `default_folder`."""

    budget_bytes: int | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.budget_bytes is not None and self.budget_bytes < 1:
            raise InputError(
                f"the memory budget is {self.budget_bytes} bytes; give at least the size of the "
                "program itself"
            )


class MappedWeights:
    """The packed weights of the bundle that is loaded; with a budget, they are streamed."""

    def __init__(
        self, bundle: Bundle, options: MemoryOptions, file: PackedFile, packing: Packing
    ) -> None:
        self.path = file.path
        self.budget_bytes = options.budget_bytes
        self._bundle, self._packing = bundle, packing
        self._order = _order(bundle)
        self._programs: dict[str, MappedBytes] = {}
        self.streamer: WeightStreamer | None = None

    def program(self, stage: Stage) -> bytes:
        """The stage's program file, mapped. Raises OSError."""
        program = MappedBytes(self._bundle.path(stage.file))
        program.expect_little()  # its weights are in the packed file
        self._programs[stage.name] = program
        return program.content

    def begin(self) -> None:
        """All programs are loaded: hold the budget from here on.

        Raises InputError if it cannot be held.
        """
        if self.budget_bytes is None:
            return
        stages = tuple(self._weights_of(stage) for stage in self._bundle.manifest.stages)
        rest = [program.whole for program in self._programs.values()]
        self.streamer = WeightStreamer(stages, self._order, self.budget_bytes, rest)

    def run(self, stage: int, compute: Callable[[], _Value]) -> _Value:
        """Run stage number `stage` of the manifest."""
        return compute() if self.streamer is None else self.streamer.run(stage, compute)

    def report(self, since: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """What is kept and what was streamed, bytes and ms; None without a budget.

        since: an earlier report, from which on is counted; None: from the beginning. The fields are
        those of `weights` in docs/runner.md.
        """
        if self.streamer is None:
            return None
        counts: dict[str, float | None] = {
            f"streamed_{name}": value for name, value in asdict(self.streamer.streamed).items()
        }
        counts["storage_bytes"] = storage_read_bytes()
        for name, now in counts.items():
            if since is not None and now is not None and since[name] is not None:
                counts[name] = now - since[name]
        residency = self.streamer.residency
        return {
            "budget_bytes": self.budget_bytes,
            "read_ahead": residency.ahead,
            "weights_bytes": sum(residency.sizes),
            "kept_bytes": sum(residency.kept),
            "window_bytes": residency.window_bytes,
            "pass_bytes": residency.streamed_bytes,
            **counts,
            "stages": [
                {"name": stage.name, "bytes": size, "kept_bytes": kept}
                for stage, size, kept in zip(
                    self.streamer.stages, residency.sizes, residency.kept, strict=True
                )
            ],
        }

    def _weights_of(self, stage: Stage) -> StageWeights:
        span = self._packing.stages[stage.name]
        regions = []
        if span.bytes:
            region = mapped(self.path, span.offset, span.bytes)
            if region is None:
                raise InputError(f"XNNPACK has not mapped {self.path}; run without a memory budget")
            regions.append(region)
        if stage.role == "head" and (tables := self._tables(stage)) is not None:
            regions.append(tables)
        return StageWeights(stage.name, tuple(regions))

    def _tables(self, stage: Stage) -> Region | None:
        constants = read_program_layout(self._bundle.path(stage.file)).constants
        if sum(extent.size for extent in constants) <= LARGE_TABLES_BYTES:
            return None
        begin = min(extent.start for extent in constants)
        end = max(extent.start + extent.size for extent in constants)
        return self._programs[stage.name].region(begin, end - begin)


def _order(bundle: Bundle) -> tuple[int, ...]:
    """The stages of a pass by number, the head last."""
    numbers = {stage.name: number for number, stage in enumerate(bundle.manifest.stages)}
    calls = [numbers[call.stage] for call in bundle.manifest.schedule]
    head = len(numbers) - 1
    return (*(calls or range(head)), head)


@contextmanager
def loading(bundle: Bundle, options: MemoryOptions) -> Iterator[MappedWeights]:
    """What is loaded within has its weights mapped; the file is made first if there is none yet.

    Raises InputError for a budget that cannot be held, before anything is made or loaded,
    OutputError for a folder that cannot be written or has no room, BundleError for a bundle that
    cannot be loaded.
    """
    if options.budget_bytes is not None:
        check_budget(bundle, options.budget_bytes)
    file = PackedFile(bundle, options.folder or default_folder())
    with file.locked() as lock:
        packing = file.packing(verify=bundle.verified) or pack_weights.make(bundle, file, lock)
        with PackedWeights(file.path).loading():
            yield MappedWeights(bundle, options, file, packing)


def prepare(bundle: Bundle, options: MemoryOptions) -> Path:
    """Pack the weights if that has not been done, so that loading need not; returns their file.

    Raises what `loading` raises.
    """
    if options.budget_bytes is not None:
        check_budget(bundle, options.budget_bytes)
    file = PackedFile(bundle, options.folder or default_folder())
    with file.locked() as lock:
        if file.packing(verify=bundle.verified) is None:
            pack_weights.make(bundle, file, lock)
    return file.path


def check_budget(bundle: Bundle, budget_bytes: int) -> None:
    """Raise InputError for a budget that this process cannot hold with the bundle, by its files.

    What the backend works in, they do not say; it is seen in the first pass.
    """
    stages = bundle.manifest.stages
    memory = [read_program_memory(bundle.path(stage.file)) for stage in stages]
    other = resident_bytes("RssAnon") + resident_bytes("RssFile")
    sizes = []
    for stage, program in zip(stages, memory, strict=True):
        is_large = program.constant_bytes > LARGE_TABLES_BYTES
        other += program.planned_bytes + (0 if is_large else program.constant_bytes)
        tables = program.constant_bytes if is_large and stage.role == "head" else 0
        sizes.append(program.weight_bytes + tables)
    least = leanest_residency(sizes, _order(bundle)).resident_bytes
    if other + least + MARGIN_BYTES > budget_bytes:
        raise refusal(budget_bytes, other, least)
