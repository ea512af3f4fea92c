"""One run on a device: started detached, followed by polls, its end collected and named.

Nothing depends on an open stream: the run writes its events and its result into a folder on the
device, and whoever asks later finds them there. Which runs are made, and when, is not known here.

What following costs the device: each poll is one `sh`, whose builtins read the state of the process
and the sensors (see `sensors.POLL_COMMAND`), and `tail` with `head` for the new events. On an x86
core at 2 GHz, with files in the place of 60 thermal zones, that took 5 ms of processor time: half a
per cent of one core at one poll a second.
"""

from __future__ import annotations

import io
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from device_tests.adb.transport import ShellResult, Transport
from device_tests.errors import CommandTimeout, DeviceGone, ProtocolError
from device_tests.remote import sensors
from device_tests.remote.shell import (
    DEVICE_ROOT,
    excerpt,
    quote,
    run_checked,
    says_storage_full,
)
from device_tests.results.records import REASONS, Reason
from export.contract.runner_protocol import (
    EVENTS_FILE,
    MAXIMUM_LINE_BYTES,
    MAXIMUM_RESULT_BYTES,
    REQUEST_FILE,
    RESULT_FILE,
    RunnerProtocolError,
    RunRequest,
    parse_event,
    parse_result,
)
from quantize.errors import DeviceError

RUNS_FOLDER = f"{DEVICE_ROOT}/runs"

MAXIMUM_EVENTS_BYTES = 64 * 2**20
"""Of all events of a run; a run that tells more is ended."""

MAXIMUM_POLL_BYTES = 2**20
"""New events in the answer to one poll; what is more comes with the next."""

MAXIMUM_SAMPLES = 100_000
LOG_TAIL_BYTES = 4096

_START_S = 20.0
"""How long a started run may take to write its process number."""

_FULL_BYTES = 64 * 1024
"""Less free room than this after a failed run means that the disk was full."""

_SAMPLING_EVENTS = frozenset({"memory", "temperature"})
"""Events that a timer tells: no sign that the run itself goes on."""

_NO_MEMORY = re.compile(r"MemoryError|bad_alloc|annot allocate memory|[Oo]ut of memory")
_NO_MODULE = re.compile(r"No module named '?export")
_ANSWER = TypeVar("_ANSWER")


class RunnerMissing(DeviceError):
    """There is no runner for this kind of device."""


class Runner(Protocol):
    """How a run is started on a kind of device."""

    def command(self, request: str) -> str:
        """The shell command that does what the file `request` on the device asks for."""


@dataclass(frozen=True)
class LinuxRunner:
    """`export.host.runner` by a Python that the device has; paths are the device's."""

    python: str = sys.executable
    root: str = str(Path(__file__).parents[2])

    def command(self, request: str) -> str:
        # -P: the run's folder is no place to import from.
        words = quote(self.python, "-P", "-m", "export.host.runner", request)
        return f"PYTHONPATH={quote(self.root)} {words}"


def choose_runner(android_sdk: int | None) -> Runner:
    """The runner for a device. Raises RunnerMissing for Android, whose runner is the app's."""
    if android_sdk is not None:
        raise RunnerMissing(
            f"the device runs Android (SDK {android_sdk}), and the app with the runner for Android "
            "is not there yet; give a device with Linux, or --local"
        )
    return LinuxRunner()


@dataclass(frozen=True)
class Failure:
    """Why a run failed, in a word and in a sentence, and what that was concluded from."""

    reason: Reason
    sentence: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One look at the sensors, seconds after the run was started."""

    t_s: float
    reading: sensors.Reading


@dataclass(frozen=True)
class Interrupted:
    """The connection broke and is being waited for."""

    sentence: str


RunEvent = dict[str, Any] | Sample | Interrupted
"""What `follow` tells: the runner's events as they are, sensors, and broken connections."""


@dataclass(frozen=True)
class RunOutcome:
    """What came of a run; exactly one of a result with the status ok, and a failure.

    `result` is also there when the runner said itself why it failed.
    """

    result: dict[str, Any] | None
    failure: Failure | None
    events: tuple[dict[str, Any], ...]
    samples: tuple[Sample, ...]
    interruptions: int


