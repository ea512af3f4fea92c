"""What a record says, as types; their JSON Schema is `record.schema.json`.

`python -m device_tests.results.record_format` writes the schema.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from msgspec import UNSET, Meta, Struct, UnsetType, field

from export.contract.scalars import Sha256
from export.contract.schemas import schema_text
from export.contract.validation import Format
from quantize.errors import UserError

SCHEMA_FILE = Path(__file__).with_name("record.schema.json")

Pass = Literal["cold", "warm_up", "speed", "natural", "memory", "puzzles"]
"""Why a run was made: load from storage, first run, forced steps, free steps, memory sampling,
answers that are graded."""

PASSES: tuple[Pass, ...] = get_args(Pass)

Reason = Literal[
    "out_of_memory",
    "crash_signal",
    "hang",
    "device_gone",
    "device_restarted",
    "storage_full",
    "thermal_timeout",
    "bundle_refused",
    "runner_missing",
    "input",
    "internal",
]
"""Every way in which a run can fail."""

REASONS: tuple[Reason, ...] = get_args(Reason)

Id = Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$(?!\n)")]
Text = Annotated[str, Meta(max_length=1000)]
Count = Annotated[int, Meta(ge=0)]
ByZone = Annotated[dict[str, float], Meta(max_length=1024)]


class RecordError(UserError):
    """A results file that cannot be read, or a record that breaks the format."""


FORMAT = Format(
    "format of records", "schema_version", RecordError, "give a results file of this version"
)


class _Part(Struct, forbid_unknown_fields=True):
    """Base of everything in a record."""


class Failure(_Part):
    """Why a run failed; `evidence` is what the reason was concluded from."""

    reason: Reason
    sentence: Annotated[str, Meta(min_length=1, max_length=4000)]
    evidence: dict[str, Any]


class Device(_Part):
    """The device that was measured."""

    serial: Text
    manufacturer: Text | None
    model: Text | None
    soc: Text | None
    build: Text | None
    kernel: Text | None
    abi: Text | None
    cores: Count | None
    memory_bytes: Count | None
    android_sdk: Count | None


class Clocks(_Part):
    """The clock regime before the run, lowest and highest clock allowed; None: not known."""

    governor: Annotated[dict[Text, Text], Meta(max_length=1024)] | None
    limits_mhz: Annotated[dict[Text, tuple[float, float]], Meta(max_length=1024)] | None


class BundleConditions(_Part):
    """Which bundle was run."""

    sha256: Sha256
    name: Text
    family: Text
    style: Text
    recipe: Text | None
    backend: Text
    bytes: Count


class Workload(_Part):
    """What was asked: `prompt_tokens` is the length of a random prompt, `prompt_text` a real one.

    memory_budget_bytes, puzzles (of each kind): only where there are some.
    """

    prompt_tokens: Count | None
    prompt_text: str | None
    max_new_tokens: Count
    seed: Count
    force_steps: Count | None
    settings: dict[str, float] | None
    warmup_steps: Count
    memory_interval_ms: Count | None
    memory_limit_bytes: Count | None
    memory_budget_bytes: Count | UnsetType = UNSET
    puzzles: Count | UnsetType = UNSET


class Conditions(_Part):
    """Everything that must agree between runs that are compared.

    threads: None: the runtime's choice. versions: of both sides, `runtime_host` (its language) and
    `runtime` among them.
    """

    device: Device
    clocks: Clocks
    charging: bool | None
    transport: Literal["server", "tcp", "usb"]
    poll_s: Annotated[float, Meta(gt=0)]
    threads: Count | None
    bundle: BundleConditions
    workload: Workload
    versions: Annotated[dict[Text, Text], Meta(max_length=64)]


class Gate(_Part):
    """The wait for a cool device before the run; sensor None: the device has none.

    begin_c: the temperature at which the run began, or the wait was given up.
    """

    threshold_c: float
    sensor: Text | None
    begin_c: float | None
    waited_s: Annotated[float, Meta(ge=0)]
    timed_out: bool


class Battery(_Part):
    """As the device says it: most count a discharge as a negative current."""

    level_percent: float | None
    current_ma: float | None
    temperature_c: float | None
    status: Text | None


class Sensors(_Part):
    """One look at the sensors, `t_s` seconds after the run was started (negative before).

    load_1m: load average of the last minute; None during a run.
    """

    t_s: float
    phase: Literal["before", "during", "after"]
    temperature_c: ByZone
    cpu_mhz: ByZone
    battery: Battery | None
    load_1m: float | None = None


class RunnerEvent(Struct):
    """An event of the runner, as the runner protocol describes it."""

    t_ms: float


class GradedPuzzle(_Part):
    """A puzzle, its right answer, and whether the answer in `result.answers` is it."""

    kind: Text
    prompt: Text
    answer: Text
    is_exact: bool


class _Run(_Part, kw_only=True, tag_field="status"):
    """Base of both records of a run: one line of a results file.

    repeat: counts up from 0 within a pass. started_at: UTC, ISO 8601; the gate begins here, the run
    after it. result: the runner's result file. puzzles: only of a run of that pass that went well.
    metrics: named and defined in docs/metrics.md.
    """

    schema_version: Literal[1]
    record: Literal["run"]
    bench_id: Id
    run_id: Id
    pass_: Pass = field(name="pass")
    repeat: Count
    started_at: Annotated[
        str,
        Meta(
            pattern="^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\\.[0-9]+)?(Z|\\+00:00)"
            "$(?!\n)"
        ),
    ]
    conditions: Conditions
    gate: Gate
    sensors: tuple[Sensors, ...]
    memory: tuple[RunnerEvent, ...]
    steps: tuple[RunnerEvent, ...]
    puzzles: tuple[GradedPuzzle, ...] | UnsetType = UNSET
    metrics: dict[str, float | None]


class OkRun(_Run, kw_only=True, tag="ok"):
    """A run that went well."""

    failure: None
    result: dict[str, Any]


class FailedRun(_Run, kw_only=True, tag="failed"):
    """A run that failed; its result only where there was one."""

    failure: Failure
    result: dict[str, Any] | None


def schema() -> str:
    """The content of `record.schema.json`."""
    return schema_text("One line of a results file: one run on a device", OkRun | FailedRun)


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema(), encoding="utf-8")
