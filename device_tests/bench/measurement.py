"""The measurement protocol: the runs of a plan are made one after the other, each recorded.

How a run is started and followed is `remote_run`'s, what the numbers mean `metrics`'. Every run
that was begun leaves a record, whatever became of it, and so does one that the heat prevented.
"""

from __future__ import annotations

import logging
import os
import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from device_tests.adb.transport import Transport
from device_tests.bench import remote_run
from device_tests.bench.context import BenchContext
from device_tests.bench.deploy import Deployment
from device_tests.bench.device_lock import DeviceLock
from device_tests.bench.events import (
    BenchEvent,
    BenchOutcome,
    BenchStarted,
    ConnectionLost,
    GateWaiting,
    RunEnded,
    RunProgress,
    RunStarted,
)
from device_tests.bench.failures import Failure
from device_tests.bench.plan import BenchPlan, PlannedRun
from device_tests.bench.remote_run import Interrupted, RunOutcome, Sample
from device_tests.bench.resume import missing_runs
from device_tests.bench.run_record import (
    make_record,
    missing_answers,
    runner_versions,
    sample_json,
)
from device_tests.bench.runner import Runner
from device_tests.bench.thermal_gate import ThermalGate
from device_tests.bench.workload import prepare, run_request
from device_tests.errors import CommandTimeout, DeviceBusy, DeviceGone, ProtocolError, StorageFull
from device_tests.remote import sensors
from device_tests.remote.conditions import read_device
from device_tests.remote.retry import retry_while_gone
from device_tests.remote.shell import run_checked
from device_tests.results import records
from device_tests.results.records import Reason, Record
from export.contract.bundle import Bundle
from export.contract.runner_protocol import RunnerProtocolError
from quantize.errors import DeviceError

_ENDING: frozenset[Reason] = frozenset(
    {"device_gone", "runner_missing", "bundle_refused", "storage_full"}
)
"""Failures after which no other run can go well."""

_THERMAL_ATTEMPTS = 2
"""Time-outs of the gate in a row after which the device will not cool down."""

_INTERRUPT_S = 5.0
"""How long Ctrl-C looks for a lost device to kill what runs there."""

_log = logging.getLogger(__name__)


def bench(
    transport: Transport,
    bundle: Bundle,
    deployment: Deployment,
    runner: Runner,
    plan: BenchPlan,
    results: str | os.PathLike[str],
    *,
    resume: bool = False,
    on_event: Callable[[BenchEvent], None] | None = None,
) -> BenchOutcome:
    """Make the runs of `plan` with the deployed bundle and append a record of each to `results`.

    resume: runs that are in `results` already and went well, for the same device, bundle and
    workload, are not made again. Ctrl-C kills the run on the device and gives the device back;
    what was written stays. Raises DeviceBusy if another benchmark has the device, InputError if
    the plan does not fit the bundle, RecordError or OutputError for the file, DeviceError if the
    device cannot be asked in the beginning.
    """
    results = Path(results)
    workloads, puzzles = prepare(plan, bundle)
    records.prepare(results)
    earlier = records.read(results)
    bench_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    with DeviceLock(transport, bench_id, gone_s=plan.gone_s) as lock:
        device = retry_while_gone(transport, lambda: read_device(transport), plan.gone_s)
        context = BenchContext(
            bench_id, transport, device, bundle, deployment, runner, plan, workloads, puzzles
        )
        runs = missing_runs(context, earlier if resume else ())
        work = _Bench(context, lock, results, len(runs), on_event or (lambda _: None))
        skipped = len(list(plan.runs)) - len(runs)
        work.report(BenchStarted(bench_id, device, len(runs), skipped, lock.note))
        ended_early = work.make(runs)
    return BenchOutcome(bench_id, tuple(work.written), skipped, ended_early)