class RemoteRun:
    """A run that was started on a device; `follow` sees it to its end, `kill` ends it."""

    def __init__(self, transport: Transport, run_id: str, *, gone_s: float) -> None:
        self.transport = transport
        self.run_id = run_id
        self.folder = f"{RUNS_FOLDER}/{run_id}"
        self._gone_s = gone_s
        self._boot_id = ""
        self._oom_kills: int | None = None
        self._started_s = 0.0
        self._offset = 0
        self._events: list[dict[str, Any]] = []
        self._samples: list[Sample] = []
        self._interruptions = 0

    def follow(
        self,
        on_event: Callable[[RunEvent], None] | None = None,
        *,
        poll_s: float = 1.0,
        hang_s: float = 120.0,
        each_poll: str = "",
    ) -> RunOutcome:
        """Wait for the end of the run and collect it; a failure is an outcome, not an exception.

        A broken connection is waited for (`gone_s` of `start`) and costs nothing. Without a new
        event for `hang_s` (those of timers do not count) the run is killed as hung. `each_poll` is
        a piece of shell that is run with every poll. Events are told as they come.
        """
        tell = on_event or (lambda _: None)
        try:
            failure, exit_code = self._watch(tell, poll_s, hang_s, each_poll)
            if failure is None:
                return self._collect(exit_code, tell)
        except (DeviceGone, CommandTimeout, ProtocolError) as error:
            failure = Failure(
                "device_gone",
                f"the device {self.transport.serial} was lost in the middle of the run and did not "
                f"come back within {self._gone_s:g} s ({error})",
                {"waited_s": self._gone_s},
            )
        except DeviceError as error:
            with suppress(DeviceError):
                self.kill()
            broke = isinstance(error, RunnerProtocolError)
            sentence = f"the runner broke its protocol: {error}" if broke else str(error)
            failure = Failure("internal", sentence, {"error": type(error).__name__})
        return self._outcome(None, failure)

    def kill(self, gone_s: float | None = None) -> None:
        """End the run with every process it has begun; nothing happens if it has ended.

        Raises a DeviceError if the device cannot be told for `gone_s`, by default that of `start`.
        """
        # The group's number stays taken as long as one of its processes lives, so it is ours if its
        # first process is ours or gone.
        command = (
            f"cd {quote(self.folder)} 2>/dev/null || exit 0\n"
            "p= s=\n"
            "[ ! -d started ] || [ -f pid ] || sleep 1\n"  # it has just been begun
            "{ read -r p t b <pid; } 2>/dev/null\n"
            '[ -n "$p" ] && [ "$p" -gt 1 ] || exit 0\n'
            "{ read -r s </proc/$p/stat; } 2>/dev/null\n"
            'if [ -n "$s" ]; then set -- ${s##*) }; [ "${20}" = "$t" ] || exit 0; fi\n'
            "kill -9 -$p 2>/dev/null\n:\n"
        )
        patience_s = self._gone_s if gone_s is None else gone_s
        patiently(self.transport, lambda: self.transport.shell(command, timeout_s=10), patience_s)

    def remove(self) -> None:
        """Remove the run's folder from the device."""
        run_checked(self.transport, f"rm -rf {quote(self.folder)}")

    def _start(self, runner: Runner, request: RunRequest) -> None:
        content = request.to_bytes()
        file = f"{self.folder}/{REQUEST_FILE}"
        command = _start_command(self.folder, runner.command(file))

        def begin() -> ShellResult:
            run_checked(self.transport, f"mkdir -p {quote(self.folder)}")
            self.transport.push(io.BytesIO(content), file, len(content))
            return run_checked(self.transport, command)

        reply = patiently(self.transport, begin, self._gone_s)
        said = _tagged(reply.text)
        self._boot_id = said.get("boot", "")
        self._oom_kills = _integer(said.get("oom_kill", ""))
        self._started_s = time.monotonic()

    def _watch(
        self, tell: Callable[[RunEvent], None], poll_s: float, hang_s: float, each_poll: str
    ) -> tuple[Failure | None, int | None]:
        """Poll until the run ends; the failure if it did not end by itself, else its exit code."""
        alive_s = time.monotonic()  # the last sign of life
        while True:
            poll, broken = self._poll(each_poll, tell)
            now = time.monotonic()
            self._sample(now, poll.sensors, tell)
            if self._take(poll.events, tell) or broken:
                alive_s = now
            if poll.boot_id != self._boot_id or poll.run_boot_id not in ("", self._boot_id):
                return self._restarted(poll.boot_id), None
            if poll.exit_code is not None or poll.vanished:
                if len(poll.events) >= MAXIMUM_POLL_BYTES:
                    continue  # there may be more
                return None, poll.exit_code
            if poll.pid is None and now - self._started_s > _START_S:
                return self._not_begun(), None
            if now - alive_s > hang_s:
                self.kill()
                return self._hung(now - alive_s), None
            if len(poll.events) < MAXIMUM_POLL_BYTES:
                time.sleep(poll_s)

    def _poll(self, each_poll: str, tell: Callable[[RunEvent], None]) -> tuple[_Poll, bool]:
        """One answer, and whether the connection had to be found again for it."""
        marker = f"events of {self.run_id}"
        command = _poll_command(self.folder, marker, self._offset, each_poll)
        before = self._interruptions

        def interrupted(error: DeviceError) -> None:
            self._interruptions += 1
            tell(Interrupted(str(error)))

        reply = patiently(
            self.transport,
            lambda: run_checked(self.transport, command),
            self._gone_s,
            interrupted,
        )
        return parse_poll(reply.stdout, marker), self._interruptions != before

    def _sample(self, now: float, text: str, tell: Callable[[RunEvent], None]) -> None:
        sample = Sample(round(now - self._started_s, 3), sensors.parse(text))
        if len(self._samples) < MAXIMUM_SAMPLES:
            self._samples.append(sample)
        tell(sample)

    def _take(self, data: bytes, tell: Callable[[RunEvent], None]) -> bool:
        """Keep the whole lines of `data`; whether one of them is a sign of life.

        A line that is not finished is asked for again: a runner on a full disk takes it back.
        """
        end = data.rfind(b"\n") + 1
        if end == 0 and len(data) >= MAXIMUM_LINE_BYTES:
            raise RunnerProtocolError(f"an event has more than {MAXIMUM_LINE_BYTES} bytes")
        self._offset += end
        if self._offset > MAXIMUM_EVENTS_BYTES:
            raise RunnerProtocolError(
                f"the run told more than {MAXIMUM_EVENTS_BYTES} bytes of events; ask for fewer "
                "steps or sample memory less often"
            )
        lives = False
        for line in data[:end].splitlines():
            event = parse_event(line)
            self._events.append(event)
            lives |= event["event"] not in _SAMPLING_EVENTS
            tell(event)
        return lives

    def _collect(self, exit_code: int | None, tell: Callable[[RunEvent], None]) -> RunOutcome:
        result = self._result()
        if result is not None and result["status"] == "ok" and exit_code == 0:
            if result["run_id"] != self.run_id:
                raise RunnerProtocolError("the result is that of another run")
            return self._outcome(result, None)
        self.kill()  # what a crash left behind
        reply = patiently(
            self.transport,
            lambda: self.transport.shell(_examine_command(self.folder), timeout_s=60),
            self._gone_s,
        )
        traces = parse_traces(reply.text, self._oom_kills)
        return self._outcome(result, name_failure(exit_code, result, traces))

    def _result(self) -> dict[str, Any] | None:
        path = f"{self.folder}/{RESULT_FILE}"

        def pull() -> bytes | None:
            if self.transport.stat(path) is None:
                return None
            content = io.BytesIO()
            self.transport.pull(path, content, length=MAXIMUM_RESULT_BYTES + 1)
            return content.getvalue()

        content = patiently(self.transport, pull, self._gone_s)
        return None if content is None else parse_result(content)

    def _restarted(self, boot_id: str) -> Failure:
        return Failure(
            "device_restarted",
            f"the device {self.transport.serial} restarted in the middle of the run, "
            f"{self._last_event()}; look whether it was too hot or out of power",
            {"boot_id_before": self._boot_id, "boot_id_after": boot_id},
        )

    def _hung(self, silent_s: float) -> Failure:
        return Failure(
            "hang",
            f"the runner told nothing for {silent_s:.0f} s, {self._last_event()}, and was killed; "
            "give more time with a larger limit for hangs if the model is that slow",
            {"silent_s": round(silent_s, 1)},
        )

    def _not_begun(self) -> Failure:
        reply = self.transport.shell(_examine_command(self.folder), timeout_s=60)
        traces = parse_traces(reply.text, self._oom_kills)
        if traces.storage_full:
            return _storage_full(traces, {})
        return Failure("internal", f"the run did not begin within {_START_S:.0f} s", traces.said())

    def _last_event(self) -> str:
        names = [e["event"] for e in self._events if e["event"] not in _SAMPLING_EVENTS]
        return f"after its event {excerpt(names[-1])!r}" if names else "before its first event"

    def _outcome(self, result: dict[str, Any] | None, failure: Failure | None) -> RunOutcome:
        return RunOutcome(
            result, failure, tuple(self._events), tuple(self._samples), self._interruptions
        )


