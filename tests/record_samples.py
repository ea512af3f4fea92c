"""A record of each kind for tests, made up but whole."""

from __future__ import annotations

from typing import Any


def record(**changes: Any) -> dict[str, Any]:
    """A run that went well; `changes` replace fields of the top level."""
    made: dict[str, Any] = {
        "schema_version": 1,
        "record": "run",
        "bench_id": "bench1",
        "run_id": "bench1-speed-t2-0",
        "pass": "speed",
        "repeat": 0,
        "started_at": "2026-01-02T03:04:05Z",
        "status": "ok",
        "failure": None,
        "conditions": {
            "device": {
                "serial": "abc", "manufacturer": None, "model": "Phone", "soc": None,
                "build": None, "kernel": "6.1", "abi": "arm64-v8a", "cores": 8,
                "memory_bytes": 8 << 30, "android_sdk": 34,
            },
            "clocks": {"governor": {"cpu0": "schedutil"}, "limits_mhz": {"cpu0": [300, 1800.5]}},
            "charging": True,
            "transport": "server",
            "poll_s": 1.0,
            "threads": 2,
            "bundle": {
                "sha256": "0" * 64, "name": "toy", "family": "toy", "style": "uniform_diffusion",
                "recipe": None, "backend": "portable", "bytes": 1000,
            },
            "workload": {
                "prompt_tokens": 8, "prompt_text": None, "max_new_tokens": 8, "seed": 0,
                "force_steps": 4, "settings": None, "warmup_steps": 2,
            },
            "versions": {"pocket_diffusion": "0.1.0"},
        },
        "gate": {
            "threshold_c": 45.0, "sensor": "cpu", "begin_c": 40.0, "waited_s": 0.5,
            "timed_out": False,
        },
        "sensors": [
            {"t_s": -0.5, "phase": "before", "temperature_c": {"cpu": 40.0},
             "cpu_mhz": {"cpu0": 1800}, "battery": None}
        ],
        "result": {"status": "ok"},
        "memory": [{"event": "memory", "t_ms": 1.0, "rss_bytes": 5, "pss_bytes": None}],
        "steps": [{"event": "step", "t_ms": 2.0, "canvas": 0, "step": 1, "layers_ms": 1.0,
                   "head_ms": 1.0, "accepted": 3, "mean_entropy": 0.5, "finished": False}],
        "metrics": {"step_ms": 2.0, "peak_pss_bytes": None},
    }  # fmt: skip
    return made | changes
