"""The results file: what is appended is read back, what a kill tore is left out. No device."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from device_tests.results import record_format, records
from quantize.errors import OutputError

FAILURE = {"reason": "hang", "sentence": "It hung.", "evidence": {"silent_s": 3}}


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
                "memory_interval_ms": None, "memory_limit_bytes": None,
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


def test_what_is_appended_is_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    written = [record(repeat=0), record(repeat=1, status="failed", failure=FAILURE, result=None)]
    for one in written:
        records.append(path, one)
    assert records.read(path) == written
    assert path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("cut", [1, 5, 200])
def test_an_unfinished_last_line_is_left_out_and_then_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: int
) -> None:
    path = tmp_path / "results.jsonl"
    records.append(path, record(repeat=0))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:cut])
    with caplog.at_level(logging.WARNING):
        assert [one["repeat"] for one in records.read(path)] == [0]
    assert "line 2 is unfinished" in caplog.text
    records.append(path, record(repeat=7))
    assert [one["repeat"] for one in records.read(path)] == [0, 7]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    records.append(path, record(repeat=0))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    records.append(path, record(repeat=1))
    assert [one["repeat"] for one in records.read(path)] == [0, 1]


def test_another_programs_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("line\nnotes without an end")
    with pytest.raises(records.RecordError, match="no results file"):
        records.append(path, record())
    assert path.read_text() == "line\nnotes without an end"


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    records.append(path, record())
    path.write_bytes(path.read_bytes() + b"{broken\n" + path.read_bytes())
    with pytest.raises(records.RecordError, match="line 2 is not a JSON object"):
        records.read(path)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"pass": "fast"}, "pass"),
        ({"repeat": -1}, "repeat"),
        ({"run_id": "../up"}, "run_id"),
        ({"started_at": "yesterday"}, "started_at"),
        ({"status": "failed"}, "at failure"),
        ({"failure": FAILURE}, "at failure"),
        ({"status": "failed", "failure": FAILURE | {"reason": "bad luck"}}, "reason"),
        ({"result": None}, "at result"),
        ({"extra": 1}, "top level"),
        ({"schema_version": 5}, "schema version 5"),
        ({"metrics": {"step_ms": "2"}}, "metrics.step_ms"),
    ],
)
def test_a_record_out_of_the_format_is_refused_by_name(
    tmp_path: Path, change: dict, field: str
) -> None:
    path = tmp_path / "results.jsonl"
    with pytest.raises(records.RecordError, match=field):
        records.append(path, record(**change))
    assert not path.exists()


def test_not_a_number_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        records.append(tmp_path / "r.jsonl", record(metrics={"step_ms": float("nan")}))


def test_a_full_disk_leaves_no_half_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    records.append(path, record(repeat=0))
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:100]))
    with pytest.raises(OutputError, match="no room"):
        records.append(path, record(repeat=1))
    assert [one["repeat"] for one in records.read(path)] == [0]


def test_the_schema_is_that_of_the_types() -> None:
    schema = record_format.SCHEMA_FILE.read_text(encoding="utf-8")
    assert schema == record_format.schema(), "run python -m device_tests.results.record_format"
