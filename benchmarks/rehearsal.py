"""A model at its full size through this machine: random weights, quantized, lowered, checked.

    python -m benchmarks.rehearsal WORK [--model NAME] [--recipe NAME] [--layers N] [--keep]

Each step is the command that a user would give, in a process of its own whose time and peak RSS are
noted in WORK/log.jsonl; a step that is noted is not done again, and one that was killed goes on
where it was. The bf16 checkpoint is removed once it is quantized, and the int4 one once it is
lowered unless --keep is given, so the disk needs room for the two largest neighbours: 3 bytes a
weight at the worst.

stdout: a table for people; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from export.bundle import open_bundle
from export.plan.families import read_shape
from export.plan.presets import read_config
from quantize.checkpoint import RECIPE_FILE

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="diffusiongemma-26b-a4b")
    parser.add_argument("--recipe", default="int4-g32-embed4")
    parser.add_argument("--layers", type=int, help="cut the model to its first layers")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--keep", action="store_true", help="keep the int4 checkpoint")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    rehearse(arguments, work)
    _report(arguments, work)


def rehearse(arguments: argparse.Namespace, work: Path) -> None:
    """Do the steps that WORK/log.jsonl does not have."""
    done = {record["step"] for record in read_log(work)}
    source, int4, bundle = work / "bf16", work / "int4", work / "bundle"
    layers = [] if arguments.layers is None else ["--layers", str(arguments.layers)]
    context = ["--maximum-context", str(arguments.context)]
    steps: list[tuple[str, list[str], Path]] = [
        (
            "make",
            ["scripts.make_checkpoint", arguments.model, str(source), *layers],
            source,
        ),
        (
            "quantize",
            [*verb("quantize"), str(source), str(int4), "--recipe", arguments.recipe],
            int4,
        ),
        (
            "export",
            [*verb("export"), str(int4), str(bundle), "--layers-per-stage", "1", *context],
            bundle,
        ),
        ("inspect", [*verb("inspect"), str(bundle)], bundle),
    ]
    for step, command, result in steps:
        if step in done:
            continue
        record = run(step, command)
        record["bytes"] = sum(f.stat().st_size for f in result.rglob("*") if f.is_file())
        if step == "quantize":
            record |= _quantized(int4)
        if step == "export":
            record |= _exported(bundle)
        with (work / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
            log.flush()
            os.fsync(log.fileno())
        if step == "quantize":
            shutil.rmtree(source)
        if step == "export" and not arguments.keep:
            shutil.rmtree(int4)


def verb(name: str) -> list[str]:
    """A verb of the command line, as a module's arguments."""
    return ["scripts.pocketdiff", name, "--json"]


def run(step: str, command: list[str]) -> dict[str, Any]:
    """One step's process: seconds, processor seconds, peak RSS in bytes."""
    print(f"{step}: python -m {' '.join(command)}", file=sys.stderr, flush=True)
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", *command],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{step} ended with exit code {process.returncode}")
    return {
        "step": step,
        "command": " ".join(command[:2]),
        "seconds": round(time.monotonic() - began, 1),
        "processor_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "load_average": os.getloadavg(),
    }


def _quantized(folder: Path) -> dict[str, Any]:
    """Weights, bits a weight, and bytes by layer of an int4 checkpoint."""
    tensors = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))["tensors"]
    by_layer: dict[str, int] = {}
    weights = 0
    for entry in tensors.values():
        count = 1
        for size in entry["shape"]:
            count *= size
        weights += count
        by_layer[entry["layer"]] = by_layer.get(entry["layer"], 0) + entry["bytes_after"]
    total = sum(by_layer.values())
    return {
        "weights": weights,
        "bits_per_weight": 8 * total / weights,
        "bytes_by_layer": by_layer,
    }


def _exported(folder: Path) -> dict[str, Any]:
    """Bytes of each program of a bundle, and how long after the one before it was written.

    The first, whose beginning no file tells, is left out of the times.
    """
    bundle = open_bundle(folder, verify=False)
    stages = bundle.manifest.stages
    written = [(folder / stage.file).stat().st_mtime for stage in stages]
    return {
        "bytes_by_stage": {stage.name: bundle.files[stage.file].bytes for stage in stages},
        "seconds_by_stage": {
            stage.name: round(after - before, 1)
            for stage, before, after in zip(stages[1:], written, written[1:], strict=False)
        },
    }


def read_log(work: Path) -> list[dict[str, Any]]:
    """The steps that were done."""
    path = work / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _report(arguments: argparse.Namespace, work: Path) -> None:
    records = read_log(work)
    table = Table(title=f"{arguments.model}, {arguments.recipe}")
    for name in ("step", "minutes", "processor minutes", "peak RSS, GiB", "result, GB"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for record in records:
        table.add_row(
            record["step"],
            f"{record['seconds'] / 60:.1f}",
            f"{record['processor_s'] / 60:.1f}",
            f"{record['peak_rss_bytes'] / GIB:.2f}",
            f"{record['bytes'] / 1e9:.2f}",
        )
    console = Console(width=100)
    console.print(table)
    for record in records:
        if "bits_per_weight" in record:
            console.print(
                f"{record['weights'] / 1e9:.2f} G weights, {record['bits_per_weight']:.3f} bits "
                "each in the int4 checkpoint"
            )
        if "bytes_by_stage" in record:
            for name, size in record["bytes_by_stage"].items():
                seconds = record["seconds_by_stage"].get(name)
                took = "" if seconds is None else f"{seconds:9.1f} s"
                console.print(f"{name:12} {size / 1e6:9.1f} MB {took}")
    conditions = {
        "model": arguments.model,
        "recipe": arguments.recipe,
        "layers": arguments.layers or read_shape(read_config(arguments.model)[1]).num_layers,
        "context": arguments.context,
        "cores": os.cpu_count(),
        "executorch": version("executorch"),
        "torch": version("torch"),
    }
    print(json.dumps({"benchmark": "rehearsal", "conditions": conditions, "steps": records}))


if __name__ == "__main__":
    main()
