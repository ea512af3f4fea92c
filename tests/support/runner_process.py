"""Requests to the runner, run in this process or in one of its own, and what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from export.contract.runner_protocol import RunRequest, parse_event, parse_result
from export.host.runner.run import run

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 120


def write_request(folder: Path, bundle: Path, **changes: Any) -> Path:
    fields = {"prompts": ((3, 4, 5),), "max_new_tokens": 12, "threads": 1} | changes
    request = RunRequest(run_id="r-1", bundle=str(bundle), **fields)
    path = folder / "request.json"
    path.write_bytes(request.to_bytes())
    return path


def read_back(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Events and result, each checked against the protocol."""
    lines = (folder / "events.jsonl").read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") for line in lines)
    result = parse_result((folder / "result.json").read_bytes())
    assert not (folder / "result.json.part").exists()
    return [parse_event(line) for line in lines], result


def tokens_of(answer: dict[str, Any]) -> tuple[int, ...]:
    """Tokens of all canvases."""
    return tuple(token for canvas in answer["canvases"] for token in canvas["tokens"])


def start(request: Path, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *options, "-m", "export.host.runner", str(request)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def wait_for_event(process: subprocess.Popen[bytes], folder: Path, kind: str) -> None:
    events = folder / "events.jsonl"
    deadline = time.monotonic() + TIMEOUT_S
    while not (events.exists() and f'"event":"{kind}"'.encode() in events.read_bytes()):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def expect_failure(folder: Path, bundle: Path, reason: str, **changes: Any) -> str:
    """Run to the failure; returns its sentence."""
    assert run(write_request(folder, bundle, **changes)) == 3
    events, result = read_back(folder)
    assert result["status"] == "failed" and result["run_id"] == "r-1"
    assert events[-1]["event"] == "failed" and events[-1]["reason"] == reason
    assert result["failure"] == {"reason": reason, "sentence": events[-1]["sentence"]}
    return events[-1]["sentence"]
