"""Speed and memory of quantizing DiffusionGemma 26B-A4B's layers: time is linear in weights.

    python -m benchmarks.quantizer --folder /a/folder/with/room

For each number of layers a checkpoint with random weights of the released shapes is written
(`scripts.training.make_checkpoint`), quantized in a process of its own, and both are deleted. Peak
RSS is that process's `ru_maxrss`, all of Python and torch included, and so are pages of the mapped
source. The source has just been written and may lie in the page cache: of its reading from the
disk, `read_s` tells what it would take (a plain read of the same files after their pages were
dropped).

stdout: a table for people; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.line_fit import line_through
from export.families import read_shape
from export.host.process import processor_name
from export.plan.layout import checkpoint_bytes
from export.plan.presets import read_config
from quantize.recipe import preset
from scripts.training.make_checkpoint import plan_checkpoint, write_checkpoint

MODEL = "diffusiongemma-26b-a4b"
FULL_LAYERS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="with some 10 GB to spare")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipe", default="int4-g32")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(arguments.folder, arguments.recipe)
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            rows.append(_measure(Path(folder), layers, arguments.recipe))
    _report(arguments, rows)


def _measure(folder: Path, layers: int, recipe: str) -> dict[str, Any]:
    began = time.perf_counter()
    checkpoint = plan_checkpoint(read_config(MODEL)[1], layers=layers)
    write_checkpoint(checkpoint, folder / "checkpoint")
    made_s = time.perf_counter() - began
    read_s = _read_s(folder / "checkpoint")
    command = [sys.executable, "-m", "benchmarks.quantizer", "--child", "--recipe", recipe]
    child = subprocess.run(
        [*command, "--folder", str(folder)], stdout=subprocess.PIPE, text=True, check=True
    )
    return {"layers": layers, "made_s": made_s, "read_s": read_s, **json.loads(child.stdout)}


def _read_s(folder: Path) -> float:
    """Seconds for reading all shards from the disk."""
    shards = sorted(folder.glob("*.safetensors"))
    for path in shards:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    began = time.perf_counter()
    buffer = bytearray(2**24)
    for path in shards:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def _child(folder: Path, recipe: str) -> None:
    import torchao.quantization  # noqa: F401 (seconds, once a process)

    from quantize.quantizer import quantize_checkpoint

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    report = quantize_checkpoint(folder / "checkpoint", folder / "int4", preset(recipe))
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total = report.total()
    result = {
        "weights": total.elements,
        "seconds": seconds,
        "bits_per_weight": total.bits_per_weight,
        "snr_db": total.snr_db,
        "peak_rss_bytes": 1024 * peak,
        "rss_before_bytes": 1024 * before,
        "layer_bits_per_weight": next(
            row.bits_per_weight for row in report.by_layer() if row.name.endswith("layers.0")
        ),
    }
    shutil.rmtree(folder / "int4")
    print(json.dumps(result))


def _report(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{MODEL} cut to some layers, recipe {arguments.recipe}")
    for heading in (
        "layers", "weights", "seconds", "M weights/s", "peak RSS", "bits/weight",
        "bits/weight of a layer", "made in", "read in",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["layers"]),
            f"{row['weights'] / 1e9:.2f} G",
            f"{row['seconds']:.1f}",
            f"{row['weights'] / row['seconds'] / 1e6:.1f}",
            f"{row['peak_rss_bytes'] / 2**30:.2f} GiB",
            f"{row['bits_per_weight']:.3f}",
            f"{row['layer_bits_per_weight']:.3f}",
            f"{row['made_s']:.1f} s",
            f"{row['read_s']:.1f} s",
        )
    console = Console(width=130)
    console.print(table)
    summary: dict[str, float] = {}
    if len(rows) > 1:
        # Least squares of seconds over weights; the rest of each row tells how linear it is.
        start_s, slope, off = line_through(
            [row["weights"] for row in rows], [row["seconds"] for row in rows]
        )
        shape = read_shape(read_config(MODEL)[1])
        whole = shape.total_parameters
        summary = {
            "start_s": start_s,
            "weights_per_s": 1 / slope,
            "largest_deviation": off,
            "whole_weights": whole,
            "whole_minutes": (start_s + slope * whole) / 60,
            "whole_bits_per_weight": 8 * checkpoint_bytes(shape, preset(arguments.recipe)) / whole,
        }
        console.print(
            f"a line through them: {start_s:.1f} s and {1 / slope / 1e6:.1f} M weights/s, "
            f"off by {100 * off:.0f} % at most; so {FULL_LAYERS} layers, {whole / 1e9:.2f} G "
            f"weights, take {summary['whole_minutes']:.1f} minutes and, as planned from their "
            f"shapes, {summary['whole_bits_per_weight']:.3f} bits a weight"
        )
    conditions = {
        "model": MODEL,
        "recipe": arguments.recipe,
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor_name(),
        "load_average_at_end": os.getloadavg(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "torchao": version("torchao"),
    }
    document = {"benchmark": "quantizer", "conditions": conditions, "rows": rows, "line": summary}
    print(json.dumps(document, separators=(",", ":")))


if __name__ == "__main__":
    main()
