"""A model at its full size through this machine: random weights, quantized, lowered, checked.

    python -m benchmarks.rehearsal WORK [--model NAME] [--recipe NAME] [--layers N]

1. Shard by shard: written (`scripts.training.make_checkpoint --only`), quantized
   (`quantize --available`), deleted, so the source never takes more of the disk than a shard.
2. `export --layers-per-stage 1`: one program for each layer.
3. `benchmarks.stage_check`: every program against its module; then the int4 checkpoint is deleted.
4. `inspect`: the SHA-256 of every file.

Each step is the command that a user would give, in a process of its own. Its time, its peak RSS and
what WORK took of the disk at most are noted in WORK/log.jsonl; a step that is noted is not done
again, and one that was killed goes on where it was.

stdout: tables for people; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from export.contract.bundle import open_bundle
from export.host.process import processor_name
from export.plan.presets import read_config
from quantize.checkpoint import RECIPE_FILE
from quantize.files.journal import Journal
from quantize.sizes import parse_bytes
from scripts.training.make_checkpoint import MAX_SHARD_BYTES, RandomCheckpoint, plan_checkpoint

GIB = 2**30
DISK_INTERVAL_S = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="diffusiongemma-26b-a4b")
    parser.add_argument("--recipe", default="int4-g32-embed4")
    parser.add_argument("--layers", type=int, help="cut the model to its first layers")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--max-shard-size", type=parse_bytes, default=MAX_SHARD_BYTES)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = plan_checkpoint(
        read_config(arguments.model)[1],
        layers=arguments.layers,
        max_shard_bytes=arguments.max_shard_size,
    )
    log = Log(work)
    rehearse(arguments, checkpoint, log)
    _report(arguments, checkpoint, log.records)


class Log:
    """WORK/log.jsonl: a record for each step that was done."""

    def __init__(self, work: Path):
        self.work = work
        self._begun = work / "begun"
        self._journal = Journal(work / "log.jsonl", "rehearsal")
        if self._journal.is_new:
            self._journal.begin()
        self.records: list[dict[str, Any]] = list(self._journal.records)

    def has(self, step: str) -> bool:
        """Whether an earlier run did it."""
        return any(record["step"] == step for record in self.records)

    def run(self, step: str, command: list[str], result: Path | None = None) -> dict[str, Any]:
        """The step's process, which must end well; its record is not noted yet.

        A `result` that is there is of a run that was killed before it noted so: its figures are
        lost.
        """
        if result is not None and result.exists():
            figures = ("seconds", "processor_s", "peak_rss_bytes", "peak_disk_bytes")
            return {"step": step, "lost": True, "printed": ""} | dict.fromkeys(figures, 0)
        print(f"{step}: python -m {' '.join(command)}", file=sys.stderr, flush=True)
        resumed = self._begun.exists() and self._begun.read_text(encoding="utf-8") == step
        self._begun.write_text(step, encoding="utf-8")
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", *command],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        )
        disk = _Disk(self.work)
        assert process.stdout is not None
        with process.stdout, disk:
            lines = process.stdout.read().splitlines()
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"{step} ended with exit code {process.returncode}")
        return {
            "step": step,
            "resumed": resumed,  # then the figures are of the last attempt alone
            "seconds": round(time.monotonic() - began, 1),
            "processor_s": round(usage.ru_utime + usage.ru_stime, 1),
            "peak_rss_bytes": usage.ru_maxrss * 1024,
            "peak_disk_bytes": disk.peak_bytes,
            "load_average": os.getloadavg(),
            "printed": lines[-1] if lines else "",
        }

    def note(self, record: dict[str, Any]) -> None:
        """The step is done, and stays so after a power cut."""
        record = {key: value for key, value in record.items() if key != "printed"}
        self._journal.append([record])
        self.records.append(record)


class _Disk:
    """The most that a folder takes of the disk while this is entered."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak_bytes = 0

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            ended = self._ended.wait(DISK_INTERVAL_S)
            self.peak_bytes = max(self.peak_bytes, disk_bytes(self._folder))
            if ended:
                return


