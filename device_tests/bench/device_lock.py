"""The lock of a device: a folder made by `mkdir`, so that one benchmark at a time measures.

It names its owner, who sends heartbeats while it works. An owner that is dead, or has been
silent for long and has no run on the device, loses the lock to the next benchmark.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from device_tests.adb.transport import ShellResult, Transport
from device_tests.bench.remote_run import RemoteRun
from device_tests.errors import DeviceBusy
from device_tests.processes import start_ticks
from device_tests.remote.retry import retry_while_gone
from device_tests.remote.shell import DEVICE_ROOT, excerpt, quote, run_checked
from quantize.errors import DeviceError

LOCK_FOLDER = f"{DEVICE_ROOT}/lock"
STALE_S = 600.0
"""Silence after which an owner without a run is taken for dead."""

MAXIMUM_OWNER_BYTES = 1000

_RELEASE_S = 5.0

_OWNER = f"{LOCK_FOLDER}/owner.json"
_BEAT = f"{LOCK_FOLDER}/beat"
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

_log = logging.getLogger(__name__)

# `now` and the time of the last heartbeat are both the device's, whose clock may be wrong. The
# start time of a process is field 22 of proc(5), the 20th behind the name.
_LOOK = f"""[ -d {LOCK_FOLDER} ] || exit 0
echo "held yes"
echo "now $(date +%s)"
echo "beat $(stat -c %Y {_BEAT} 2>/dev/null || stat -c %Y {LOCK_FOLDER} 2>/dev/null)"
echo "owner $(head -c {MAXIMUM_OWNER_BYTES} {_OWNER} 2>/dev/null)"
for f in {DEVICE_ROOT}/runs/*/pid; do
p= t= s=
{{ read -r p t b <"$f"; }} 2>/dev/null; [ -n "$p" ] || continue
{{ read -r s </proc/$p/stat; }} 2>/dev/null; [ -n "$s" ] || continue
set -- ${{s##*) }}
[ "${{20}}" = "$t" ] && [ "$1" != Z ] && f=${{f%/pid}} && echo "run ${{f##*/}}"
done
:
"""


@dataclass(frozen=True)
class Process:
    """What identifies a process of a host; fields are empty where the system hides them."""

    machine: str = ""
    pid: int = 0
    started: str = ""

    @classmethod
    def this(cls) -> Process:
        """The one that runs now."""
        return cls(_machine(), os.getpid(), str(start_ticks(os.getpid()) or ""))

    @property
    def is_dead(self) -> bool:
        """Whether it ran on this machine and has ended; False if that cannot be known."""
        if not self.machine or not self.started or self.machine != _machine():
            return False
        return str(start_ticks(self.pid)) != self.started


@dataclass(frozen=True)
class Holder:
    """Who holds a device: as it described itself, and what was seen of it."""

    bench_id: str
    host: str
    started_at: str
    silent_s: float | None
    """Since its last heartbeat, by the device's clock; None if that is not known."""
    runs: tuple[str, ...] = ()
    """Runs that go on on the device."""
    process: Process = field(default_factory=Process)
    owner: str = field(default="", repr=False)
    """What it wrote, as it stands there."""

    @property
    def is_stale(self) -> bool:
        """Whether the lock may be taken over."""
        silent = self.silent_s is not None and self.silent_s > STALE_S and not self.runs
        return silent or self.process.is_dead

    def __str__(self) -> str:
        seen = "" if self.silent_s is None else f", last heartbeat {self.silent_s:.0f} s ago"
        return f"benchmark {self.bench_id} of {self.host}, begun {self.started_at}{seen}"


def holder(transport: Transport) -> Holder | None:
    """Who holds the device; None if it is free or its lock is stale."""
    found = look(transport)
    return None if found is None or found.is_stale else found


