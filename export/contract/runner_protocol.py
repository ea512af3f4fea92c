"""The runner protocol: the request a run begins with, the events it tells, the result it leaves.

Both sides use it, the runner on a device and the host, so it imports no torch. How a run is started
and followed is not known here. The format is `runner_protocol.schema.json`, in words
`docs/runner.md`.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from quantize.errors import DeviceError

PROTOCOL = 3
"""The newest version spoken here: 2 has requests of several prompts, 3 a memory budget."""

PROTOCOLS = (1, 2, 3)
"""Every version spoken here: a request has the oldest that can say it, what it leaves the same."""

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

EVENTS = frozenset(
    {
        "started",
        "loaded",
        "warmed_up",
        "prefill",
        "step",
        "canvas",
        "text",
        "answer",
        "memory",
        "temperature",
        "done",
        "failed",
    }
)
"""The events of this version; a reader passes over others."""

FailureReason = Literal[
    "bundle_refused", "out_of_memory", "input", "storage_full", "cancelled", "internal"
]

_OF_VERSION_3 = ("memory_budget_bytes", "packed_weights")

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_MAXIMUM_QUOTE = 200


class RunnerProtocolError(DeviceError):
    """A request, event or result that breaks the runner protocol."""


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What one run is to do; one of `prompt_text`, `prompt_tokens` and `prompts` is given.

    prompts: texts that are answered one after the other, each as if it were alone. `bundle` is an
    absolute folder on the device. Fields as in docs/runner.md.
    """

    run_id: str
    bundle: str
    max_new_tokens: int
    prompt_text: str | None = None
    prompt_tokens: tuple[int, ...] | None = None
    prompts: tuple[str, ...] | None = None
    bundle_sha256: str | None = None
    verify: bool = False
    threads: int | None = None
    cold: bool = False
    warmup_steps: int = 2
    seed: int = 0
    force_steps: int | None = None
    settings: Mapping[str, float] | None = None
    memory_interval_ms: int | None = None
    memory_limit_bytes: int | None = None
    memory_budget_bytes: int | None = None
    packed_weights: str | None = None

    @property
    def protocol(self) -> int:
        """The oldest version that can say this."""
        if any(getattr(self, name) is not None for name in _OF_VERSION_3):
            return 3
        return 1 if self.prompts is None else 2

    def to_json(self) -> dict[str, Any]:
        """The request as it stands in request.json. Raises RunnerProtocolError if not valid."""
        document: dict[str, Any] = {"protocol": self.protocol} | asdict(self)
        text, tokens = document.pop("prompt_text"), document.pop("prompt_tokens")
        prompts = document.pop("prompts")
        given = sum(prompt is not None for prompt in (text, tokens, prompts))
        if given != 1:
            raise RunnerProtocolError(
                "a request needs a prompt as text or as tokens, or several texts, one of these; "
                f"{('none was', '', 'two were', 'all were')[given]} given"
            )
        if prompts is not None:
            document["prompts"] = list(prompts)
        else:
            document["prompt"] = {"text": text} if tokens is None else {"tokens": list(tokens)}
        if self.settings is not None:
            document["settings"] = dict(self.settings)
        if self.protocol < 3:
            for name in _OF_VERSION_3:
                del document[name]
        _check("request", document, "the request")
        return document

    def to_bytes(self) -> bytes:
        """The content of request.json. Raises RunnerProtocolError if it is not valid."""
        content = _dump(self.to_json(), "the request") + b"\n"
        if len(content) > MAXIMUM_REQUEST_BYTES:
            raise RunnerProtocolError(
                f"the request has {len(content)} bytes, at most {MAXIMUM_REQUEST_BYTES} are read; "
                "shorten the prompt"
            )
        return content

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RunRequest:
        """A request from a document that the schema accepts."""
        fields = dict(document)
        del fields["protocol"]
        prompt, prompts = fields.pop("prompt", {}), fields.pop("prompts", None)
        tokens = prompt.get("tokens")
        return cls(
            prompt_text=prompt.get("text"),
            prompt_tokens=None if tokens is None else tuple(int(token) for token in tokens),
            prompts=None if prompts is None else tuple(prompts),
            **fields,
        )


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
    document = _load(content, MAXIMUM_REQUEST_BYTES, where)
    _check_version(document, where, "runner")
    _check("request", document, where)
    return RunRequest.from_json(document)


def run_id_of(content: bytes) -> str | None:
    """The run id of a request that may be broken otherwise; None if it has no valid one."""
    try:
        run_id = _load(content, MAXIMUM_REQUEST_BYTES, REQUEST_FILE).get("run_id")
    except RunnerProtocolError:
        return None
    return run_id if _validator("run_id").is_valid(run_id) else None


def parse_event(line: bytes) -> dict[str, Any]:
    """One line of events.jsonl, with or without its line end.

    An event that this version does not know (`event` not in EVENTS) is given back with no more
    than `event` and `t_ms` checked. Raises RunnerProtocolError for anything malformed and for a
    newer protocol.
    """
    document = _load(line, MAXIMUM_LINE_BYTES, "an event")
    kind = document.get("event")
    if not isinstance(kind, str) or kind not in EVENTS:
        _check("event", document, "an event")
        return document
    if kind == "started":
        _check_version(document, "the event 'started'", "host")
    _check(f"event.{kind}", document, f"the event {kind!r}")
    return document