def disk_bytes(folder: Path) -> int:
    """What the files in a folder take of the disk now."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:  # it went in the meantime
            continue
    return total


def rehearse(arguments: argparse.Namespace, checkpoint: RandomCheckpoint, log: Log) -> None:
    """Do the steps that the log does not have."""
    work = log.work
    source, int4, bundle = work / "source", work / "int4", work / "bundle"
    for number, (file, specs) in enumerate(checkpoint.shards.items(), start=1):
        make, quantize = f"make {number}", f"quantize {number}"
        if not log.has(make):
            command = [arguments.model, str(source), "--only", str(number), *_layout(arguments)]
            record = log.run(make, ["scripts.training.make_checkpoint", *command])
            log.note(record | {"bytes": (source / file).stat().st_size})
        if not log.has(quantize):
            command = [str(source), str(int4), "--available", "--recipe", arguments.recipe]
            record = log.run(quantize, [*verb("quantize"), *command], result=int4)
            result = {"weights": sum(math.prod(spec.shape) for spec in specs.values())}
            if number == len(checkpoint.shards):
                result |= _quantized(int4)
            log.note(record | result)
        (source / file).unlink(missing_ok=True)
    if not log.has("export"):
        cut = ["--layers-per-stage", "1", "--context", str(arguments.context)]
        command = [*verb("export"), str(int4), str(bundle), *cut]
        record = log.run("export", command, result=bundle)
        log.note(record | exported(bundle))
    if not log.has("check"):
        command = ["benchmarks.stage_check", str(int4), str(bundle), str(work / "check")]
        record = log.run("check", command)
        log.note(record | {"checked": json.loads(record["printed"])})
    for folder in (source, int4, work / "check"):
        shutil.rmtree(folder, ignore_errors=True)
    if not log.has("inspect"):
        log.note(log.run("inspect", [*verb("inspect"), str(bundle)]))


def _layout(arguments: argparse.Namespace) -> list[str]:
    cut = [] if arguments.layers is None else ["--layers", str(arguments.layers)]
    return ["--max-shard-size", str(arguments.max_shard_size), *cut]


def verb(name: str) -> list[str]:
    """A verb of the command line, as a module's arguments."""
    return ["scripts.pocketdiff", name, "--json"]


def _quantized(folder: Path) -> dict[str, Any]:
    """Bits a weight, and bytes by layer, of an int4 checkpoint."""
    tensors = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))["tensors"]
    by_layer: dict[str, int] = {}
    for entry in tensors.values():
        by_layer[entry["layer"]] = by_layer.get(entry["layer"], 0) + entry["bytes_after"]
    weights = sum(math.prod(entry["shape"]) for entry in tensors.values())
    return {
        "written_weights": weights,
        "bits_per_weight": 8 * sum(by_layer.values()) / weights,
        "bytes_by_layer": by_layer,
    }


def exported(folder: Path) -> dict[str, Any]:
    """Bytes of each program of a bundle, and how long after the one before it was written.

    The first, whose beginning no file tells, is left out of the times.
    """
    bundle = open_bundle(folder, verify=False)
    stages = bundle.manifest.stages
    written = [(folder / stage.file).stat().st_mtime for stage in stages]
    return {
        "bytes": bundle.total_bytes,
        "bytes_by_stage": {stage.name: bundle.files[stage.file].bytes for stage in stages},
        "seconds_by_stage": {
            stage.name: round(after - before, 1)
            for stage, before, after in zip(stages[1:], written, written[1:], strict=False)
        },
    }


def _report(
    arguments: argparse.Namespace, checkpoint: RandomCheckpoint, records: list[dict[str, Any]]
) -> None:
    console = Console(width=100)
    console.print(_step_table(arguments, records))
    by_step = {record["step"]: record for record in records}
    quantized, lowered = by_step[f"quantize {len(checkpoint.shards)}"], by_step["export"]
    checked = {stage["stage"]: stage for stage in by_step["check"]["checked"]["stages"]}
    console.print(
        f"{quantized['written_weights'] / 1e9:.2f} G weights, "
        f"{quantized['bits_per_weight']:.3f} bits each "
        f"in int4; at most {_peak_disk_bytes(records) / 1e9:.1f} GB of the disk in use"
    )
    table = Table(title="programs")
    for name in ("program", "MB", "seconds", "error", "the layer before's weights"):
        table.add_column(name, justify="left" if name == "program" else "right")
    for name, size in lowered["bytes_by_stage"].items():
        seconds = lowered["seconds_by_stage"].get(name)
        wrong = checked[name].get("error_of_the_layer_before")
        table.add_row(
            name,
            f"{size / 1e6:.1f}",
            "" if seconds is None else f"{seconds:.1f}",
            f"{checked[name]['error']:.1e}",
            "" if wrong is None else f"{wrong:.2f}",
        )
    console.print(table)
    conditions = {
        "model": arguments.model,
        "recipe": arguments.recipe,
        "layers": arguments.layers or "all",
        "context": arguments.context,
        "shards": len(checkpoint.shards),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "executorch": version("executorch"),
        "torch": version("torch"),
    }
    print(json.dumps({"benchmark": "rehearsal", "conditions": conditions, "steps": records}))


def _step_table(arguments: argparse.Namespace, records: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{arguments.model}, {arguments.recipe}")
    for name in ("step", "minutes", "processor minutes", "peak RSS, GiB", "disk in use, GB"):
        table.add_column(name, justify="left" if name == "step" else "right")
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["step"].split()[0], []).append(record)
    for name, group in groups.items():
        table.add_row(
            name if len(group) == 1 else f"{name}, {len(group)} shards",
            f"{sum(record['seconds'] for record in group) / 60:.1f}",
            f"{sum(record['processor_s'] for record in group) / 60:.1f}",
            f"{max(record['peak_rss_bytes'] for record in group) / GIB:.2f}",
            f"{_peak_disk_bytes(group) / 1e9:.1f}",
        )
    return table


def _peak_disk_bytes(records: list[dict[str, Any]]) -> int:
    """The most that any of the steps had on the disk."""
    return max(record["peak_disk_bytes"] for record in records)


if __name__ == "__main__":
    main()
