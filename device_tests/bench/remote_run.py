"""One run on a device: started detached, followed by polls, its end collected and named.

Nothing depends on an open stream: the run writes its events and its result into a folder on the
device, where they are found later. Which runs are made, and when, is not known here.

What following costs the device: each poll is one `sh`, whose builtins read the state of the process
and the sensors (see `sensors.POLL_COMMAND`), and `tail` with `head` for the new events. On an x86
core at 2 GHz, with files in the place of 60 thermal zones, that took 5 ms of processor time: half a
per cent of one core at one poll a second.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from device_tests.adb.transport import ShellResult, Transport
from device_tests.bench import run_folder
from device_tests.bench.failures import (
    Failure,
    Traces,
    name_failure,
    parse_traces,
    storage_full_failure,
)
from device_tests.bench.runner import Runner
from device_tests.errors import CommandTimeout, DeviceGone, ProtocolError
from device_tests.remote import sensors
from device_tests.remote.retry import Answer, retry_while_gone
from device_tests.remote.shell import excerpt, quote, run_checked
from export.contract.runner_protocol import (
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

MAXIMUM_EVENTS_BYTES = 64 * 2**20
"""Of all events of a run; a run that writes more is ended."""

MAXIMUM_SAMPLES = 100_000

_START_S = 20.0
"""How long a started run may take to write its process number."""

_SAMPLING_EVENTS = frozenset({"memory", "temperature"})
"""Events that a timer writes: they do not show that the run itself goes on."""


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
"""What `follow` passes on: the runner's events as they are, sensors, and broken connections."""


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
        self.folder = f"{run_folder.RUNS_FOLDER}/{run_id}"
        self._gone_s = gone_s
        self._boot_id = ""
        self._oom_kills: int | None = None
        self._started_s = 0.0
        self._offset = 0
        self._events: list[dict[str, Any]] = []
        self._samples: list[Sample] = []
        self._interruptions = 0
        self._report: Callable[[RunEvent], None] = _ignore

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
        a piece of shell that is run with every poll. `on_event` is called as events arrive.
        """
        self._report = on_event or _ignore
        try:
            failure, exit_code = self._watch(poll_s, hang_s, each_poll)
            if failure is None:
                return self._collect(exit_code)
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

        Raises a DeviceError if the device stays away for `gone_s`, by default that of `start`.
        """
        command = run_folder.kill_command(self.folder)
        self._retry(lambda: self.transport.shell(command, timeout_s=10), gone_s)

    def remove(self) -> None:
        """Remove the run's folder from the device."""
        run_checked(self.transport, f"rm -rf {quote(self.folder)}")

    def _start(self, runner: Runner, request: RunRequest) -> None:
        content = request.to_bytes()
        file = f"{self.folder}/{REQUEST_FILE}"
        command = run_folder.start_command(self.folder, runner.command(file))

        def begin() -> ShellResult:
            run_checked(self.transport, f"mkdir -p {quote(self.folder)}")
            self.transport.push(io.BytesIO(content), file, len(content))
            return run_checked(self.transport, command)

        said = run_folder.parse_tagged(self._retry(begin).text)
        self._boot_id = said.get("boot", "")
        self._oom_kills = run_folder.parse_integer(said.get("oom_kill", ""))
        self._started_s = time.monotonic()

    def _retry(self, call: Callable[[], Answer], gone_s: float | None = None) -> Answer:
        wait_s = self._gone_s if gone_s is None else gone_s
        return retry_while_gone(self.transport, call, wait_s)

    def _watch(
        self, poll_s: float, hang_s: float, each_poll: str
    ) -> tuple[Failure | None, int | None]:
        """Poll until the run ends; the failure if it did not end by itself, else its exit code."""
        alive_s = time.monotonic()  # when the run last showed that it goes on
        while True:
            poll, broken = self._poll(each_poll)
            now = time.monotonic()
            self._sample(now, poll.sensors)
            if self._take(poll.events) or broken:
                alive_s = now
            if poll.boot_id != self._boot_id or poll.run_boot_id not in ("", self._boot_id):
                return self._restarted(poll.boot_id), None
            if poll.exit_code is not None or poll.vanished:
                if len(poll.events) >= run_folder.MAXIMUM_POLL_BYTES:
                    continue  # there may be more
                return None, poll.exit_code
            if poll.pid is None and now - self._started_s > _START_S:
                return self._not_begun(), None
            if now - alive_s > hang_s:
                self.kill()
                return self._hung(now - alive_s), None
            if len(poll.events) < run_folder.MAXIMUM_POLL_BYTES:
                time.sleep(poll_s)

    def _poll(self, each_poll: str) -> tuple[run_folder.Poll, bool]:
        """One answer, and whether the connection had to be found again for it."""
        marker = f"events of {self.run_id}"
        command = run_folder.poll_command(self.folder, marker, self._offset, each_poll)
        before = self._interruptions

        def interrupted(error: DeviceError) -> None:
            self._interruptions += 1
            self._report(Interrupted(str(error)))

        reply = retry_while_gone(
            self.transport,
            lambda: run_checked(self.transport, command),
            self._gone_s,
            interrupted,
        )
        return run_folder.parse_poll(reply.stdout, marker), self._interruptions != before

    def _sample(self, now: float, text: str) -> None:
        sample = Sample(round(now - self._started_s, 3), sensors.parse(text))
        if len(self._samples) < MAXIMUM_SAMPLES:
            self._samples.append(sample)
        self._report(sample)

    def _take(self, data: bytes) -> bool:
        """Keep the whole lines of `data`; whether one of them shows that the run goes on.

        A line that is not finished is asked for again: a runner on a full disk takes it back.
        """
        end = data.rfind(b"\n") + 1
        if end == 0 and len(data) >= MAXIMUM_LINE_BYTES:
            raise RunnerProtocolError(f"an event has more than {MAXIMUM_LINE_BYTES} bytes")
        self._offset += end
        if self._offset > MAXIMUM_EVENTS_BYTES:
            raise RunnerProtocolError(
                f"the run wrote more than {MAXIMUM_EVENTS_BYTES} bytes of events; ask for fewer "
                "steps or sample memory less often"
            )
        lives = False
        for line in data[:end].splitlines():
            event = parse_event(line)
            self._events.append(event)
            lives |= event["event"] not in _SAMPLING_EVENTS
            self._report(event)
        return lives

    def _collect(self, exit_code: int | None) -> RunOutcome:
        result = self._result()
        if result is not None and result["status"] == "ok" and exit_code == 0:
            if result["run_id"] != self.run_id:
                raise RunnerProtocolError("the result is that of another run")
            return self._outcome(result, None)
        self.kill()  # what a crash left behind
        return self._outcome(result, name_failure(exit_code, result, self._retry(self._examine)))

    def _examine(self) -> Traces:
        reply = self.transport.shell(run_folder.examine_command(self.folder), timeout_s=60)
        return parse_traces(reply.text, self._oom_kills)

    def _result(self) -> dict[str, Any] | None:
        path = f"{self.folder}/{RESULT_FILE}"

        def pull() -> bytes | None:
            if self.transport.stat(path) is None:
                return None
            content = io.BytesIO()
            self.transport.pull(path, content, length=MAXIMUM_RESULT_BYTES + 1)
            return content.getvalue()

        content = self._retry(pull)
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
            f"the runner wrote nothing for {silent_s:.0f} s, {self._last_event()}, and was killed; "
            "give more time with a larger limit for hangs if the model is that slow",
            {"silent_s": round(silent_s, 1)},
        )

    def _not_begun(self) -> Failure:
        traces = self._examine()
        if traces.storage_full:
            return storage_full_failure(traces, {})
        return Failure(
            "internal", f"the run did not begin within {_START_S:.0f} s", traces.evidence()
        )

    def _last_event(self) -> str:
        names = [e["event"] for e in self._events if e["event"] not in _SAMPLING_EVENTS]
        return f"after its event {excerpt(names[-1])!r}" if names else "before its first event"

    def _outcome(self, result: dict[str, Any] | None, failure: Failure | None) -> RunOutcome:
        return RunOutcome(
            result, failure, tuple(self._events), tuple(self._samples), self._interruptions
        )


def _ignore(event: RunEvent) -> None:
    """What follows without `on_event`."""


def start(
    transport: Transport, runner: Runner, request: RunRequest, *, gone_s: float = 60.0
) -> RemoteRun:
    """Start the run on the device, detached, once.

    A broken connection is waited for, up to `gone_s` each time. Raises a DeviceError if the device
    stays away, has no room, or refuses.
    """
    run = RemoteRun(transport, request.run_id, gone_s=gone_s)
    run._start(runner, request)
    return run