def parse_result(content: bytes) -> dict[str, Any]:
    """The content of result.json. Raises RunnerProtocolError for anything malformed or newer."""
    document = _load(content, MAXIMUM_RESULT_BYTES, RESULT_FILE)
    _check_version(document, RESULT_FILE, "host")
    _check("result", document, RESULT_FILE)
    return document


def event_line(event: str, t_ms: float, fields: Mapping[str, Any]) -> bytes:
    """One line of events.jsonl, line end included; numbers that are not finite become null.

    Raises RunnerProtocolError for a line over the limit.
    """
    document = {"event": event, "t_ms": round(t_ms, 3)} | _finite(fields)
    line = _dump(document, f"the event {event!r}")
    if len(line) >= MAXIMUM_LINE_BYTES:
        raise RunnerProtocolError(
            f"the event {event!r} has {len(line)} bytes, at most {MAXIMUM_LINE_BYTES} are read"
        )
    return line + b"\n"


def result_bytes(result: Mapping[str, Any]) -> bytes:
    """The content of result.json; numbers that are not finite become null.

    Raises RunnerProtocolError for a result over the limit.
    """
    content = _dump(_finite(result), "the result") + b"\n"
    if len(content) > MAXIMUM_RESULT_BYTES:
        raise RunnerProtocolError(
            f"the result has {len(content)} bytes, at most {MAXIMUM_RESULT_BYTES} are read; "
            "ask for fewer tokens"
        )
    return content


def sentence(text: str) -> str:
    """Text as a failure's sentence may be: one line, no control characters, at most 2,000 long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line[:2000] or "no reason was given"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _dump(document: Mapping[str, Any], where: str) -> bytes:
    try:
        text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8")
    except ValueError as error:  # a number that is not finite, half of a surrogate pair
        raise RunnerProtocolError(
            f"{where} holds what JSON cannot carry ({sentence(str(error))[:_MAXIMUM_QUOTE]}); "
            "leave it out"
        ) from error


def _load(content: bytes, maximum_bytes: int, where: str) -> dict[str, Any]:
    if len(content) > maximum_bytes:
        raise RunnerProtocolError(
            f"{where} has {len(content)} bytes or more, at most {maximum_bytes} are read"
        )
    try:
        document = json.loads(
            content.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_parse_float
        )
        if _SURROGATE.search(content):  # whoever writes this into a file would fail
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        reason = sentence(str(error))[:_MAXIMUM_QUOTE]
        raise RunnerProtocolError(f"{where} is not valid JSON ({reason}); run again") from error
    if not isinstance(document, dict):
        raise RunnerProtocolError(
            f"{where} holds a JSON {type(document).__name__}, expected an object"
        )
    return document


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number in JSON")


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _check_version(document: Mapping[str, Any], where: str, reader: str) -> None:
    version = document.get("protocol")
    if type(version) is not int:
        raise RunnerProtocolError(
            f"{where} has the protocol {sentence(repr(version))[:_MAXIMUM_QUOTE]}, expected the "
            f"integer {PROTOCOL}"
        )
    if version > PROTOCOL:
        raise RunnerProtocolError(
            f"{where} has the protocol version {version}, this {reader} speaks {PROTOCOL}; "
            f"update the {reader}"
        )
    if version not in PROTOCOLS:
        raise RunnerProtocolError(
            f"{where} has the protocol version {version}, this {reader} speaks {PROTOCOL}; "
            f"update the {'host' if reader == 'runner' else 'runner'}"
        )


@functools.cache
def _definitions() -> dict[str, Any]:
    schema = Path(__file__).with_name("runner_protocol.schema.json").read_text(encoding="utf-8")
    return json.loads(schema)["$defs"]


@functools.cache
def _validator(definition: str) -> Any:
    # Imported here: a tenth of a second that `--help` need not pay.
    from jsonschema import Draft202012Validator

    return Draft202012Validator(_inlined({"$ref": f"#/$defs/{definition}"}))


def _inlined(schema: Any) -> Any:
    """The schema without references, which take most of the time of checking an event."""
    if isinstance(schema, list):
        return [_inlined(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    rest = {key: _inlined(part) for key, part in schema.items() if key != "$ref"}
    if "$ref" not in schema:
        return rest
    referred = _inlined(_definitions()[schema["$ref"].removeprefix("#/$defs/")])
    rest.pop("description", None)
    return {"allOf": [referred], **rest} if rest else referred


def _check(definition: str, document: Mapping[str, Any], where: str) -> None:
    from jsonschema.exceptions import best_match

    try:
        error = best_match(_validator(definition).iter_errors(document))
    except RecursionError as deep:
        raise RunnerProtocolError(f"{where} is nested too deeply") from deep
    if error is not None:
        place = ".".join(str(part) for part in error.absolute_path) or "the top level"
        # The schema's own sentence quotes the offending value, which may be long or hostile.
        raise RunnerProtocolError(
            f"{where} breaks the runner protocol at {sentence(place)[:_MAXIMUM_QUOTE]} "
            f"({sentence(error.message)[:_MAXIMUM_QUOTE]}); use a runner and a host of one version"
        )