def start(
    transport: Transport, runner: Runner, request: RunRequest, *, gone_s: float = 60.0
) -> RemoteRun:
    """Start the run on the device, detached, once.

    A broken connection is waited for, up to `gone_s` each time. Raises a DeviceError if the device
    stays away, has no room, or does not do what it is told.
    """
    run = RemoteRun(transport, request.run_id, gone_s=gone_s)
    run._start(runner, request)
    return run


def patiently(
    transport: Transport,
    call: Callable[[], _ANSWER],
    gone_s: float,
    on_break: Callable[[DeviceError], None] | None = None,
) -> _ANSWER:
    """Do what may be done twice, and do it again when the device was lost and is found.

    Raises DeviceGone, CommandTimeout or ProtocolError when it has failed for `gone_s`.
    """
    give_up: float | None = None
    while True:
        try:
            return call()
        except (DeviceGone, CommandTimeout, ProtocolError) as error:
            now = time.monotonic()
            if give_up is None:
                give_up = now + gone_s
            elif now >= give_up:
                raise
            if on_break is not None:
                on_break(error)
            transport.reconnect(max(0.1, give_up - now))
            time.sleep(0.05)  # a device that answers but keeps failing is not asked without pause


@dataclass(frozen=True)
class _Poll:
    boot_id: str
    pid: int | None
    run_boot_id: str
    is_alive: bool
    exit_code: int | None
    sensors: str
    events: bytes

    @property
    def vanished(self) -> bool:
        """The process is gone and left no exit code; it writes that before it ends."""
        return self.pid is not None and not self.is_alive and self.exit_code is None