class DeviceLock:
    """The device's lock as one benchmark has it; a context manager that takes and releases it."""

    def __init__(self, transport: Transport, bench_id: str, *, gone_s: float = 60.0) -> None:
        self.transport = transport
        self.bench_id = bench_id
        self.note: str | None = None
        """What was found when a stale lock was taken over."""
        self._gone_s = gone_s
        process = Process.this()
        self._owner = json.dumps(
            {
                "bench_id": bench_id,
                "host": excerpt(socket.gethostname()),
                "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": process.machine,
                "pid": process.pid,
                "process_started": process.started,
            }
        )

    @property
    def beat_command(self) -> str:
        """A piece of shell that sends a heartbeat; a builtin, for polls in a measurement."""
        return f"[ ! -d {LOCK_FOLDER} ] || : >{_BEAT}"

    def acquire(self) -> None:
        """Take the lock. Raises DeviceBusy, naming who has it, or another DeviceError."""
        for _ in range(3):  # it may be released, or taken over, between two looks
            if self._take():
                return
            found = self._look()
            if found is None:
                continue
            if found.bench_id == self.bench_id:
                return  # taken by us, the answer was lost
            if not found.is_stale:
                raise self._busy(found)
            self._take_over(found)
        raise DeviceBusy(
            f"the lock of the device {self.transport.serial} changes hands; try again in a moment"
        )

    def beat(self) -> None:
        """Send a heartbeat. Raises DeviceBusy if the lock was lost to another benchmark."""
        command = (
            f"o=; {{ read -r o <{_OWNER}; }} 2>/dev/null\n"
            f'[ "$o" = {quote(self._owner)} ] && : >{_BEAT} && echo ours\n:\n'
        )
        if self._run(command).text.strip() != "ours":
            found = self._look()
            who = "nobody" if found is None else str(found)
            raise DeviceBusy(
                f"the lock of the device {self.transport.serial} was taken away from this "
                f"benchmark, which was silent for too long; {who} has it now"
            )

    def release(self) -> None:
        """Give the lock back if it is still ours; a device that is away is not waited for long."""
        self._gone_s = min(self._gone_s, _RELEASE_S)
        self._run(
            f"o=; {{ read -r o <{_OWNER}; }} 2>/dev/null\n"
            f'[ "$o" != {quote(self._owner)} ] || rm -rf {LOCK_FOLDER}\n'
        )

    def __enter__(self) -> DeviceLock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.release()
        except DeviceError as left:
            _log.warning(
                "the lock of the device %s stays: %s", self.transport.serial, left
            )  # it goes stale

    def _take(self) -> bool:
        """Whether the lock was free and is ours now."""
        command = (
            f"mkdir -p {DEVICE_ROOT} || exit\n"
            f"if ! mkdir {LOCK_FOLDER} 2>/dev/null; then [ -d {LOCK_FOLDER} ] && exit 0\n"
            f"mkdir {LOCK_FOLDER}; exit 1; fi\n"
            f"if printf '%s\\n' {quote(self._owner)} >{_OWNER} && : >{_BEAT}; then echo taken\n"
            f"else rm -rf {LOCK_FOLDER}; exit 1; fi\n"
        )
        return self._run(command).text.strip() == "taken"

    def _take_over(self, found: Holder) -> None:
        """Put a stale lock aside; another benchmark that saw the same may be faster."""
        for run_id in found.runs:
            RemoteRun(self.transport, run_id, gone_s=self._gone_s).kill()
        aside = f"{LOCK_FOLDER}.{self.bench_id}"
        # Moved first, then looked at: what was moved is nobody else's any more, and a fresh lock
        # that was moved by mistake goes back.
        command = (
            f"mv {LOCK_FOLDER} {aside} 2>/dev/null || exit 0\n"
            f'o="$(head -c {MAXIMUM_OWNER_BYTES} {aside}/owner.json 2>/dev/null)"\n'
            f'if [ "$o" = {quote(found.owner)} ]; then rm -rf {aside}\n'
            f"else mv {aside} {LOCK_FOLDER}; fi\n"
        )
        self._run(command)
        self.note = f"the lock was left behind by {found}; taken over"

    def _busy(self, found: Holder) -> DeviceBusy:
        return DeviceBusy(
            f"the device {self.transport.serial} is taken by {found}; wait for its end, or choose "
            "another device"
        )

    def _look(self) -> Holder | None:
        return retry_while_gone(self.transport, lambda: look(self.transport), self._gone_s)

    def _run(self, command: str) -> ShellResult:
        return retry_while_gone(
            self.transport, lambda: run_checked(self.transport, command), self._gone_s
        )


def parse_holder(answer: str) -> Holder | None:
    """Who holds the lock by the answer to the look at it; no answer raises."""
    said: dict[str, str] = {}
    runs: list[str] = []
    for line in answer[: 2**17].splitlines():
        key, _, value = line.partition(" ")
        if key == "run" and _RUN_ID.fullmatch(value) and len(runs) < 100:
            runs.append(value)
        else:
            said.setdefault(key, value)
    if said.get("held") != "yes":
        return None
    written = said.get("owner", "")
    try:
        owner = json.loads(written)
    except (ValueError, RecursionError):
        owner = None
    owner = owner if isinstance(owner, dict) else {}

    def text(key: str) -> str:
        value = owner.get(key)
        return excerpt(value) if isinstance(value, str) and value.strip() else "unknown"

    process = Process()
    match owner:
        case {"pid": int(pid), "machine": str(machine), "process_started": str(started)}:
            process = Process(machine, pid, started)
    return Holder(
        bench_id=text("bench_id"),
        host=text("host"),
        started_at=text("started_at"),
        silent_s=_difference(said.get("now", ""), said.get("beat", "")),
        runs=tuple(runs),
        process=process,
        owner=written,
    )


def look(transport: Transport) -> Holder | None:
    return parse_holder(run_checked(transport, _LOOK).text)


def _difference(now: str, then: str) -> float | None:
    if not all(re.fullmatch(r"\d{1,12}", word, re.ASCII) for word in (now, then)):
        return None
    return max(0.0, float(int(now) - int(then)))


def _machine() -> str:
    """This machine in this boot and, where there are several, this world of process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
