"""The record of one run: what was measured, under which conditions, and how it ended."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from device_tests.bench.context import BenchContext
from device_tests.bench.failures import Failure
from device_tests.bench.plan import PlannedRun
from device_tests.bench.remote_run import RunOutcome
from device_tests.bench.thermal_gate import ThermalGate
from device_tests.remote import sensors
from device_tests.remote.conditions import Clocks
from device_tests.results import records
from device_tests.results.records import Record
from export.contract.manifest import Manifest
from export.host.puzzles import Puzzle, is_exact


def make_record(
    context: BenchContext,
    run: PlannedRun,
    run_id: str,
    started_at: str,
    gate: ThermalGate,
    samples: Sequence[Mapping[str, Any]],
    outcome: RunOutcome,
    failure: Failure | None,
    runner_versions: Mapping[str, str],
) -> Record:
    """The record of a run, whatever became of it, with its metrics."""
    record: Record = {
        "schema_version": records.SCHEMA_VERSION,
        "record": "run",
        "bench_id": context.bench_id,
        "run_id": run_id,
        "pass": run.pass_,
        "repeat": run.repeat,
        "started_at": started_at,
        "status": "ok" if failure is None else "failed",
        "failure": None if failure is None else _failure_json(failure),
        "conditions": _conditions(context, run, gate, runner_versions),
        "gate": gate.to_json(),
        "sensors": list(samples),
        "result": outcome.result,
        "memory": [_flat(e) for e in outcome.events if e["event"] == "memory"],
        "steps": [e for e in outcome.events if e["event"] == "step"],
        "metrics": {},
    }
    if run.pass_ == "puzzles" and failure is None and outcome.result is not None:
        record["puzzles"] = [
            asdict(puzzle) | {"is_exact": is_exact(puzzle, answer["text"])}
            for puzzle, answer in zip(context.puzzles, outcome.result["answers"], strict=True)
        ]
    # Imported here: the table of metrics brings libraries that a start need not wait for.
    from device_tests.results import metrics

    return record | {"metrics": metrics.compute(record)}


def missing_answers(outcome: RunOutcome, puzzles: Sequence[Puzzle]) -> Failure | None:
    """The failure of a run over puzzles that has not an answer for each."""
    answers = (outcome.result or {}).get("answers") or ()
    if len(answers) == len(puzzles):
        return None
    return Failure(
        "internal",
        f"the runner gave {len(answers)} answers to {len(puzzles)} puzzles; use a runner "
        "and a host of one version",
        {"answers": len(answers)},
    )


def runner_versions(outcome: RunOutcome) -> dict[str, str] | None:
    """The versions that the runner stated; None if it failed before."""
    for event in outcome.events:
        if event["event"] == "started":
            runtime = event["runtime"]
            own = {"runtime_host": runtime["host"], "runtime": runtime["version"]}
            stated = [*own.items(), *event["versions"].items()][:60]
            return {sensors.clean(str(name)): sensors.clean(str(value)) for name, value in stated}
    return None


def sample_json(t_s: float, phase: str, reading: sensors.Reading) -> dict[str, Any]:
    """One look at the sensors, `t_s` seconds after the run was started."""
    return {
        "t_s": round(t_s, 3),
        "phase": phase,
        "temperature_c": dict(reading.temperature_c),
        "cpu_mhz": dict(reading.cpu_mhz),
        "battery": None if reading.battery is None else asdict(reading.battery),
        "load_1m": reading.load_1m,
    }


def recipe_name(manifest: Manifest) -> str | None:
    """The name of the quantization recipe a bundle was made with, None if it states none."""
    recipe = manifest.recipe or {}
    inner = recipe.get("recipe")
    name = inner.get("name") if isinstance(inner, dict) else recipe.get("name")
    return name[:1000] if isinstance(name, str) else None


def _conditions(
    context: BenchContext, run: PlannedRun, gate: ThermalGate, runner_versions: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that must agree between runs that are compared."""
    bundle = context.bundle
    manifest = bundle.manifest
    return {
        "device": asdict(context.device),
        "clocks": _clocks_json(gate.clocks),
        "charging": None if gate.reading is None else gate.reading.charging,
        "transport": context.transport.kind,
        "poll_s": context.plan.poll_s,
        "threads": run.threads,
        "bundle": {
            "sha256": context.deployment.bundle_sha256,
            "name": manifest.model.name[:1000],
            "family": manifest.model.family,
            "style": manifest.style,
            "recipe": recipe_name(manifest),
            "backend": ", ".join(manifest.backends),
            "bytes": bundle.total_bytes,
        },
        "workload": context.workloads[run.pass_],
        "versions": {"pocket_diffusion": _own_version(), **runner_versions},
    }


def _clocks_json(clocks: Clocks) -> dict[str, Any]:
    limits = clocks.limits_mhz
    return {
        "governor": None if clocks.governor is None else dict(clocks.governor),
        "limits_mhz": None if limits is None else {name: list(limits[name]) for name in limits},
    }


def _failure_json(failure: Failure) -> dict[str, Any]:
    return {
        "reason": failure.reason,
        "sentence": failure.sentence[:4000],
        "evidence": dict(failure.evidence),
    }


def _flat(event: Mapping[str, Any]) -> dict[str, Any]:
    """A memory event as records hold it: numbers and words only."""
    return {k: v for k, v in event.items() if v is None or type(v) in (int, float, str)}


def _own_version() -> str:
    try:
        return importlib.metadata.version("pocket-diffusion")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