@dataclass
class _Bench:
    """The runs of one benchmark on a device that is locked."""

    context: BenchContext
    lock: DeviceLock
    results: Path
    runs: int
    report: Callable[[BenchEvent], None]
    written: list[Record] = field(default_factory=list)
    _took_s: list[float] = field(default_factory=list)
    _runner_versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._plan = self.context.plan
        self._transport = self.context.transport

    def make(self, runs: Sequence[PlannedRun]) -> str | None:
        """Make the runs one after the other; why it ended before the last, or None."""
        too_hot = 0
        for number, run in enumerate(runs, 1):
            began_s = time.monotonic()
            record = self._make_one(run, number)
            records.append(self.results, record)
            self.written.append(record)
            self._took_s.append(time.monotonic() - began_s)
            left = len(runs) - number
            self.report(RunEnded(run, record, number, self.runs, self._eta_s(left)))
            reason = record["failure"]["reason"] if record["failure"] else None
            too_hot = too_hot + 1 if reason == "thermal_timeout" else 0
            if left and (reason in _ENDING or too_hot == _THERMAL_ATTEMPTS):
                return (
                    f"{record['failure']['sentence']}; {left} of {self.runs} runs were not made, "
                    "resume when that is mended"
                )
        return None

    def _make_one(self, run: PlannedRun, number: int) -> Record:
        """The record of one run, whatever becomes of it."""
        started_at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        threads = "auto" if run.threads is None else run.threads
        run_id = f"{self.context.bench_id}-{run.pass_}-t{threads}-{run.repeat}"
        gate = ThermalGate(self._plan.max_temperature_c)
        samples: list[dict[str, Any]] = []
        outcome = RunOutcome(None, None, (), (), 0)
        try:
            self._wait_until_cool(run, gate)
            failure = gate.failure
            if failure is None:
                eta_s = self._eta_s(self.runs - number + 1)
                self.report(RunStarted(run, run_id, number, self.runs, eta_s))
                outcome = self._run(run, run_id, gate, samples)
                failure = outcome.failure
                if failure is None and run.pass_ == "puzzles":
                    failure = missing_answers(outcome, self.context.puzzles)
            elif gate.reading is not None:
                samples.append(sample_json(0.0, "before", gate.reading))
        except DeviceBusy:
            raise  # the lock is another benchmark's now
        except DeviceError as error:
            failure = _failure_of(error)
        # A runner that fails before it states its versions is the one of the run before.
        self._runner_versions = runner_versions(outcome) or self._runner_versions
        return make_record(
            self.context, run, run_id, started_at, gate, samples, outcome, failure,
            self._runner_versions,
        )  # fmt: skip

    def _wait_until_cool(self, run: PlannedRun, gate: ThermalGate) -> None:
        gate.wait(
            self._transport,
            timeout_s=self._plan.gate_timeout_s,
            poll_s=self._plan.poll_s,
            gone_s=self._plan.gone_s,
            beat=self.lock.beat,
            on_break=lambda error: self.report(ConnectionLost(str(error))),
            on_wait=lambda sensor, celsius, waited_s: self.report(
                GateWaiting(run, sensor, celsius, gate.threshold_c, waited_s)
            ),
        )

    def _run(
        self, run: PlannedRun, run_id: str, gate: ThermalGate, samples: list[dict[str, Any]]
    ) -> RunOutcome:
        """Start the run and see it to its end; sensors go into `samples`."""

        def on_event(event: remote_run.RunEvent) -> None:
            if isinstance(event, Interrupted):
                self.report(ConnectionLost(event.sentence))
            elif not isinstance(event, Sample):
                self.report(RunProgress(run, event))

        request = run_request(self.context, run, run_id)
        try:
            going = remote_run.start(
                self._transport, self.context.runner, request, gone_s=self._plan.gone_s
            )
            started_s = time.monotonic()
            outcome = going.follow(
                on_event,
                poll_s=self._plan.poll_s,
                hang_s=self._plan.hang_s,
                each_poll=self.lock.beat_command,
            )
        except BaseException:
            self._kill(run_id)
            raise
        if gate.reading is not None:
            samples.append(sample_json(gate.read_s - started_s, "before", gate.reading))
        samples += [sample_json(s.t_s, "during", s.reading) for s in outcome.samples]
        try:
            self._finish(going, outcome, samples, started_s)
        except DeviceError as error:  # the run is over, its record must not suffer
            _log.warning("after the run %s: %s", run_id, error)
        return outcome

    def _finish(
        self,
        going: remote_run.RemoteRun,
        outcome: RunOutcome,
        samples: list[dict[str, Any]],
        started_s: float,
    ) -> None:
        """Read the sensors once more; what failed stays there to be looked at."""
        if outcome.failure is not None and outcome.failure.reason == "device_gone":
            return
        answer = retry_while_gone(
            self._transport,
            lambda: run_checked(self._transport, sensors.COMMAND),
            self._plan.gone_s,
        )
        after = sensors.parse(answer.text)
        samples.append(sample_json(time.monotonic() - started_s, "after", after))
        if outcome.failure is None:
            retry_while_gone(self._transport, going.remove, self._plan.gone_s)

    def _kill(self, run_id: str) -> None:
        going = remote_run.RemoteRun(self._transport, run_id, gone_s=_INTERRUPT_S)
        try:
            going.kill()
        except DeviceError as error:
            _log.warning("the run %s could not be killed: %s", run_id, error)

    def _eta_s(self, left: int) -> float | None:
        return left * statistics.fmean(self._took_s) if self._took_s else None


def _failure_of(error: DeviceError) -> Failure:
    """The failure of a run that could not be begun, or not be finished with."""
    reason: Reason = "internal"
    if isinstance(error, DeviceGone | CommandTimeout | ProtocolError):
        reason = "device_gone"
    elif isinstance(error, StorageFull):
        reason = "storage_full"
    elif isinstance(error, RunnerProtocolError):
        reason = "input"
    return Failure(reason, str(error), {"error": type(error).__name__})
