"""The measurement protocol: which runs are made, when each may begin, what is recorded of it.

How a run is started and followed is `remote_run`'s, what the numbers mean `metrics`'. Every run
that was begun leaves a record, whatever became of it, and so does one that the heat prevented.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy as np

from device_tests.adb.transport import Transport
from device_tests.bench import remote_run
from device_tests.bench.deploy import Deployment
from device_tests.bench.device_lock import DeviceLock
from device_tests.bench.inventory import PACKED_FOLDER
from device_tests.bench.remote_run import (
    Failure,
    Interrupted,
    Runner,
    RunOutcome,
    Sample,
    patiently,
)
from device_tests.errors import CommandTimeout, DeviceBusy, DeviceGone, ProtocolError, StorageFull
from device_tests.remote import conditions, sensors
from device_tests.remote.shell import run_checked
from device_tests.results import records
from device_tests.results.records import PASSES, Pass, Reason, Record
from export.contract import philox
from export.contract.bundle import Bundle, Manifest
from export.contract.runner_protocol import RunnerProtocolError, RunRequest
from export.host.puzzles import Puzzle, held_out, is_exact
from quantize.errors import DeviceError, InputError

PROMPT_STREAM = 2
"""Philox stream of random prompts; the sampler's are 0 and 1."""

DEFAULT_PROMPT_TOKENS = 32
DEFAULT_NEW_TOKENS = 64
DEFAULT_STEPS = 16
DEFAULT_PUZZLE_RUNS = 3

_ENDING: frozenset[Reason] = frozenset(
    {"device_gone", "runner_missing", "bundle_refused", "storage_full"}
)
"""Failures after which no other run can go well."""

_THERMAL_ATTEMPTS = 2
"""Time-outs of the gate in a row after which the device will not cool down."""

