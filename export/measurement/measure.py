"""Measures the device that it runs on with the programs of `export.measurement.programs`.

    python -m export.measurement.measure FOLDER [THREADS]

The last line of stdout is one JSON document: rates, bandwidth, costs of calls, flash read, memory
of the process. Run by the Linux runtime of this project, on this machine or on a device over adb.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.host import memory_sampler
from export.host.process import processor_name
from export.host.streaming import page_cache

PROGRAMS_FILE = "programs.json"
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROUNDS = 3
"""How often each measurement is made, one after all others; the fastest counts, for other processes
only ever slow one down."""
BUDGET_S = 0.15
"""How long each program is repeated at each number of rows in a round; its median counts there."""
LEAST_REPEATS, MOST_REPEATS = 5, 400
READ_BYTES = 4 * 2**20
SIMPLE_ROWS = 64
"""[64, 2048] fp32 are 512 KiB, as large as the tensors between operators are in a step."""


def main() -> None:
    """The entry point."""
    folder = Path(sys.argv[1])
    threads = int(sys.argv[2]) if len(sys.argv) > 2 else None
    print(json.dumps(measure(folder, threads), separators=(",", ":")))


def measure(folder: Path, threads: int | None) -> dict[str, Any]:
    """Everything; a minute or less."""
    described = json.loads((folder / PROGRAMS_FILE).read_text(encoding="utf-8"))
    flash = flash_read_mb_s([folder / entry["file"] for entry in described.values()])
    from export.host.executorch_1_5_1 import Bindings

    # What the runner has loaded before it loads a bundle.
    import_all()
    executorch = Bindings(threads)
    # A first run brings in pages of the libraries that loading alone does not.
    call = _Program(executorch, folder / described["call"]["file"], described["call"])
    call.time(1)
    memory = memory_sampler.sample()
    programs = {
        name: _Program(executorch, folder / entry["file"], entry)
        for name, entry in described.items()
    }
    for _ in range(ROUNDS):
        for name, program in programs.items():
            for rows in _rows_of(name):
                program.time(rows)
    rates = {
        name: [[rows, programs[name].gops(rows)] for rows in ROWS]
        for name in ("int4", "int8", "fp32")
    }
    call_s = programs["call"].seconds(1)
    small, calls = programs["small"], described["small"]["operations_per_row"] / 16
    operator_s = max(small.seconds(1) - call_s, 0.0) / calls
    simple_s = programs["simple"].seconds(SIMPLE_ROWS)
    simple = SIMPLE_ROWS * described["simple"]["operations_per_row"]
    scores = _softmax_scores(described)
    softmax_s = programs["attention"].seconds(SIMPLE_ROWS) - programs["fp32"].seconds(SIMPLE_ROWS)
    return {
        "threads": executorch.threads,
        "rates": rates,
        "memory_gb_s": 1e-9 * described["bandwidth"]["bytes"] / programs["bandwidth"].seconds(1),
        "simple_gvalues_s": 1e-9 * simple / max(simple_s - call_s, 1e-9),
        "softmax_gvalues_s": 1e-9 * scores / max(softmax_s, 1e-9),
        "copy_gb_s": 1e-9 * described["copy"]["bytes"] / programs["copy"].seconds(1),
        "operator_us": 1e6 * operator_s,
        "call_us": 1e6 * call_s,
        "flash_read_mb_s": flash,
        "runtime_anonymous_bytes": memory["anonymous_bytes"],
        "runtime_file_bytes": memory["file_bytes"],
        "processor": processor_name(),
        "ram_bytes": _ram_bytes(),
    }


def import_all() -> None:
    """What the runner has imported when it loads a bundle."""
    import jinja2.sandbox  # noqa: F401
    import tokenizers  # noqa: F401

    import export.contract.bundle
    import export.host.runner.progress
    import export.host.runner.work
    import export.host.tokenizer  # noqa: F401


def _rows_of(name: str) -> tuple[int, ...]:
    """Numbers of rows at which a program is timed."""
    if name in ("int4", "int8", "fp32"):
        return ROWS
    return (SIMPLE_ROWS,) if name in ("simple", "attention") else (1,)


def _softmax_scores(described: dict[str, Any]) -> float:
    heads, _, _ = described["attention"]["inputs"][0]["shape"]
    _, keys = described["attention"]["inputs"][3]["shape"]
    return float(heads * SIMPLE_ROWS * keys)


class _Program:
    """A loaded program that can be timed at a number of rows."""

    def __init__(self, executorch: Any, path: Path, described: dict[str, Any]) -> None:
        from export.host.process import captured_stderr

        with captured_stderr():
            self._program = executorch.load_program(str(path))
            self._method = self._program.load_method("forward")
        self._inputs = described["inputs"]
        self._operations = described["operations_per_row"]
        self._known: dict[int, float] = {}

    def gops(self, rows: int) -> float:
        """10^9 operations a second at so many rows."""
        return 1e-9 * self._operations * rows / self.seconds(rows)

    def seconds(self, rows: int) -> float:
        """Of one run, in the fastest round so far."""
        return self._known[rows]

    def time(self, rows: int) -> None:
        """Measure once more."""
        found = self._measure(self._make(rows))
        self._known[rows] = min(found, self._known.get(rows, found))

    def _make(self, rows: int) -> Callable[[], Any]:
        import torch

        generator = torch.Generator().manual_seed(0)
        tensors = []
        for described in self._inputs:
            shape = list(described["shape"])
            if described["rows_axis"] is not None:
                shape[described["rows_axis"]] = rows
            if described["dtype"] == "int64":
                tensors.append(torch.arange(shape[0]))
            else:
                tensors.append(torch.randn(shape, generator=generator))
        return lambda: self._method(tensors)

    def _measure(self, run: Callable[[], Any]) -> float:
        """Median of the repeats, after one that warms up."""
        import torch

        torch.set_num_threads(1)
        run()
        times: list[float] = []
        end = time.perf_counter() + BUDGET_S
        while len(times) < LEAST_REPEATS or (
            time.perf_counter() < end and len(times) < MOST_REPEATS
        ):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return statistics.median(times)


def flash_read_mb_s(files: list[Path]) -> float | None:
    """Sequential read of files that the page cache was made to drop; None where it keeps them."""
    page_cache.drop(files)
    resident = page_cache.resident_share(files)
    if resident is None or resident > 0.1:
        return None
    total, began = 0, time.perf_counter()
    for path in files:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while chunk := os.read(descriptor, READ_BYTES):
                total += len(chunk)
        finally:
            os.close(descriptor)
    return 1e-6 * total / (time.perf_counter() - began)


def _ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


if __name__ == "__main__":
    main()