def parse_poll(answer: bytes, marker: str) -> _Poll:
    """Take the answer to a poll apart. Raises ProtocolError if it has no events section."""
    head, found, events = answer.partition(f"\n{marker}\n".encode())
    if not found:
        raise ProtocolError(
            "the device's answer to a poll broke off "
            f"({excerpt(answer[-200:].decode('utf-8', 'replace')) or 'it was empty'}); try again"
        )
    state, _, sensed = head.decode("utf-8", errors="replace").partition("\nsensors\n")
    said = _tagged(state)
    pid, start_ticks, boot_id = [*said.get("pid", "").split(), "", "", ""][:3]
    # comm, in parentheses, may hold anything; state is field 3, starttime field 22: proc(5).
    fields = said.get("stat", "").rpartition(") ")[2].split()
    is_alive = len(fields) > 19 and fields[0] not in ("Z", "X") and fields[19] == start_ticks
    return _Poll(
        boot_id=said.get("boot", ""),
        pid=_integer(pid),
        run_boot_id=boot_id,
        is_alive=is_alive,
        exit_code=_integer(said.get("exit", "")),
        sensors=sensed,
        events=events,
    )


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

    def said(self) -> dict[str, Any]:
        """The evidence for a record."""
        found = {
            "oom_kills": self.oom_kills,
            "lmkd": self.lmkd or None,
            "free_bytes": self.free_bytes,
            "log_tail": self.log_tail or None,
        }
        return {key: value for key, value in found.items() if value is not None}


