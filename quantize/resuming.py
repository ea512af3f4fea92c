"""What a quantizing that was interrupted has done, as its journal knows it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from quantize.files.journal import Journal
from quantize.files.safetensors_writer import SafetensorsWriter
from quantize.planning import Plan, PlannedWeight, StoredWeight

# Of finished tensors, so much output or so much time is flushed together: what a kill may cost
# beside the tensor in work.
_FLUSH_BYTES = 64 * 2**20
_FLUSH_AFTER_S = 1.0


class DoneWork:
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

    def note_shards(
        self, present: list[StoredWeight], source: Path, folder: Path, journal: Journal
    ) -> None:
        """Tells the journal of shards that are new or changed; what was made of the latter goes."""
        by_file: dict[str, list[StoredWeight]] = {}
        for weight in present:
            by_file.setdefault(weight.file, []).append(weight)
        for file, weights in by_file.items():
            stat = (source / file).stat()
            size_and_time = [stat.st_size, stat.st_mtime_ns]
            if self.shards.get(file) == size_and_time:
                continue
            (folder / file).unlink(missing_ok=True)
            record: dict[str, Any] = {
                "shard": file,
                "size_and_time": size_and_time,
                "weights": [[w.name, w.dtype, list(w.shape), w.nbytes] for w in weights],
            }
            journal.append([record])
            self.add_shard(record)


class FinishedWeights:
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
