"""The runner protocol: the request a run begins with, its events, the result it leaves.

Both sides use it, the runner on a device and the host, so it imports no torch. How a run is started
and followed is not known here. In words: `docs/runner.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from export.contract.scalars import (
    AbsolutePath,
    Count,
    Label,
    Ms,
    Number,
    Positive,
    Prompt,
    RunId,
    Seed,
    Sentence,
    Sha256,
    Share,
    Text,
    Tokens,
    Versions,
    check_seed,
)
from export.contract.validation import Format
from quantize.errors import DeviceError

REQUEST_FILE = "request.json"
EVENTS_FILE = "events.jsonl"
RESULT_FILE = "result.json"

MAXIMUM_REQUEST_BYTES = 16 * 2**20
MAXIMUM_LINE_BYTES = 2**20
"""Of one event, its line end included."""
MAXIMUM_RESULT_BYTES = 64 * 2**20

EXIT_OK = 0
EXIT_FAILED = 3
"""The run failed and said why; every other exit code is a crash."""

FailureReason = Literal[
    "bundle_refused", "out_of_memory", "input", "storage_full", "cancelled", "internal"
]
Host = Literal["python", "cpp", "kotlin"]


class RunnerProtocolError(DeviceError):
    """A request, event or result that breaks the runner protocol."""


FORMAT = Format(
    "runner protocol",
    "protocol",
    RunnerProtocolError,
    "use a runner and a host of one version",
)


# --- the request ---------------------------------------------------------------------------------


class RunRequest(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="protocol", tag=1
):
    """What one run is to do. Fields as in docs/runner.md."""

    run_id: RunId
    bundle: AbsolutePath
    """Folder on the device."""
    prompts: Annotated[tuple[Prompt, ...], Meta(min_length=1, max_length=2**16)]
    """Answered one after the other, each as if it were alone, number n with `seed` + n."""
    max_new_tokens: Positive
    bundle_sha256: Sha256 | None = None
    verify: bool = False
    threads: Positive | None = None
    cold: bool = False
    warmup_steps: Annotated[int, Meta(ge=0, le=2**20)] = 2
    seed: Seed = 0
    force_steps: Positive | None = None
    settings: Annotated[dict[str, Number], Meta(max_length=64)] | None = None
    memory_interval_ms: Annotated[int, Meta(ge=1, le=3_600_000)] | None = None
    memory_limit_bytes: Annotated[int, Meta(ge=1, le=2**63 - 1)] | None = None
    memory_budget_bytes: Annotated[int, Meta(ge=1, le=2**63 - 1)] | None = None
    packed_weights: AbsolutePath | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def to_bytes(self) -> bytes:
        """The content of request.json. Raises RunnerProtocolError if a reader would refuse it."""
        content = FORMAT.dump(self, "the request", MAXIMUM_REQUEST_BYTES, "shorten the prompt")
        parse_request(content, "the request")
        return content + b"\n"


def read_request(path: Path) -> RunRequest:
    """Read and check request.json.

    Raises RunnerProtocolError for a file that cannot be read, breaks the protocol, or is newer.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAXIMUM_REQUEST_BYTES + 1)
    except OSError as error:
        raise RunnerProtocolError(
            f"{path} cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    return parse_request(content, str(path))


def parse_request(content: bytes, where: str = REQUEST_FILE) -> RunRequest:
    """Check the content of request.json. Raises RunnerProtocolError."""
    document = FORMAT.load(content, where, MAXIMUM_REQUEST_BYTES)
    FORMAT.check_version(document, where, "runner")
    return FORMAT.check(document, RunRequest, where)


def run_id_of(content: bytes) -> str | None:
    """The run id of a request that may be broken otherwise; None if it has no valid one."""
    try:
        run_id = FORMAT.load(content, REQUEST_FILE, MAXIMUM_REQUEST_BYTES).get("run_id")
        return msgspec.convert(run_id, RunId)
    except (RunnerProtocolError, msgspec.ValidationError):
        return None


# --- what events and the result share ------------------------------------------------------------
# They may gain fields within a version, so fields that are not known pass.


class Runtime(Struct):
    """The program that ran the bundle: in which language, and its version."""

    host: Host
    version: Label


class Cold(Struct):
    """How cold a load was; `method` None: the files were not dropped from the page cache."""

    requested: bool
    method: Label | None
    resident_before: Share | None
    resident_after: Share | None


class DelegationCounts(Struct):
    """Delegates of a stage, operators inside and outside of them, as counted at export."""

    delegates: Count
    delegated: Count
    portable: Count


StageCounts = Annotated[dict[Label, DelegationCounts], Meta(max_length=4096)]


class MemorySample(Struct):
    """Sizes of the runner's process, faults since it began; None: the system does not say."""

    rss_bytes: Count | None
    pss_bytes: Count | None
    anonymous_bytes: Count | None
    file_bytes: Count | None
    swap_bytes: Count | None
    major_faults: Count | None
    minor_faults: Count | None


class Failure(Struct):
    """Why a run failed."""

    reason: FailureReason
    sentence: Sentence


# --- events --------------------------------------------------------------------------------------


class AnyEvent(Struct):
    """What every event has, known or not."""

    event: Annotated[str, Meta(pattern="^[a-z][a-z0-9_]{0,63}$(?!\n)")]
    t_ms: Ms


class Event(Struct, tag_field="event"):
    """Base of the events; `t_ms` since the process began."""

    t_ms: Ms


class Started(Event, tag="started"):
    """The first event, before any large library is loaded."""

    protocol: Literal[1]
    run_id: RunId | None
    runtime: Runtime
    pid: Positive
    versions: Versions


class Loaded(Event, tag="loaded"):
    """The bundle's programs could run."""

    import_ms: Ms
    verify_ms: Ms
    tokenizer_ms: Ms | None
    load_ms: Ms
    threads: Positive
    cold: Cold
    delegation: StageCounts
    rss_bytes: Count | None


class WarmedUp(Event, tag="warmed_up"):
    """The warm-up is over."""

    ms: Ms
    steps: Count


class Prefill(Event, tag="prefill"):
    """A chunk of known tokens was encoded."""

    done: Count
    total: Count
    ms: Ms


class Step(Event, tag="step"):
    """A denoising step, or a token."""

    canvas: Count
    step: Positive
    max_steps: Positive
    layers_ms: Ms
    head_ms: Ms
    accepted: Count
    mean_entropy: Number | None
    finished: bool


class CanvasDone(Event, tag="canvas"):
    """A canvas was committed."""

    canvas: Count
    steps: Positive
    new_tokens: Count
    is_last: bool


class TextSoFar(Event, tag="text"):
    """The whole answer so far."""

    text: Text


class Answered(Event, tag="answer"):
    """So many of the request's prompts are answered."""

    done: Positive
    total: Positive
    total_ms: Ms


class Memory(MemorySample, tag_field="event", tag="memory"):
    """A memory sample."""

    t_ms: Ms


class Temperature(Event, tag="temperature"):
    """Degrees Celsius by thermal zone."""

    zones: Annotated[dict[Label, Number], Meta(max_length=512)]


class Done(Event, tag="done"):
    """The run is `ok`."""


class Failed(Failure, tag_field="event", tag="failed"):
    """The run failed."""

    t_ms: Ms


_EVENTS: tuple[type[Struct], ...] = (*Event.__subclasses__(), Memory, Failed)
EVENT_TYPES = {str(type_.__struct_config__.tag): type_ for type_ in _EVENTS}
"""The events of this version by name; a reader passes over others."""

EVENTS = frozenset(EVENT_TYPES)


def parse_event(line: bytes) -> dict[str, Any]:
    """One line of events.jsonl, with or without its line end.

    An event that is not known (`event` not in EVENTS) is returned with no more than `event` and
    `t_ms` checked. Raises RunnerProtocolError for anything malformed and for another version.
    """
    document = FORMAT.load(line, "an event", MAXIMUM_LINE_BYTES)
    kind = document.get("event")
    if not isinstance(kind, str) or kind not in EVENT_TYPES:
        FORMAT.check(document, AnyEvent, "an event")
        return document
    if kind == "started":
        FORMAT.check_version(document, "the event 'started'", "host")
    FORMAT.check(document, EVENT_TYPES[kind], f"the event {kind!r}")
    return document


def event_line(event: str, t_ms: float, fields: Mapping[str, Any]) -> bytes:
    """One line of events.jsonl, line end included; numbers that are not finite become null.

    Raises RunnerProtocolError for a line over the limit.
    """
    document = {"event": event, "t_ms": round(t_ms, 3), **fields}
    return FORMAT.dump(document, f"the event {event!r}", MAXIMUM_LINE_BYTES, "say less") + b"\n"


# --- the result ----------------------------------------------------------------------------------


class StepResult(Struct):
    """A denoising step; `mean_entropy` in nats over the canvas."""

    layers_ms: Ms
    head_ms: Ms
    accepted: Count
    mean_entropy: Number | None


class Canvas(Struct):
    """A committed canvas."""

    canvas: Count
    tokens: Tokens
    converged: bool
    steps: Annotated[tuple[StepResult, ...], Meta(max_length=2**20)]


class PartialAnswer(Struct):
    """The answer to one prompt, as far as a cancelled run got; None: not reached."""

    prompt_tokens: Count
    prompt_ms: Ms
    encode_ms: Ms
    encodings: Count
    total_ms: Ms
    first_draft_ms: Ms | None
    first_commit_ms: Ms | None
    finish_reason: Literal["eos", "length", "cancelled"]
    canvases: Annotated[tuple[Canvas, ...], Meta(max_length=2**20)]
    answer_tokens: Tokens
    new_tokens: Count
    text: Text | None


class Answer(PartialAnswer):
    """The answer to one prompt."""

    first_draft_ms: Ms
    first_commit_ms: Ms
    finish_reason: Literal["eos", "length"]
    canvases: Annotated[tuple[Canvas, ...], Meta(min_length=1, max_length=2**20)]


class StageWeights(Struct):
    """A stage's packed weights, and what of them stayed in memory."""

    name: Label
    bytes: Count
    kept_bytes: Count


class Weights(Struct):
    """What of the packed weights was kept within a memory budget, and what was read."""

    budget_bytes: Count
    read_ahead: bool
    weights_bytes: Count
    kept_bytes: Count
    window_bytes: Count
    pass_bytes: Count
    streamed_stages: Count
    streamed_bytes: Count
    streamed_stall_ms: Ms
    storage_bytes: Count | None
    stages: Annotated[tuple[StageWeights, ...], Meta(max_length=4096)]


class MemoryResult(Struct):
    """The largest resident set, samples after loading and at the end, faults of the process."""

    peak_rss_bytes: Count | None
    after_load: MemorySample | None
    at_end: MemorySample | None
    major_faults: Count | None


class Result(Struct, tag_field="status"):
    """Base of both results; None for what a failed run did not reach."""

    protocol: Literal[1]
    run_id: RunId | None
    failure: Failure | None
    runtime: Runtime
    versions: Versions
    import_ms: Ms | None
    verify_ms: Ms | None
    tokenizer_ms: Ms | None
    load_ms: Ms | None
    cold: Cold | None
    threads: Positive | None
    delegation: StageCounts | None
    warmup_ms: Ms | None
    pack_ms: Ms | None
    weights: Weights | None
    memory: MemoryResult


class FailedResult(Result, tag="failed"):
    """The result of a run that failed, with the answers that it had by then."""

    failure: Failure
    answers: Annotated[tuple[PartialAnswer, ...], Meta(max_length=2**16)]


class OkResult(Result, tag="ok"):
    """The result of a run that went well: one answer for each prompt."""

    run_id: RunId
    failure: None
    import_ms: Ms
    verify_ms: Ms
    load_ms: Ms
    cold: Cold
    threads: Positive
    delegation: StageCounts
    answers: Annotated[tuple[Answer, ...], Meta(min_length=1, max_length=2**16)]


def parse_result(content: bytes) -> dict[str, Any]:
    """The content of result.json. Raises RunnerProtocolError for anything malformed or newer."""
    document = FORMAT.load(content, RESULT_FILE, MAXIMUM_RESULT_BYTES)
    FORMAT.check_version(document, RESULT_FILE, "host")
    FORMAT.check(document, OkResult | FailedResult, RESULT_FILE)
    return document


def result_bytes(result: Mapping[str, Any]) -> bytes:
    """The content of result.json; numbers that are not finite become null.

    Raises RunnerProtocolError for a result over the limit.
    """
    return FORMAT.dump(result, "the result", MAXIMUM_RESULT_BYTES, "ask for fewer tokens") + b"\n"
