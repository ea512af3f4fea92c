"""Predicted against measured: peak memory and step time of bundles, as `plan` says and as they run.

    python -m benchmarks.plan_accuracy WORK DEVICE.toml [NAME ...] [--rounds 3]

WORK holds the bundles of `benchmarks.plan_accuracy_models`, made where they are missing (minutes
each). DEVICE.toml is what `pocketdiff plan --measure` wrote on this machine. Each run is a process
of its own, the Linux runner with a fixed number of steps: its peak RSS, and the median over steps
of layers and head together. In rounds, so that a bad minute meets all bundles alike; the fastest
round counts, as it does in `plan --measure`, since other processes only ever slow one down. The
error against the median of the rounds is shown beside.

Predicted are: the step's time from config.json and the device's rates; the peak RSS from
config.json (`config`), and from the bundle's program files (`files`), as `push` and `bench` do.

stdout: a table for people; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.plan_accuracy_models import MODELS, bundle_of
from export.families import read_shape
from export.plan.budget import budget_of_bundle, budget_of_layout
from export.plan.device import Device, open_device
from export.plan.layout import lay_out
from export.plan.roofline import time_of
from export.plan.work import Experts, step_pass
from quantize.recipe import preset

PROMPT = 32
STEPS = 12
TOKENS = 24
"""Of an autoregressive model: a step each."""
THREADS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("device")
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device = open_device(arguments.device)
    work = arguments.work.resolve()
    bundles = {name: bundle_of(work, name) for name in arguments.names}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in bundles}
    for number in range(arguments.rounds):
        for name, bundle in bundles.items():
            runs[name].append(_run(bundle))
            said = runs[name][-1]
            print(
                f"round {number + 1} {name}: {said['step_ms']:.1f} ms, "
                f"{said['peak_rss_bytes'] / 1e6:.0f} MB",
                file=sys.stderr,
                flush=True,
            )
    rows = [_row(name, bundles[name], work, device, runs[name]) for name in bundles]
    _report(arguments, device, rows)


def _run(bundle: Path) -> dict[str, float]:
    """One process of the runner; its median step and its peak."""
    manifest = json.loads((bundle / "bundle.json").read_text())
    canvas = manifest["model"]["canvas_length"]
    is_causal = manifest["style"] == "autoregressive"
    request = {
        "protocol": 1, "run_id": "accuracy", "bundle": str(bundle), "bundle_sha256": None,
        "prompts": [list(range(100, 100 + PROMPT))],
        "max_new_tokens": TOKENS if is_causal else canvas, "verify": False, "threads": THREADS,
        "cold": False, "warmup_steps": 2, "seed": 0, "force_steps": 1 if is_causal else STEPS,
        "settings": None, "memory_interval_ms": None, "memory_limit_bytes": None,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "request.json").write_text(json.dumps(request))
        done = subprocess.run(
            [sys.executable, "-P", "-m", "export.host.runner", str(folder / "request.json")],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(f"{bundle}: {done.stderr[-1000:]}")
        result = json.loads((folder / "result.json").read_text())
    steps = [
        step["layers_ms"] + step["head_ms"]
        for made in result["answers"][0]["canvases"]
        for step in made["steps"]
    ]
    return {
        "step_ms": statistics.median(steps),
        "peak_rss_bytes": result["memory"]["peak_rss_bytes"],
    }


def _row(
    name: str, bundle: Path, work: Path, device: Device, runs: list[dict[str, float]]
) -> dict[str, Any]:
    from export.contract.bundle import open_bundle

    opened = open_bundle(bundle, verify=False)
    manifest = opened.manifest
    config = json.loads((work / f"{name}.int4" / "config.json").read_text())
    shape, recipe = read_shape(config), preset(MODELS[name].recipe)
    context, computation = manifest.model.maximum_context, manifest.experts.computation
    experts: Experts = "routed" if computation == "none" else computation
    layout = lay_out(shape, recipe, context=context, rows=max(PROMPT, shape.step_rows))
    time = time_of(step_pass(shape, recipe, context=context, experts=experts), device)
    best = time_of(step_pass(shape, recipe, context=context), device)
    by_config = budget_of_layout(layout, device).total_bytes
    by_files = budget_of_bundle(opened, device, workspace_bytes=layout.workspace_bytes).total_bytes
    measured_ms = min(run["step_ms"] for run in runs)
    median_ms = statistics.median(run["step_ms"] for run in runs)
    peak = max(run["peak_rss_bytes"] for run in runs)
    return {
        "name": name,
        "parameters": shape.total_parameters,
        "bundle_bytes": opened.total_bytes,
        "predicted_bundle_bytes": layout.file_bytes,
        "peak_rss_bytes": peak,
        "predicted_rss_bytes": {"config": by_config, "files": by_files},
        "rss_error": {"config": by_config / peak - 1, "files": by_files / peak - 1},
        "step_ms": measured_ms,
        "step_ms_of_rounds": [run["step_ms"] for run in runs],
        "predicted_step_ms": time.expected_ms,
        "step_error": (time.expected_ms or 0.0) / measured_ms - 1,
        "step_error_of_median": (time.expected_ms or 0.0) / median_ms - 1,
        "roofline_ms": best.best_ms,
        "share_of_roofline": best.best_ms / measured_ms,
        "bound": best.bound,
        "experts": computation,
    }


def _report(arguments: argparse.Namespace, device: Device, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=118)
    table = Table(title="peak RSS, MB", title_justify="left")
    table.add_column("bundle")
    for heading in ("parameters, M", "measured", "from config", "error", "from files", "error"):
        table.add_column(heading, justify="right")
    for row in rows:
        predicted, error = row["predicted_rss_bytes"], row["rss_error"]
        table.add_row(
            row["name"],
            f"{row['parameters'] / 1e6:.0f}",
            f"{row['peak_rss_bytes'] / 1e6:.0f}",
            f"{predicted['config'] / 1e6:.0f}",
            f"{100 * error['config']:+.1f} %",
            f"{predicted['files'] / 1e6:.0f}",
            f"{100 * error['files']:+.1f} %",
        )
    console.print(table)
    table = Table(title="a step (denoising, or a token), ms", title_justify="left")
    table.add_column("bundle")
    headings = (
        "rounds", "fastest", "predicted", "error", "of median", "roofline", "bound", "share",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            ", ".join(f"{ms:.1f}" for ms in row["step_ms_of_rounds"]),
            f"{row['step_ms']:.1f}",
            f"{row['predicted_step_ms']:.1f}",
            f"{100 * row['step_error']:+.0f} %",
            f"{100 * row['step_error_of_median']:+.0f} %",
            f"{row['roofline_ms']:.1f}",
            row["bound"],
            f"{100 * row['share_of_roofline']:.0f} %",
        )
    console.print(table)
    document = {
        "benchmark": "plan_accuracy",
        "conditions": {
            "device": device.title,
            "measured": device.measured,
            "threads": THREADS,
            "rounds": arguments.rounds,
            "steps": STEPS,
            "load_average_at_end": os.getloadavg(),
            "executorch": version("executorch"),
        },
        "bundles": rows,
    }
    print(json.dumps(document, separators=(",", ":")))


if __name__ == "__main__":
    main()