def parse_traces(text: str, oom_kills_before: int | None) -> Traces:
    """Understand the answer to the examination of a failed run; no answer raises."""
    head, _, log = text.partition("\nlog\n")
    said = _tagged(head)
    kills = _integer(said.get("oom_kill", ""))
    blocks = said.get("free", "").split()
    counts = [_integer(word) for word in blocks]
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
    evidence = {"exit_code": exit_code} | traces.said()
    last = excerpt(traces.log_tail.strip().rpartition("\n")[2]) or "its log is empty"
    told = (result or {}).get("failure")
    if told is not None:
        reason = told["reason"] if told["reason"] in REASONS else "internal"
        return Failure(reason, told["sentence"], evidence)
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
        return _storage_full(traces, evidence)
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


def _storage_full(traces: Traces, evidence: Mapping[str, Any]) -> Failure:
    free = "" if traces.free_bytes is None else f" ({traces.free_bytes} bytes are free)"
    return Failure(
        "storage_full",
        f"the device had no room for what the run writes{free}; delete something there, or remove "
        "earlier bundles with `pocketdiff clean`",
        traces.said() | dict(evidence),
    )


def _start_command(folder: str, runner: str) -> str:
    """Start once, whatever breaks: whoever makes the folder `started` does it.

    The exit code has its block on the disk from the beginning, so that a full disk takes it.
    """
    script = (
        "read -r s </proc/$$/stat; set -- ${s##*) }; t=${20}\n"
        "b=; { read -r b </proc/sys/kernel/random/boot_id; } 2>/dev/null\n"
        'echo 000 >exit.part && echo "$$ $t $b" >pid.part && mv pid.part pid || exit\n'
        f"{runner}\n"
        "echo $? 1<>exit.part && mv exit.part exit\n"
    )
    return (
        f"cd {quote(folder)} || exit\n"
        'b=; { read -r b </proc/sys/kernel/random/boot_id; } 2>/dev/null; echo "boot $b"\n'
        "grep '^oom_kill ' /proc/vmstat 2>/dev/null\n"
        "[ -d started ] && exit 0\n"
        "mkdir started || exit\n"
        f"setsid sh -c {quote(script)} </dev/null >log.txt 2>&1 &\n"
        # adbd hangs up when this shell ends; by then the run must have a session of its own.
        "i=0; until [ -e pid ] || [ $i -ge 50 ]; do sleep 0.02; i=$((i+1)); done\n"
    )


def _poll_command(folder: str, marker: str, offset: int, each_poll: str) -> str:
    return (
        f"cd {quote(folder)} || exit\n"
        "b= p= t= r= s= x=\n"
        "{ read -r b </proc/sys/kernel/random/boot_id; read -r p t r <pid\n"
        '[ -n "$p" ] && read -r s </proc/$p/stat; read -r x <exit; } 2>/dev/null\n'
        'echo "boot $b"; echo "pid $p $t $r"; echo "stat $s"; echo "exit $x"\n'
        f"{each_poll}\n"
        "echo sensors\n"
        f"{sensors.POLL_COMMAND}"
        f"echo; echo {quote(marker)}\n"
        f"tail -c +{offset + 1} {EVENTS_FILE} 2>/dev/null | head -c {MAXIMUM_POLL_BYTES}\n"
    )


def _examine_command(folder: str) -> str:
    return (
        "grep '^oom_kill ' /proc/vmstat 2>/dev/null\n"
        f"echo \"free $(stat -f -c '%a %S' {quote(folder)} 2>/dev/null)\"\n"
        "if command -v logcat >/dev/null; then\n"
        'echo "lmkd $(logcat -d -t 500 -s lowmemorykiller:* lmkd:* 2>/dev/null |'
        ' grep -i kill | grep -i -e pocketdiff -e export.host.runner | tail -n 1)"\nfi\n'
        f"echo; echo log; tail -c {LOG_TAIL_BYTES} {quote(folder + '/log.txt')} 2>/dev/null\n:\n"
    )


def _tagged(text: str) -> dict[str, str]:
    """Lines `name value`; the first of a name counts, lengths are bounded."""
    said: dict[str, str] = {}
    for line in text[: 2**16].splitlines():
        name, _, value = line.partition(" ")
        said.setdefault(name[:32], value[:1000].strip())
    return said


def _integer(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d{1,18}", text, re.ASCII) else None


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