_INTERRUPT_S = 5.0
"""How long Ctrl-C looks for a lost device to kill what runs there."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchPlan:
    """What to measure; the runs are made in the order of threads, then of `PASSES`, then repeats.

    cold: the bundle is loaded from storage. warm_up: as speed, kept apart. speed: a fixed number of
    steps. natural: as many steps as the sampler takes. memory: as speed, memory sampled beside it.
    puzzles: `puzzles` held-out puzzles of each kind, answered one by one in one process, graded on
    the host; only if their number is given, and then three times by default.

    threads: None is the runtime's choice. prompt_text: for the natural pass (of a bundle with a
    tokenizer); every other prompt is `prompt_tokens` random tokens, by default 32 or what fits.
    canvases: by default one, or as many as hold 64 tokens where canvases are not of uniform
    diffusion (an autoregressive canvas is one token). force_steps: denoising steps of every canvas,
    except in the natural pass; by default 16, elsewhere at most one a position. Any number makes
    an autoregressive model go on behind its end token. max_temperature_c: a
    run begins only under it; after `gate_timeout_s` of waiting it is recorded as failed. hang_s:
    a run is killed after so long without an event. gone_s: how long a lost device is waited for.
    memory_budget_bytes: most memory that a run may have resident; weights are streamed to hold it.
    Raises InputError for a value out of range.
    """

    passes: Mapping[str, int] = field(
        default_factory=lambda: {"cold": 1, "warm_up": 1, "speed": 6, "natural": 6, "memory": 1}
    )
    threads: Sequence[int | None] = (None,)
    prompt_text: str | None = None
    prompt_tokens: int | None = None
    canvases: int | None = None
    force_steps: int | None = None
    warmup_steps: int = 2
    seed: int = 0
    settings: Mapping[str, float] | None = None
    max_temperature_c: float = 45.0
    gate_timeout_s: float = 300.0
    hang_s: float = 120.0
    poll_s: float = 1.0
    gone_s: float = 60.0
    memory_interval_ms: int = 50
    memory_limit_bytes: int | None = None
    memory_budget_bytes: int | None = None
    puzzles: int | None = None

    def __post_init__(self) -> None:
        if self.puzzles is not None:
            _whole("puzzles", self.puzzles, 1, 10_000)
            passes = {"puzzles": DEFAULT_PUZZLE_RUNS} | dict(self.passes)
            object.__setattr__(self, "passes", passes)
        elif self.passes.get("puzzles"):
            raise InputError("the pass puzzles has no puzzles; say how many of each kind")
        for name, count in self.passes.items():
            if name not in PASSES:
                raise InputError(f"there is no pass {name!r}; give some of {', '.join(PASSES)}")
            _whole(f"the repeats of the pass {name}", count, 0, 10_000)
        if not any(self.passes.values()):
            raise InputError("the plan has no run; give a pass at least one repeat")
        if not self.threads or len(set(self.threads)) != len(self.threads):
            raise InputError(f"threads is {list(self.threads)}; give each number of threads once")
        for threads in self.threads:
            if threads is not None:
                _whole("threads", threads, 1, 1024)
        if self.prompt_text is not None and not self.prompt_text.strip():
            raise InputError("prompt_text is empty; give a text, or none")
        if self.prompt_tokens is not None:
            _whole("prompt_tokens", self.prompt_tokens, 1, 2**20)
        if self.canvases is not None:
            _whole("canvases", self.canvases, 1, 2**20)
        if self.force_steps is not None:
            _whole("force_steps", self.force_steps, 1, 2**20)
        _whole("warmup_steps", self.warmup_steps, 0, 2**20)
        _whole("seed", self.seed, 0, 2**64 - 1)
        _whole("memory_interval_ms", self.memory_interval_ms, 1, 60_000)
        if self.memory_limit_bytes is not None:
            _whole("memory_limit_bytes", self.memory_limit_bytes, 1, 2**60)
        if self.memory_budget_bytes is not None:
            _whole("memory_budget_bytes", self.memory_budget_bytes, 1, 2**60)
        _real("max_temperature_c", self.max_temperature_c, 0, 120)
        _real("gate_timeout_s", self.gate_timeout_s, 0, 86_400)
        _real("hang_s", self.hang_s, 0.1, 86_400)
        _real("poll_s", self.poll_s, 0.01, 60)
        _real("gone_s", self.gone_s, 0, 86_400)
        # A frozen plan should stay as it was checked.
        object.__setattr__(self, "passes", MappingProxyType(dict(self.passes)))
        object.__setattr__(self, "threads", tuple(self.threads))


@dataclass(frozen=True)
class PlannedRun:
    """One run of a plan: number `repeat` of `repeats`, counted from 0, of a pass."""

    threads: int | None
    pass_: Pass
    repeat: int
    repeats: int


@dataclass(frozen=True)
class BenchStarted:
    """The device is locked; `skipped` runs of the plan are in the results already.

    note: what was found on the device, such as the lock of a benchmark that died.
    """

    bench_id: str
    device: conditions.Device
    runs: int
    skipped: int
    note: str | None


@dataclass(frozen=True)
class GateWaiting:
    """The device is too warm for the next run."""

    run: PlannedRun
    sensor: str
    temperature_c: float
    threshold_c: float
    waited_s: float


@dataclass(frozen=True)
class RunStarted:
    """Run `number` (from 1) of `runs` goes; `eta_s` until the end of all, None before the first
    has ended."""

    run: PlannedRun
    run_id: str
    number: int
    runs: int
    eta_s: float | None


@dataclass(frozen=True)
class RunProgress:
    """What the runner told: its event as it is."""

    run: PlannedRun
    event: Mapping[str, Any]


@dataclass(frozen=True)
class ConnectionLost:
    """The device is being waited for; the run on it goes on."""

    sentence: str


@dataclass(frozen=True)
class RunEnded:
    """A record was written."""

    run: PlannedRun
    record: Record
    number: int
    runs: int
    eta_s: float | None


BenchEvent = BenchStarted | GateWaiting | RunStarted | RunProgress | ConnectionLost | RunEnded


@dataclass(frozen=True)
class BenchOutcome:
    """What a benchmark wrote; `ended_early` says why runs of the plan were not made."""

    bench_id: str
    records: tuple[Record, ...]
    skipped: int
    ended_early: str | None

    @property
    def failed(self) -> int:
        """Records of failed runs."""
        return sum(record["status"] == "failed" for record in self.records)


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
        device = patiently(transport, lambda: conditions.read_device(transport), plan.gone_s)
        done = _done(earlier, device, deployment, plan) if resume else set()
        planned = list(_planned(plan))
        runs = [r for r in planned if _key(r.threads, r.pass_, r.repeat, workloads) not in done]
        work = _Bench(
            transport, bundle, deployment, runner, plan, results, lock, device, workloads,
            puzzles, on_event or (lambda _: None), len(runs),
        )  # fmt: skip
        skipped = len(planned) - len(runs)
        work.tell(BenchStarted(bench_id, device, len(runs), skipped, lock.note))
        ended_early = work.make(runs)
    return BenchOutcome(bench_id, tuple(work.written), skipped, ended_early)


def prepare(
    plan: BenchPlan, bundle: Bundle
) -> tuple[dict[Pass, dict[str, Any]], tuple[Puzzle, ...]]:
    """The workload of each pass as a record has it, and the puzzles if there are to be some.

    Raises InputError for what does not fit the model, and for puzzles for a bundle that has no
    tokenizer, or one that cannot write them.
    """
    names = [name for name in PASSES if name != "puzzles"]
    workloads = {name: workload(plan, name, bundle.manifest) for name in names}
    if plan.puzzles is None:
        return workloads, ()
    from export.host.evaluation import room_for_answers
    from export.host.tokenizer import open_tokenizer

    puzzles = tuple(held_out(plan.puzzles, plan.seed))
    try:
        tokenizer = open_tokenizer(bundle)
        new_tokens = room_for_answers(puzzles, tokenizer, bundle.manifest.model)
    except InputError as error:
        raise InputError(f"puzzles cannot be asked: {error}; or leave out --puzzles") from error
    workloads["puzzles"] = workloads["natural"] | {
        "prompt_tokens": None,
        "prompt_text": None,
        "max_new_tokens": new_tokens,
        "puzzles": plan.puzzles,
    }
    return workloads, puzzles


def workload(plan: BenchPlan, name: Pass, manifest: Manifest) -> dict[str, Any]:
    """The workload of a pass as a record has it. Raises InputError if it does not fit the model."""
    info = manifest.model
    canvases, force_steps = plan.canvases, plan.force_steps
    is_uniform = manifest.style == "uniform_diffusion"
    if canvases is None:
        wanted = 1 if is_uniform else -(-DEFAULT_NEW_TOKENS // info.canvas_length)
        fitting = (info.maximum_context - 1) // info.canvas_length
        canvases = max(1, min(wanted, fitting // 2))
    if force_steps is None:
        force_steps = DEFAULT_STEPS if is_uniform else min(DEFAULT_STEPS, info.canvas_length)
    new_tokens = canvases * info.canvas_length
    room = info.maximum_context - new_tokens
    if room < 1:
        raise InputError(
            f"{canvases} canvases of {info.canvas_length} tokens leave no room for a prompt "
            f"in a context of {info.maximum_context}; give fewer canvases"
        )
    count = min(DEFAULT_PROMPT_TOKENS, room) if plan.prompt_tokens is None else plan.prompt_tokens
    if count > room:
        raise InputError(
            f"a prompt of {count} tokens and {canvases} canvases of {info.canvas_length} do "
            f"not fit in a context of {info.maximum_context}; at most {room} prompt tokens do"
        )
    natural = name == "natural"
    text = plan.prompt_text if natural and manifest.tokenizer is not None else None
    return {
        "prompt_tokens": count if text is None else None,
        "prompt_text": text,
        "max_new_tokens": new_tokens,
        "seed": plan.seed,
        "force_steps": None if natural else force_steps,
        "settings": None if plan.settings is None else dict(plan.settings),
        # A first run that is warmed up would hide what loading from storage costs.
        "warmup_steps": 0 if name == "cold" else plan.warmup_steps,
        "memory_interval_ms": plan.memory_interval_ms if name == "memory" else None,
        "memory_limit_bytes": plan.memory_limit_bytes,
    } | (
        # Only where there is one: runs from before there were budgets had none.
        {}
        if plan.memory_budget_bytes is None
        else {"memory_budget_bytes": plan.memory_budget_bytes}
    )


def random_prompt(manifest: Manifest, count: int, seed: int) -> tuple[int, ...]:
    """`count` token ids, uniform over all that are not special, the same for the same seed."""
    special = manifest.special_tokens
    named = {*special.eos, special.pad, special.bos} - {None}
    ordinary = [i for i in range(min(manifest.model.vocabulary_size, 2**24)) if i not in named]
    if not ordinary:
        raise InputError("the bundle's vocabulary has only special tokens; give a prompt as text")
    drawn = philox.words(seed, 0, 0, PROMPT_STREAM, count).astype(np.uint64)
    places = (drawn * np.uint64(len(ordinary))) >> np.uint64(32)
    return tuple(ordinary[int(place)] for place in places)


@dataclass
class _Gate:
    """The wait for a cool device, and what was read when it ended."""

    threshold_c: float
    sensor: str | None = None
    begin_c: float | None = None
    waited_s: float = 0.0
    timed_out: bool = False
    reading: sensors.Reading | None = None
    clocks: conditions.Clocks = field(default_factory=conditions.Clocks)
    read_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "threshold_c": self.threshold_c,
            "sensor": self.sensor,
            "begin_c": self.begin_c,
            "waited_s": round(self.waited_s, 3),
            "timed_out": self.timed_out,
        }


class _Bench:
    """The runs of one benchmark on a device that is locked."""

    def __init__(
        self,
        transport: Transport,
        bundle: Bundle,
        deployment: Deployment,
        runner: Runner,
        plan: BenchPlan,
        results: Path,
        lock: DeviceLock,
        device: conditions.Device,
        workloads: Mapping[Pass, dict[str, Any]],
        puzzles: Sequence[Puzzle],
        tell: Callable[[BenchEvent], None],
        runs: int,
    ) -> None:
        self.transport = transport
        self.bundle = bundle
        self.deployment = deployment
        self.runner = runner
        self.plan = plan
        self.results = results
        self.lock = lock
        self.device = device
        self.workloads = workloads
        self.puzzles = puzzles
        self.tell = tell
        self.runs = runs
        self.written: list[Record] = []
        self._took_s: list[float] = []
        self._runner_versions: dict[str, str] = {}

    def make(self, runs: Sequence[PlannedRun]) -> str | None:
        """Make the runs one after the other; why it ended before the last, or None."""
        too_hot = 0
        for number, run in enumerate(runs, 1):
            began_s = time.monotonic()
            record = self.make_one(run, number)
            records.append(self.results, record)
            self.written.append(record)
            self._took_s.append(time.monotonic() - began_s)
            left = len(runs) - number
            self.tell(RunEnded(run, record, number, self.runs, self._eta_s(left)))
            reason = record["failure"]["reason"] if record["failure"] else None
            too_hot = too_hot + 1 if reason == "thermal_timeout" else 0
            if left and (reason in _ENDING or too_hot == _THERMAL_ATTEMPTS):
                return (
                    f"{record['failure']['sentence']}; {left} of {self.runs} runs were not made, "
                    "resume when that is mended"
                )
        return None

    def make_one(self, run: PlannedRun, number: int) -> Record:
        """The record of one run, whatever becomes of it."""
        started_at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        threads = "auto" if run.threads is None else run.threads
        run_id = f"{self.lock.bench_id}-{run.pass_}-t{threads}-{run.repeat}"
        gate = _Gate(self.plan.max_temperature_c)
        samples: list[dict[str, Any]] = []
        outcome = RunOutcome(None, None, (), (), 0)
        try:
            self._wait_until_cool(run, gate)
            if gate.timed_out:
                failure: Failure | None = self._too_hot(gate)
                if gate.reading is not None:
                    samples.append(_sample_json(0.0, "before", gate.reading))
            else:
                self.tell(
                    RunStarted(run, run_id, number, self.runs, self._eta_s(self.runs - number + 1))
                )
                outcome = self._run(run, run_id, gate, samples)
                failure = outcome.failure or self._missing_answers(run, outcome)
        except DeviceBusy:
            raise  # the lock is another benchmark's now
        except DeviceError as error:
            failure = _named(error)
        self._learn_versions(outcome.events)
        record: Record = {
            "schema_version": records.SCHEMA_VERSION,
            "record": "run",
            "bench_id": self.lock.bench_id,
            "run_id": run_id,
            "pass": run.pass_,
            "repeat": run.repeat,
            "started_at": started_at,
            "status": "ok" if failure is None else "failed",
            "failure": None if failure is None else _failure_json(failure),
            "conditions": self._conditions(run, gate),
            "gate": gate.to_json(),
            "sensors": samples,
            "result": outcome.result,
            "memory": [_flat(e) for e in outcome.events if e["event"] == "memory"],
            "steps": [e for e in outcome.events if e["event"] == "step"],
            "metrics": {},
        }
        if run.pass_ == "puzzles" and failure is None:
            record["puzzles"] = self._graded(outcome.result["answers"])
        # Imported here: the table of metrics brings libraries that a start need not wait for.
        from device_tests.results import metrics

        return record | {"metrics": metrics.compute(record)}

    def _missing_answers(self, run: PlannedRun, outcome: RunOutcome) -> Failure | None:
        """A failure if not every puzzle has its answer."""
        if run.pass_ != "puzzles":
            return None
        answers = outcome.result.get("answers") or ()
        if len(answers) == len(self.puzzles):
            return None
        return Failure(
            "internal",
            f"the runner gave {len(answers)} answers to {len(self.puzzles)} puzzles; use a runner "
            "and a host of one version",
            {"answers": len(answers)},
        )

    def _graded(self, answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The puzzles in their order, and whether each answer is right."""
        return [
            asdict(puzzle) | {"is_exact": is_exact(puzzle, answer["text"])}
            for puzzle, answer in zip(self.puzzles, answers, strict=True)
        ]

    def _wait_until_cool(self, run: PlannedRun, gate: _Gate) -> None:
        """Look at the hottest sensor until it is under the threshold, or the time is over."""
        began_s = time.monotonic()
        while True:
            self.lock.beat()
            answer = patiently(
                self.transport,
                lambda: run_checked(self.transport, sensors.COMMAND + conditions.CLOCKS_COMMAND),
                self.plan.gone_s,
                lambda error: self.tell(ConnectionLost(str(error))),
            )
            now = time.monotonic()
            gate.reading, gate.read_s = sensors.parse(answer.text), now
            gate.clocks = conditions.parse_clocks(answer.text)
            gate.waited_s = now - began_s
            hottest = gate.reading.hottest
            if hottest is None:
                return  # recorded: the gate has no sensor
            gate.sensor, gate.begin_c = hottest
            if gate.begin_c < gate.threshold_c:
                return
            if gate.waited_s >= self.plan.gate_timeout_s:
                gate.timed_out = True
                return
            self.tell(GateWaiting(run, gate.sensor, gate.begin_c, gate.threshold_c, gate.waited_s))
            time.sleep(min(self.plan.poll_s, self.plan.gate_timeout_s - gate.waited_s))

    def _run(
        self, run: PlannedRun, run_id: str, gate: _Gate, samples: list[dict[str, Any]]
    ) -> RunOutcome:
        """Start the run and see it to its end; sensors go into `samples`."""

        def told(event: remote_run.RunEvent) -> None:
            if isinstance(event, Interrupted):
                self.tell(ConnectionLost(event.sentence))
            elif not isinstance(event, Sample):
                self.tell(RunProgress(run, event))

        started_s = time.monotonic()
        try:
            going = remote_run.start(
                self.transport, self.runner, self._request(run, run_id), gone_s=self.plan.gone_s
            )
            started_s = time.monotonic()
            outcome = going.follow(
                told,
                poll_s=self.plan.poll_s,
                hang_s=self.plan.hang_s,
                each_poll=self.lock.beat_command,
            )
        except BaseException:
            self._kill(run_id)
            raise
        if gate.reading is not None:
            samples.append(_sample_json(gate.read_s - started_s, "before", gate.reading))
        samples += [_sample_json(s.t_s, "during", s.reading) for s in outcome.samples]
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
        """Read the sensors once more; what failed stays there for whoever wants to look."""
        if outcome.failure is not None and outcome.failure.reason == "device_gone":
            return
        answer = patiently(
            self.transport, lambda: run_checked(self.transport, sensors.COMMAND), self.plan.gone_s
        )
        after = sensors.parse(answer.text)
        samples.append(_sample_json(time.monotonic() - started_s, "after", after))
        if outcome.failure is None:
            patiently(self.transport, going.remove, self.plan.gone_s)

    def _request(self, run: PlannedRun, run_id: str) -> RunRequest:
        work = self.workloads[run.pass_]
        count, text = work["prompt_tokens"], work["prompt_text"]
        is_puzzles = run.pass_ == "puzzles"
        budget_bytes = work.get("memory_budget_bytes")
        return RunRequest(
            run_id=run_id,
            bundle=self.deployment.remote_folder,
            bundle_sha256=self.deployment.bundle_sha256,
            threads=run.threads,
            cold=run.pass_ == "cold",
            warmup_steps=work["warmup_steps"],
            prompt_text=text,
            prompt_tokens=None
            if count is None
            else random_prompt(self.bundle.manifest, count, self.plan.seed),
            prompts=tuple(puzzle.prompt for puzzle in self.puzzles) if is_puzzles else None,
            max_new_tokens=work["max_new_tokens"],
            seed=work["seed"],
            force_steps=work["force_steps"],
            settings=work["settings"],
            memory_interval_ms=work["memory_interval_ms"],
            memory_limit_bytes=work["memory_limit_bytes"],
            memory_budget_bytes=budget_bytes,
            packed_weights=None if budget_bytes is None else packed_folder(self.deployment),
        )

    def _kill(self, run_id: str) -> None:
        going = remote_run.RemoteRun(self.transport, run_id, gone_s=_INTERRUPT_S)
        try:
            going.kill()
        except DeviceError as error:
            _log.warning("the run %s could not be killed: %s", run_id, error)

    def _conditions(self, run: PlannedRun, gate: _Gate) -> dict[str, Any]:
        manifest = self.bundle.manifest
        limits = gate.clocks.limits_mhz
        return {
            "device": asdict(self.device),
            "clocks": {
                "governor": None if gate.clocks.governor is None else dict(gate.clocks.governor),
                "limits_mhz": None
                if limits is None
                else {name: list(pair) for name, pair in limits.items()},
            },
            "charging": None if gate.reading is None else gate.reading.charging,
            "transport": self.transport.kind,
            "poll_s": self.plan.poll_s,
            "threads": run.threads,
            "bundle": {
                "sha256": self.deployment.bundle_sha256,
                "name": manifest.model.name[:1000],
                "family": manifest.model.family,
                "style": manifest.style,
                "recipe": recipe_name(manifest),
                "backend": manifest.backend,
                "bytes": self.bundle.total_bytes,
            },
            "workload": self.workloads[run.pass_],
            "versions": {"pocket_diffusion": _own_version()} | self._runner_versions,
        }

    def _learn_versions(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Those of the runner; one that fails before it tells them is the one of the run before."""
        for event in events:
            if event["event"] == "started":
                self._runner_versions = {
                    sensors.clean(str(name)): sensors.clean(str(version))
                    for name, version in list(event["versions"].items())[:60]
                }

    def _too_hot(self, gate: _Gate) -> Failure:
        return Failure(
            "thermal_timeout",
            f"{gate.sensor} was still at {gate.begin_c:.1f} °C after {gate.waited_s:.0f} s, the "
            f"run begins under {gate.threshold_c:g} °C; cool the device or raise the threshold",
            {"temperature_c": gate.begin_c, "waited_s": round(gate.waited_s, 1)},
        )

    def _eta_s(self, left: int) -> float | None:
        return left * statistics.fmean(self._took_s) if self._took_s else None


def packed_folder(deployment: Deployment) -> str:
    """Where the packed weights of a deployed bundle lie: beside the folder of all bundles."""
    return f"{PurePosixPath(deployment.remote_folder).parents[1]}/{PACKED_FOLDER}"


def recipe_name(manifest: Manifest) -> str | None:
    """The name of the quantization recipe a bundle was made with, None if it says none."""
    recipe = manifest.recipe or {}
    inner = recipe.get("recipe")
    name = inner.get("name") if isinstance(inner, dict) else recipe.get("name")
    return name[:1000] if isinstance(name, str) else None


def _planned(plan: BenchPlan) -> Iterator[PlannedRun]:
    for threads in plan.threads:
        for name in PASSES:
            repeats = plan.passes.get(name, 0)
            for repeat in range(repeats):
                yield PlannedRun(threads, name, repeat, repeats)


_Key = tuple[int | None, str, int, str]


def _key(threads: int | None, name: Pass, repeat: int, workloads: Mapping[Pass, Any]) -> _Key:
    return threads, name, repeat, repr(sorted(workloads[name].items()))


def _done(
    earlier: Sequence[Record], device: conditions.Device, deployment: Deployment, plan: BenchPlan
) -> set[_Key]:
    """The runs that went well, on this device with this bundle, gated and polled alike."""
    return {
        (c["threads"], record["pass"], record["repeat"], repr(sorted(c["workload"].items())))
        for record in earlier
        if record["status"] == "ok"
        and record["gate"]["threshold_c"] == plan.max_temperature_c
        and record["conditions"]["poll_s"] == plan.poll_s
        and (c := record["conditions"])["bundle"]["sha256"] == deployment.bundle_sha256
        and _identity(c["device"]) == _identity(asdict(device))
    }


def _identity(device: Mapping[str, Any]) -> tuple[Any, ...]:
    """A device over its restarts; one on the network may have another port each time."""
    host, colon, port = device["serial"].rpartition(":")
    serial = host if colon and port.isdigit() else device["serial"]
    return serial, device["model"], device["soc"], device["abi"], device["memory_bytes"]


def _named(error: DeviceError) -> Failure:
    """The failure of a run that could not be begun, or not be finished with."""
    reason: Reason = "internal"
    if isinstance(error, DeviceGone | CommandTimeout | ProtocolError):
        reason = "device_gone"
    elif isinstance(error, StorageFull):
        reason = "storage_full"
    elif isinstance(error, RunnerProtocolError):
        reason = "input"
    return Failure(reason, str(error), {"error": type(error).__name__})


def _failure_json(failure: Failure) -> dict[str, Any]:
    return {
        "reason": failure.reason,
        "sentence": failure.sentence[:4000],
        "evidence": dict(failure.evidence),
    }


def _sample_json(t_s: float, phase: str, reading: sensors.Reading) -> dict[str, Any]:
    return {
        "t_s": round(t_s, 3),
        "phase": phase,
        "temperature_c": dict(reading.temperature_c),
        "cpu_mhz": dict(reading.cpu_mhz),
        "battery": None if reading.battery is None else asdict(reading.battery),
        "load_1m": reading.load_1m,
    }


def _flat(event: Mapping[str, Any]) -> dict[str, Any]:
    """A memory event as records hold it: numbers and words only."""
    return {k: v for k, v in event.items() if v is None or type(v) in (int, float, str)}


def _own_version() -> str:
    try:
        return importlib.metadata.version("pocket-diffusion")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _whole(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise InputError(f"{name} is {value!r}; give a whole number from {least} to {most}")


def _real(name: str, value: object, least: float, most: float) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or not least <= value <= most:
        raise InputError(f"{name} is {value!r}; give a number from {least:g} to {most:g}")
