"""Records of invented benchmarks, valid and always the same, for the tests of the report."""

from __future__ import annotations

import copy
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from device_tests.results import records
from device_tests.results.metrics import compute
from export.host.puzzles import held_out

CANVAS = 20
HOSTILE = (
    "</td><script>top.hostile=1</script><img src=x onerror=top.hostile=2>|`x`\n\n"
    "# [bold red]h[/] $\\frac{1}$"
    " \x1b[31mred\x07 \u202egnp.exe {{7*7}} {% raw %} 'quote' \"double\" --> ]]> &amp;"
)


def run(
    pass_: str = "speed",
    repeat: int = 0,
    *,
    seed: int = 0,
    threads: int | None = 2,
    steps: int = 8,
    canvases: int = 2,
    step_ms: float = 40.0,
    failure: dict[str, Any] | None = None,
    has_sensors: bool = True,
    bench_id: str = "bench-1",
) -> dict[str, Any]:
    """One record; `seed` moves its random numbers, `step_ms` the time of its steps."""
    random = np.random.default_rng([seed, repeat, records.PASSES.index(pass_)])
    is_forced = pass_ != "natural"
    minute = repeat + 10 * records.PASSES.index(pass_)
    record: dict[str, Any] = {
        "schema_version": records.SCHEMA_VERSION,
        "record": "run",
        "bench_id": bench_id,
        "run_id": f"{bench_id}-{threads}-{pass_}-{repeat}-{seed}",
        "pass": pass_,
        "repeat": repeat,
        "started_at": f"2026-01-02T03:{minute:02d}:05Z",
        "status": "failed" if failure else "ok",
        "failure": failure,
        "conditions": _conditions(pass_, threads, steps if is_forced else None, canvases),
        "gate": {
            "threshold_c": 45.0,
            "sensor": "cpu-0-0" if has_sensors else None,
            "begin_c": 41.5 + repeat / 2 if has_sensors else None,
            "waited_s": 3.0 * repeat,
            "timed_out": False,
        },
        "sensors": _sensors(random, repeat, steps * canvases * step_ms / 1000)
        if has_sensors
        else [{"t_s": 0.5, "phase": "during", "temperature_c": {}, "cpu_mhz": {}, "battery": None}],
        "result": None,
        "memory": [],
        "steps": [],
        "metrics": {},
    }
    events = _steps(random, steps, canvases, step_ms)
    if failure:
        record["steps"] = events[: len(events) // 2]
    else:
        record["steps"] = events
        record["result"] = _result(random, pass_, events, canvases)
    if pass_ == "puzzles" and not failure:
        _answer_puzzles(record)
    if pass_ == "memory":
        record["memory"] = _memory(events[-1]["t_ms"])
    record["metrics"] = compute(record)
    record = json.loads(json.dumps(record))  # numbers of numpy become plain ones
    records.check(record, "the sample")
    return record


def bench(
    *,
    speed: int = 5,
    natural: int = 3,
    puzzles: int = 0,
    with_failure: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """All passes of one bench; `with_failure` puts a failed speed run in the middle."""
    found = [run("cold", **options), run("warm_up", **options)]
    for repeat in range(speed):
        if with_failure and repeat == 2:
            found.append(run("speed", repeat, failure=FAILURE, **options))
        found.append(run("speed", repeat, **options))
    found += [run("natural", repeat, **(options | {"steps": 5})) for repeat in range(natural)]
    found += [run("puzzles", repeat, **options) for repeat in range(puzzles)]
    return [*found, run("memory", **options)]


PUZZLES = held_out(10, 0)
WRONG = 3
"""Answers of every ten that are wrong."""


def _answer_puzzles(record: dict[str, Any]) -> None:
    """Turn a run into one of several prompts: seven of ten answers right, 10 ms for a token."""
    workload, result = record["conditions"]["workload"], record["result"]
    workload |= {"prompt_text": None, "prompt_tokens": None, "force_steps": None, "puzzles": 10}
    workload["max_new_tokens"] = CANVAS
    record["steps"] = []
    result["answers"] = [
        copy.deepcopy(ANSWER)
        | {"total_ms": 10.0 * len(puzzle.answer), "new_tokens": len(puzzle.answer)}
        for puzzle in PUZZLES
    ]
    record["puzzles"] = [
        asdict(puzzle) | {"is_exact": number % 10 >= WRONG} for number, puzzle in enumerate(PUZZLES)
    ]
    for sample in record["sensors"]:
        sample["battery"]["status"] = "discharging"


ANSWER = {
    "prompt_tokens": 12, "prompt_ms": 3.0, "encode_ms": 0.0, "total_ms": 80.0,
    "first_draft_ms": 9.0, "first_commit_ms": 40.0, "finish_reason": "eos",
    "canvases": [{
        "canvas": 0, "tokens": [4, 5], "converged": True,
        "steps": [{"layers_ms": 8.0, "head_ms": 2.0, "accepted": 1, "mean_entropy": 0.5}] * 4,
    }],
    "encodings": 1, "answer_tokens": [4, 5], "new_tokens": 8, "text": "12",
}  # fmt: skip

FAILURE = {
    "reason": "out_of_memory",
    "sentence": "the kernel killed the runner (oom_kill rose from 3 to 4); ask for fewer tokens",
    "evidence": {"exit_code": 137, "oom_kill": [3, 4]},
}


def hostile_bench() -> list[dict[str, Any]]:
    """A bench whose every free text is an attack."""
    found = copy.deepcopy(bench(with_failure=True))
    for record in found:
        conditions = record["conditions"]
        for name in ("serial", "manufacturer", "model", "soc", "build", "kernel", "abi"):
            conditions["device"][name] = HOSTILE
        conditions["clocks"] = {
            "governor": {HOSTILE: HOSTILE},
            "limits_mhz": {HOSTILE: [300, 2800]},
        }
        for name in ("name", "family", "style", "recipe", "backend"):
            conditions["bundle"][name] = HOSTILE
        conditions["workload"]["prompt_text"] = HOSTILE
        conditions["workload"]["settings"] = {HOSTILE: 1.0}
        conditions["versions"] = {HOSTILE: HOSTILE}
        record["gate"]["sensor"] = HOSTILE
        for sample in record["sensors"]:
            sample["temperature_c"] = {HOSTILE: 40.0, "_$x$": 41.0}
            sample["cpu_mhz"] = {HOSTILE: 1800.0}
            if sample["battery"]:
                sample["battery"]["status"] = HOSTILE
        if record["failure"]:
            record["failure"]["sentence"] = HOSTILE
            record["failure"]["evidence"] = {HOSTILE: [HOSTILE]}
        if record["result"]:
            for answer in record["result"]["answers"]:
                answer["text"] = HOSTILE
                answer["finish_reason"] = HOSTILE
            record["result"]["delegation"] = {HOSTILE: {"delegated": 3, "portable": 4}}
        records.check(record, "the sample")
    return found


def _conditions(
    pass_: str, threads: int | None, force_steps: int | None, canvases: int
) -> dict[str, Any]:
    return {
        "device": {
            "serial": "SAMPLE01",
            "manufacturer": "Sample",
            "model": "Phone 9",
            "soc": "SX100",
            "build": "sample/phone9/9:16/AB1.2/345:user/release-keys",
            "kernel": "6.6.1-android15",
            "abi": "arm64-v8a",
            "cores": 8,
            "memory_bytes": 12 * 2**30,
            "android_sdk": 36,
        },
        "clocks": {
            "governor": {f"cpu{i}": "walt" for i in range(8)},
            "limits_mhz": {f"cpu{i}": [300, 2200] if i < 6 else [500, 3200] for i in range(8)},
        },
        "charging": True,
        "transport": "usb",
        "poll_s": 1.0,
        "threads": threads,
        "bundle": {
            "sha256": "ab" * 32,
            "name": "int4",
            "family": "diffusion_gemma",
            "style": "uniform_diffusion",
            "recipe": "int4-g32",
            "backend": "xnnpack",
            "bytes": 850_232,
        },
        "workload": {
            "prompt_tokens": None if pass_ == "natural" else 64,
            "prompt_text": "sort 3 1 2" if pass_ == "natural" else None,
            "max_new_tokens": CANVAS * canvases,
            "seed": 0,
            "force_steps": force_steps,
            "settings": None,
            "warmup_steps": 0 if pass_ == "cold" else 2,
            "memory_interval_ms": 50 if pass_ == "memory" else None,
            "memory_limit_bytes": None,
            "memory_budget_bytes": 400 * 2**20,
        },
        "versions": {"pocket_diffusion": "0.1.0", "executorch": "1.5.1", "python": "3.12.1"},
    }


def _sensors(random: np.random.Generator, repeat: int, seconds: float) -> list[dict[str, Any]]:
    found = []
    times: Sequence[tuple[float, str]] = [
        (-1.0, "before"),
        *((t, "during") for t in np.linspace(0.2, seconds, 8)),
        (seconds + 1, "after"),
    ]
    for t_s, phase in times:
        heat = 41.5 + repeat / 2 + 5 * max(0.0, t_s) / (seconds + 1) + random.uniform(-0.2, 0.2)
        clock = 3200.0 if phase == "during" else 900.0
        found.append(
            {
                "t_s": round(float(t_s), 3),
                "phase": phase,
                "temperature_c": {"cpu-0-0": round(heat, 1), "skin": 33.0},
                "cpu_mhz": {"cpu0": clock - 1000, "cpu7": clock},
                "battery": {
                    "level_percent": 80.0,
                    "current_ma": round(-600 - random.uniform(0, 300), 1),
                    "temperature_c": 31.0,
                    "status": "charging",
                },
                "load_1m": None if phase == "during" else 0.5 + repeat / 10,
            }
        )
    return found


def _steps(
    random: np.random.Generator, steps: int, canvases: int, step_ms: float
) -> list[dict[str, Any]]:
    found, clock = [], 500.0
    for canvas in range(canvases):
        for step in range(1, steps + 1):
            layers = step_ms * 0.8 * random.lognormal(0, 0.05)
            head = step_ms * 0.2 * random.lognormal(0, 0.05)
            clock += layers + head
            found.append(
                {
                    "event": "step",
                    "t_ms": round(clock, 3),
                    "canvas": canvas,
                    "step": step,
                    "max_steps": steps,
                    "layers_ms": round(layers, 4),
                    "head_ms": round(head, 4),
                    "accepted": round(CANVAS * min(1.0, 0.1 + 0.9 * step / steps)),
                    "mean_entropy": round(2.0 / step, 4),
                    "finished": step == steps,
                }
            )
    return found


def _memory(until_ms: float) -> list[dict[str, Any]]:
    found = []
    for index, t_ms in enumerate(np.arange(20.0, until_ms, 20.0)):
        anonymous = min(180, 20 + 12 * index) * 2**20
        file = min(90, 30 + 8 * index) * 2**20
        found.append(
            {
                "event": "memory",
                "t_ms": float(t_ms),
                "rss_bytes": anonymous + file,
                "pss_bytes": anonymous + file - 10 * 2**20,
                "anonymous_bytes": anonymous,
                "file_bytes": file,
                "swap_bytes": 0,
                "major_faults": min(index, 7),
                "minor_faults": 1000 + 10 * index,
            }
        )
    return found


def _result(
    random: np.random.Generator, pass_: str, events: list[dict[str, Any]], canvases: int
) -> dict[str, Any]:
    prompt_ms = 90.0 * random.lognormal(0, 0.03)
    step_total = sum(event["layers_ms"] + event["head_ms"] for event in events)
    per_canvas = len(events) // canvases
    encode_ms = 31.0 * (canvases - 1) * random.lognormal(0, 0.03)
    first = events[0]["layers_ms"] + events[0]["head_ms"]
    is_cold = pass_ == "cold"
    at_end = _memory(600.0)[-1] | {"pss_bytes": 250 * 2**20}
    del at_end["event"]
    return {
        "protocol": 1,
        "run_id": "sample",
        "status": "ok",
        "failure": None,
        "load_ms": (900.0 if is_cold else 210.0) * random.lognormal(0, 0.04),
        "cold": {
            "requested": is_cold,
            "method": "posix_fadvise" if is_cold else None,
            "resident_before": 1.0,
            "resident_after": 0.0 if is_cold else 1.0,
        },
        "import_ms": 2100.0,
        "verify_ms": 9.0,
        "tokenizer_ms": 12.0,
        "warmup_ms": 100.0,
        "threads": 2,
        "versions": {"executorch": "1.5.1"},
        "runtime": {"host": "python", "version": "0.1.0"},
        "answers": [
            {
                "prompt_tokens": 64,
                "prompt_ms": prompt_ms,
                "encode_ms": encode_ms,
                "encodings": canvases + 3,
                "total_ms": prompt_ms + step_total + encode_ms + 5,
                "first_draft_ms": prompt_ms + first + 1,
                "first_commit_ms": prompt_ms + step_total / canvases + 1,
                "finish_reason": "length",
                "canvases": [
                    {
                        "canvas": index,
                        "tokens": list(range(CANVAS)),
                        "converged": True,
                        "steps": [
                            {key: event[key] for key in ("layers_ms", "head_ms", "accepted")}
                            | {"mean_entropy": event["mean_entropy"]}
                            for event in events[index * per_canvas : (index + 1) * per_canvas]
                        ],
                    }
                    for index in range(canvases)
                ],
                "answer_tokens": list(range(CANVAS)) * canvases,
                "new_tokens": CANVAS * canvases - 4,
                "text": "an answer",
            }
        ],
        "memory": {
            "peak_rss_bytes": 271 * 2**20 + 4096,
            "after_load": _memory(200.0)[-1],
            "at_end": at_end,
            "major_faults": 812 if is_cold else 7,
        },
        "weights": {
            "budget_bytes": 400 * 2**20,
            "read_ahead": True,
            "weights_bytes": 300 * 2**20,
            "kept_bytes": 100 * 2**20,
            "window_bytes": 60 * 2**20,
            "pass_bytes": 200 * 2**20,
            "streamed_stages": 40,
            "streamed_bytes": 2000 * 2**20,
            "streamed_stall_ms": 5.0,
            "storage_bytes": 1900 * 2**20,
            "stages": [{"name": "layers", "bytes": 300 * 2**20, "kept_bytes": 100 * 2**20}],
        },
        "delegation": {
            "layers": {"delegates": 14, "delegated": 1014, "portable": 65},
            "head": {"delegates": 7, "delegated": 99, "portable": 100},
        },
    }


def change(records, path, value):
    """The same runs under another condition."""
    found = copy.deepcopy(records)
    for record in found:
        *above, last = path.split(".")
        target = record
        for key in above:
            target = target[key]
        target[last] = value
    return found


def has_control(text: str) -> bool:
    return any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in text.replace("\n", ""))
