"""What the tests of runs and of benchmarks share: devices, scripted runners, requests."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from device_tests.adb.direct import open_tcp
from device_tests.adb.transport import Transport
from device_tests.bench.deploy import Deployment
from device_tests.local.device import LocalDevice
from device_tests.remote.shell import quote
from export.contract.runner_protocol import RunRequest

RESULT = {
    "protocol": 1, "status": "ok", "failure": None,
    "runtime": {"host": "python", "version": "1"}, "versions": {},
    "import_ms": 1, "verify_ms": 1, "tokenizer_ms": None, "load_ms": 1, "threads": 1,
    "cold": {"requested": False, "method": None, "resident_before": None, "resident_after": None},
    "delegation": {}, "warmup_ms": None, "pack_ms": None, "weights": None,
    "answers": [{
        "prompt_tokens": 2, "prompt_ms": 1, "encode_ms": 0, "encodings": 1, "total_ms": 2,
        "first_draft_ms": 1, "first_commit_ms": 2, "finish_reason": "length",
        "canvases": [{
            "canvas": 0, "tokens": [5], "converged": True,
            "steps": [{"layers_ms": 1, "head_ms": 1, "accepted": 1, "mean_entropy": 0.5}],
        }],
        "answer_tokens": [5], "new_tokens": 1, "text": None,
    }],
    "memory": {"peak_rss_bytes": 1, "after_load": None, "at_end": None, "major_faults": 0},
}  # fmt: skip


@dataclass(frozen=True)
class ScriptRunner:
    """A runner that is a piece of shell; it begins in the run's folder."""

    script: str

    def command(self, request: str) -> str:
        folder = request.rpartition("/")[0]
        return f"sh -c {quote(f'cd {quote(folder)}; {self.script}')}"


def connect(device: LocalDevice) -> Transport:
    """A connection of its own to a local device."""
    return open_tcp("127.0.0.1", device.port)


def request(run_id: str, **changes: object) -> RunRequest:
    """A small request; scripted runners do not look at it."""
    fields = {"bundle": "/none", "max_new_tokens": 6, "prompts": ((5, 6),)} | changes
    return RunRequest(run_id=run_id, **fields)


def started(run_id: str) -> str:
    """The first event of a run, as shell."""
    event = {
        "event": "started", "t_ms": 1, "protocol": 1, "run_id": run_id, "pid": 1,
        "runtime": {"host": "python", "version": "1"}, "versions": {"script": "1"},
    }  # fmt: skip
    return tell(event)


def step(number: int) -> dict:
    """A step event."""
    return {"event": "step", "t_ms": number, "canvas": 0, "step": number, "max_steps": 1000,
            "layers_ms": 1, "head_ms": 1, "accepted": 1, "mean_entropy": 0.5,
            "finished": False}  # fmt: skip


def tell(event: dict) -> str:
    """Shell that tells an event."""
    return f"printf '%s\\n' {quote(json.dumps(event))} >>events.jsonl; "


def result(run_id: str, **changes: object) -> str:
    """Shell that leaves a result of a run that went well."""
    document = RESULT | {"run_id": run_id} | changes
    return f"printf '%s' {quote(json.dumps(document))} >r; mv r result.json; "


def processes_of(device: LocalDevice, words: str, *, program: str = "") -> list[int]:
    """Processes on the device (in its namespace) whose command line begins with `program` and
    holds `words`, by their numbers on this machine."""
    children = Path(f"/proc/{device.pid}/task/{device.pid}/children").read_text().split()
    world = os.readlink(f"/proc/{children[0]}/ns/pid")
    found = []
    for folder in Path("/proc").iterdir():
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            state = (folder / "stat").read_text().rpartition(") ")[2][0]
            if (
                line.startswith(program)
                and words in line
                and state != "Z"
                and os.readlink(folder / "ns/pid") == world
            ):
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until `condition` holds; fail if it does not for long."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.02)


QUICK = {"poll_s": 0.05, "gone_s": 5.0, "hang_s": 60.0, "prompt_tokens": 4}


@dataclass(frozen=True)
class Scripted:
    """A runner for a bench: two events, `extra` shell, a result."""

    extra: str = ""
    only: str = ""
    """The extra is for runs whose name ends so."""
    changes: Mapping[str, object] = field(default_factory=dict)
    """Of the result."""

    def command(self, request: str) -> str:
        run_id = request.split("/")[-2]
        extra = self.extra if run_id.endswith(self.only) else ""
        script = f"{started(run_id)}{tell(step(1))}{extra}\n{result(run_id, **self.changes)}"
        return ScriptRunner(script).command(request)


DEPLOYMENT = Deployment("0" * 16, "0" * 64, "/data/none", 3, 10, 10, 0, 0.1, 0)
"""For scripted runners, which need no bundle on the device."""
