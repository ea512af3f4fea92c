"""Time and memory of lowering DiffusionGemma 26B-A4B's layers by their number: a line.

    python -m benchmarks.lowering WORK --layers 6 12 18

One int4 checkpoint with random weights and as many layers as the most is made, with a vocabulary
of 4,096: the head's lowering takes minutes whatever the depth, and the machine's noise in it would
hide the layers. Every depth is exported from it in a process of its own, its config.json naming so
many layers, --rounds times in turn.

stdout: a table for people; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.line_fit import line_through
from benchmarks.rehearsal import GIB, Log, exported, verb
from export.host.process import processor_name
from export.plan.presets import read_config
from quantize.checkpoint import CONFIG_FILE, open_checkpoint
from scripts.training.make_checkpoint import cut_config

MODEL = "diffusiongemma-26b-a4b"
VOCABULARY = 4096
CONTEXT = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="with 3 GB to spare for each layer")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 18])
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    log = Log(work)
    int4 = _checkpoint(work, max(arguments.layers), log)
    records = []
    for round_number in range(arguments.rounds):
        for layers in arguments.layers:
            step = f"export {layers}, round {round_number + 1}"
            records.append(_export(step, int4, work, layers, log))
    _report(arguments, records)


def _checkpoint(work: Path, layers: int, log: Log) -> Path:
    int4 = work / f"int4-{layers}"
    if int4.exists():
        return int4
    config = read_config(MODEL)[1]
    config["text_config"]["vocab_size"] = VOCABULARY
    (work / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    source = work / "source"
    make = [str(work / CONFIG_FILE), str(source), "--layers", str(layers), "--overwrite"]
    log.run("make", ["scripts.training.make_checkpoint", *make])
    log.run("quantize", [*verb("quantize"), str(source), str(int4)])
    shutil.rmtree(source)
    return int4


def _export(step: str, int4: Path, work: Path, layers: int, log: Log) -> dict[str, Any]:
    """The first layers of the checkpoint, by a folder of links with a config.json of its own."""
    folder, bundle = work / "first", work / "bundle"
    for old in (folder, bundle):
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir()
    for path in int4.iterdir():
        if path.name != CONFIG_FILE:
            (folder / path.name).symlink_to(path)
    config = json.loads((int4 / CONFIG_FILE).read_text(encoding="utf-8"))
    cut_config(config, layers)
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    command = [str(folder), str(bundle), "--layers-per-stage", "1"]
    record = log.run(step, [*verb("export"), *command, "--context", str(CONTEXT)])
    checkpoint = open_checkpoint(int4)
    weights = sum(
        math.prod(checkpoint.shape(name))
        for name in checkpoint.names()
        if any(f".decoder.layers.{number}." in name for number in range(layers))
    )
    record |= {"layers": layers, "weights_of_layers": weights, **exported(bundle)}
    shutil.rmtree(bundle)
    del record["printed"]
    return record


def _report(arguments: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    table = Table(title=f"{MODEL}, int4-g32, {VOCABULARY} tokens: export, a program for each layer")
    for name in ("layers", "weights", "seconds", "two kinds", "a further layer", "peak RSS"):
        table.add_column(name, justify="right")
    for record in records:
        took = sorted(t for n, t in record["seconds_by_stage"].items() if n.startswith("layers"))
        table.add_row(
            str(record["layers"]),
            f"{record['weights_of_layers'] / 1e9:.2f} G",
            f"{record['seconds']:.1f}",
            f"{sum(took[-2:]):.1f}",
            f"{median(took[:-2]):.2f}",
            f"{record['peak_rss_bytes'] / GIB:.2f} GiB",
        )
    console = Console(width=100)
    console.print(table)
    start, slope, off = line_through(
        [record["weights_of_layers"] for record in records],
        [record["seconds"] for record in records],
    )
    console.print(
        f"a line through them: {start:.1f} s and {1e9 * slope:.2f} s for 1 G weights, "
        f"off by {100 * off:.1f} % at most"
    )
    conditions = {
        "model": MODEL,
        "recipe": "int4-g32",
        "vocabulary": VOCABULARY,
        "context": CONTEXT,
        "rounds": arguments.rounds,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "executorch": version("executorch"),
        "torch": version("torch"),
    }
    line = {"start_s": start, "seconds_per_weight": slope, "largest_deviation": off}
    document = {"benchmark": "lowering", "conditions": conditions, "line": line, "rows": records}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
