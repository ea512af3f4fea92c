"""Why a run failed: a reason and a sentence, concluded from what it left on the device."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from device_tests.bench.run_folder import LOG_TAIL_BYTES, parse_integer, parse_tagged
from device_tests.remote.shell import excerpt, says_storage_full
from device_tests.results.records import REASONS, Reason

_FULL_BYTES = 64 * 1024
"""Less free room than this after a failed run means that the disk was full."""

_NO_MEMORY = re.compile(r"MemoryError|bad_alloc|annot allocate memory|[Oo]ut of memory")
_NO_MODULE = re.compile(r"No module named '?export")


@dataclass(frozen=True)
class Failure:
    """Why a run failed, in a word and in a sentence, and what that was concluded from."""

    reason: Reason
    sentence: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Traces:
    """What a run that failed left on the device."""

    log_tail: str = ""
    oom_kills: int | None = None
    """Processes that the kernel killed for memory since the run began."""
    lmkd: str = ""
    """What Android's low-memory killer said last about one of our processes."""
    free_bytes: int | None = None

    @property
    def storage_full(self) -> bool:
        return says_storage_full(self.log_tail) or (
            self.free_bytes is not None and self.free_bytes < _FULL_BYTES
        )

    def evidence(self) -> dict[str, Any]:
        """What is known of it, as a record has it."""
        found = {
            "oom_kills": self.oom_kills,
            "lmkd": self.lmkd or None,
            "free_bytes": self.free_bytes,
            "log_tail": self.log_tail or None,
        }
        return {key: value for key, value in found.items() if value is not None}


def parse_traces(text: str, oom_kills_before: int | None) -> Traces:
    """What the answer to `examine_command` says; no answer raises."""
    head, _, log = text.partition("\nlog\n")
    said = parse_tagged(head)
    kills = parse_integer(said.get("oom_kill", ""))
    blocks = said.get("free", "").split()
    counts = [parse_integer(word) for word in blocks]
    free = None
    if len(counts) == 2 and counts[0] is not None and counts[1] is not None:
        free = counts[0] * counts[1]
    return Traces(
        log_tail=_log_text(log),
        oom_kills=None
        if kills is None or oom_kills_before is None
        else max(0, kills - oom_kills_before),
        lmkd=excerpt(said.get("lmkd", "")),
        free_bytes=free,
    )


def name_failure(
    exit_code: int | None, result: Mapping[str, Any] | None, traces: Traces
) -> Failure:
    """Why a run failed that ended by itself; `exit_code` None: it vanished without one."""
    evidence = {"exit_code": exit_code} | traces.evidence()
    last = excerpt(traces.log_tail.strip().rpartition("\n")[2]) or "its log is empty"
    stated = (result or {}).get("failure")
    if stated is not None:
        reason = cast(Reason, stated["reason"]) if stated["reason"] in REASONS else "internal"
        return Failure(reason, stated["sentence"], evidence)
    number = 9 if exit_code is None else exit_code - 128
    if number == 9 and (traces.oom_kills or traces.lmkd):
        by = "Android's low-memory killer" if traces.lmkd else "the kernel"
        return Failure(
            "out_of_memory",
            f"{by} killed the runner for want of memory; use a smaller bundle or context, or close "
            "other apps",
            evidence,
        )
    if exit_code != 0 and (line := _last_line_with(_NO_MEMORY, traces.log_tail)):
        return Failure(
            "out_of_memory",
            f"the runner got no more memory ({line}); use a smaller bundle or context",
            evidence,
        )
    if exit_code in (126, 127) or _NO_MODULE.search(traces.log_tail):
        return Failure(
            "runner_missing", f"the device has no runner that it can start ({last})", evidence
        )
    if traces.storage_full:
        return storage_full_failure(traces, evidence)
    if exit_code is None:
        return Failure(
            "crash_signal",
            "the run vanished without an exit code: all its processes were killed, most likely "
            "for want of memory or by hand",
            evidence | {"signal": "SIGKILL"},
        )
    if 0 < number < 65:
        name = _signal_name(number)
        why = ", most likely for want of memory or by hand" if number == 9 else ""
        return Failure(
            "crash_signal",
            f"the runner was killed by {name}{why} (its log ends with: {last})",
            evidence | {"signal": name},
        )
    if exit_code == 0:
        return Failure("internal", "the runner ended well and left no result", evidence)
    return Failure("internal", f"the runner ended with {exit_code} ({last})", evidence)


def storage_full_failure(traces: Traces, evidence: Mapping[str, Any]) -> Failure:
    free = "" if traces.free_bytes is None else f" ({traces.free_bytes} bytes are free)"
    return Failure(
        "storage_full",
        f"the device had no room for what the run writes{free}; delete something there, or remove "
        "earlier bundles with `pocketdiff clean`",
        traces.evidence() | dict(evidence),
    )


def _log_text(text: str) -> str:
    """The end of the log, printable and with its line ends."""
    lines = text[-LOG_TAIL_BYTES:].split("\n")
    return "\n".join("".join(c if c.isprintable() else " " for c in line) for line in lines).strip()


def _last_line_with(pattern: re.Pattern[str], text: str) -> str:
    return next((excerpt(line) for line in reversed(text.split("\n")) if pattern.search(line)), "")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
