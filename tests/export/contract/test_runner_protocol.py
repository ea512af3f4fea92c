"""The runner protocol's reader: whatever a device sends is an event, a result, or one sentence.

CPU only, no model, no torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from msgspec import to_builtins
from msgspec.structs import replace

from export.contract import runner_protocol
from export.contract.runner_protocol import (
    EVENTS,
    MAXIMUM_LINE_BYTES,
    MAXIMUM_REQUEST_BYTES,
    MAXIMUM_RESULT_BYTES,
    RunnerProtocolError,
    RunRequest,
    event_line,
    parse_event,
    parse_request,
    parse_result,
    read_request,
    result_bytes,
    run_id_of,
)
from export.contract.schemas import schemas
from export.contract.validation import sentence
from tests.support.protocol_examples import (
    ANSWER,
    EXAMPLES,
    RESULT,
)

DOCUMENT = Path(__file__).parents[3] / "docs" / "runner.md"

REQUEST = RunRequest(run_id="r-1", bundle="/b", max_new_tokens=5, prompts=("hä?",))


def line(kind: str, **changes: Any) -> bytes:
    return event_line(kind, 1.0, EXAMPLES[kind] | changes)


def encoded(document: Any) -> bytes:
    return json.dumps(document).encode()


def test_the_events_are_those_of_the_examples() -> None:
    assert set(EXAMPLES) == EVENTS


def test_the_document_names_every_event_field_and_reason() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    types = [
        *runner_protocol.EVENT_TYPES.values(), RunRequest, runner_protocol.OkResult,
        runner_protocol.Answer, runner_protocol.Canvas, runner_protocol.MemoryResult,
        runner_protocol.Runtime, runner_protocol.Cold, runner_protocol.DelegationCounts,
        runner_protocol.Weights,
    ]  # fmt: skip
    names = EVENTS | set(get_args(runner_protocol.FailureReason)) | {"protocol", "status"}
    names |= {name for type_ in types for name in type_.__struct_fields__}
    assert not {name for name in names if f"`{name}`" not in text}


def test_the_examples_of_the_document_are_valid() -> None:
    """The JSON in docs/runner.md: requests, lines of events, results."""
    text = DOCUMENT.read_text(encoding="utf-8")
    blocks = [block.partition("\n") for block in text.split("```")[1::2]]
    documents = [
        part
        for name, _, body in blocks
        if name in ("json", "jsonl")
        for part in (body.splitlines() if name == "jsonl" else [body])
    ]
    kinds = set()
    for document in documents:
        content = document.encode()
        if '"event"' in document:
            kinds.add(parse_event(content)["event"])
        elif '"status"' in document:
            kinds.add(parse_result(content)["status"])
        else:
            kinds.add(parse_request(content).run_id)
    assert kinds >= EVENTS and {"ok", "failed"} <= kinds


def test_the_schema_takes_the_examples_and_refuses_what_is_broken() -> None:
    """As a reader in another language has it, by a validator of JSON Schema."""
    schema = json.loads(schemas()["runner_protocol.schema.json"])
    Draft202012Validator.check_schema(schema)
    assert Draft202012Validator(schema).is_valid(RESULT)
    assert not Draft202012Validator(schema).is_valid(RESULT | {"run_id": None})
    of_definition = {
        "RunRequest": to_builtins(REQUEST),
        **{
            runner_protocol.EVENT_TYPES[kind].__name__: {"event": kind, "t_ms": 1.0} | fields
            for kind, fields in EXAMPLES.items()
        },
    }
    for name, document in of_definition.items():
        validator = Draft202012Validator(schema | {"anyOf": [{"$ref": f"#/$defs/{name}"}]})
        document = json.loads(json.dumps(document))
        assert validator.is_valid(document), name
        for field in document:
            without = {key: value for key, value in document.items() if key != field}
            is_optional = name == "RunRequest" and field in RunRequest.__struct_fields__[4:]
            assert validator.is_valid(without) == is_optional, (name, field)


def test_importing_it_needs_no_torch() -> None:
    code = "import sys, export.contract.runner_protocol; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.strip() == b"False"


@pytest.mark.parametrize(
    "request_",
    [
        REQUEST,
        RunRequest(run_id="r", bundle="/b", max_new_tokens=1, prompts=((0, 2**31 - 1),)),
        RunRequest(
            run_id="A.b_c-9", bundle="/b c/'", bundle_sha256="0f" * 32, verify=True, threads=3,
            cold=True, warmup_steps=0, prompts=("\U0001f600",), max_new_tokens=7,
            seed=2**64 - 1, force_steps=8, settings={"t_min": 0.25}, memory_interval_ms=50,
            memory_limit_bytes=2**33,
        ),
        RunRequest(run_id="r-1", bundle="/b", max_new_tokens=5, prompts=("hä?", (3, 4), "a"),
                   memory_budget_bytes=2**31, packed_weights="/data/packed"),
    ],
)  # fmt: skip
def test_a_request_survives_the_way(request_: RunRequest, tmp_path: Path) -> None:
    (tmp_path / "request.json").write_bytes(request_.to_bytes())
    assert read_request(tmp_path / "request.json") == request_


def test_answers_are_checked() -> None:
    several = RESULT | {"answers": [ANSWER, ANSWER]}
    assert parse_result(encoded(several))["answers"] == [ANSWER, ANSWER]
    for changes in ({"answers": None}, {"answers": []}):
        with pytest.raises(RunnerProtocolError, match="answers"):
            parse_result(encoded(several | changes))
    for name in ANSWER:
        with pytest.raises(RunnerProtocolError, match=r"answers\.0"):
            parse_result(encoded(several | {"answers": [ANSWER | {name: [None]}]}))


def test_what_a_request_leaves_out_has_a_default() -> None:
    content = encoded(
        {
            "protocol": 1, "run_id": "r-1", "bundle": "/b", "max_new_tokens": 5,
            "prompts": ["hä?"],
        }
    )  # fmt: skip
    assert parse_request(content) == REQUEST


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": ""}, {"run_id": "a/b"}, {"run_id": ".."}, {"run_id": "a\n"},
        {"run_id": "a" * 129}, {"bundle": "b"}, {"bundle": "/b\0"}, {"max_new_tokens": 0},
        {"max_new_tokens": 1.5}, {"max_new_tokens": True}, {"prompts": ("",)},
        {"prompts": None}, {"prompts": ()}, {"prompts": "text"}, {"prompts": ("a", ())},
        {"prompts": ((-1,),)}, {"prompts": ((True,),)},
        {"seed": -1}, {"seed": 2**64}, {"threads": 0}, {"force_steps": 0}, {"warmup_steps": -1},
        {"settings": {"t_min": "1"}}, {"settings": {"t_min": float("nan")}},
        {"memory_interval_ms": 0}, {"memory_limit_bytes": 0}, {"memory_budget_bytes": 0},
        {"packed_weights": "relative"}, {"packed_weights": "/a\0"}, {"bundle_sha256": "0F" * 32},
        {"prompts": ("\ud800",)}, {"prompts": ("a" * (MAXIMUM_REQUEST_BYTES - 9),)},
    ],
)  # fmt: skip
def test_a_request_with_a_wrong_value_is_refused_before_it_is_sent(changes: dict) -> None:
    with pytest.raises((RunnerProtocolError, ValueError)):
        replace(REQUEST, **changes).to_bytes()


def test_a_request_field_that_is_not_known_is_refused() -> None:
    with pytest.raises(RunnerProtocolError, match="colour"):
        parse_request(encoded(to_builtins(REQUEST) | {"colour": "red"}))


@pytest.mark.parametrize(
    ("content", "run_id"),
    [
        (encoded({"run_id": "r-1"}), "r-1"),
        (encoded({"run_id": "../r"}), None),
        (encoded({"run_id": 3}), None),
        (encoded([1]), None),
        (b"{", None),
    ],
)
def test_the_run_id_of_a_broken_request(content: bytes, run_id: str | None) -> None:
    assert run_id_of(content) == run_id


@pytest.mark.parametrize("kind", sorted(EVENTS))
def test_every_event_is_read_with_or_without_its_line_end(kind: str) -> None:
    expected = {"event": kind, "t_ms": 1.0} | EXAMPLES[kind]
    assert parse_event(line(kind)) == parse_event(line(kind).rstrip()) == expected


@pytest.mark.parametrize("kind", sorted(EVENTS))
def test_an_event_without_one_of_its_fields_is_refused(kind: str) -> None:
    whole = {"event": kind, "t_ms": 1.0} | EXAMPLES[kind]
    for name in whole:
        with pytest.raises(RunnerProtocolError):
            parse_event(encoded({k: v for k, v in whole.items() if k != name}))


def test_a_result_without_one_of_its_fields_is_refused() -> None:
    assert parse_result(result_bytes(RESULT)) == RESULT
    for name in RESULT:
        with pytest.raises(RunnerProtocolError):
            parse_result(encoded({k: v for k, v in RESULT.items() if k != name}))


def test_fields_and_events_that_are_not_known_pass() -> None:
    assert parse_event(line("done", colour="red"))["colour"] == "red"
    assert parse_result(encoded(RESULT | {"colour": "red"}))["colour"] == "red"
    event = parse_event(b'{"event":"applause","t_ms":2,"claps":3}')
    assert event["event"] not in EVENTS and event["claps"] == 3


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\n", b"{", b"[]", b"null", b"\xff", b'{"event":"done"}', b'{"t_ms":1}',
        b'{"event":"done","t_ms":NaN}', b'{"event":"done","t_ms":Infinity}',
        b'{"event":"done","t_ms":1e999}', b'{"event":"done","t_ms":-1}',
        b'{"event":"done","t_ms":"1"}', b'{"event":"done","t_ms":true}',
        b'{"event":"done","t_ms":' + b"9" * 5000 + b"}", b'{"event":"Done","t_ms":1}',
        b'{"event":"done\\n","t_ms":1}', b'{"event":"done","t_ms":1,"x":"\\ud800"}',
        b'{"event":"done","t_ms":1}{"event":"done","t_ms":1}',
        b'{"event":"done","t_ms":1,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"event":' + b"[" * 400 + b"]" * 400 + b"}",
        line("step", canvas=-1), line("step", step=0), line("step", accepted=1.5),
        line("step", finished=1), line("canvas", new_tokens=None), line("text", text=None),
        line("memory", rss_bytes=2**63), line("memory", pss_bytes=-1),
        line("temperature", zones={"cpu": "hot"}), line("temperature", zones={"c\x1b[2J": 1.0}),
        line("failed", reason="bored"), line("failed", sentence="a\x1b[31mb"),
        line("failed", sentence=""), line("started", run_id="a/b"), line("started", pid=0),
        line("started", protocol=0), line("started", protocol="1"), line("started", protocol=1.0),
        line("loaded", threads=0), line("loaded", cold=None),
        line("loaded", delegation={"head": 3}),
    ],
)  # fmt: skip
def test_a_malformed_event_is_one_sentence(content: bytes) -> None:
    with pytest.raises(RunnerProtocolError) as refused:
        parse_event(content)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "fine"}, {"failure": {"reason": "input", "sentence": "x"}}, {"run_id": None},
        {"status": "failed"}, {"load_ms": None}, {"memory": None}, {"answers": []},
    ],
)  # fmt: skip
def test_a_result_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RunnerProtocolError):
        parse_result(encoded(RESULT | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"answer_tokens": [-1]}, {"answer_tokens": None}, {"canvases": []},
        {"finish_reason": "cancelled"}, {"text": 3}, {"first_draft_ms": None},
        {"canvases": [{"canvas": 0, "tokens": [-1], "converged": True, "steps": []}]},
        {"canvases": [{"canvas": 0, "tokens": [], "converged": True, "steps": [{}]}]},
    ],
)  # fmt: skip
def test_an_answer_of_a_run_that_went_well_is_whole(changes: dict[str, Any]) -> None:
    with pytest.raises(RunnerProtocolError):
        parse_result(encoded(RESULT | {"answers": [ANSWER | changes]}))


def test_a_cancelled_run_keeps_what_it_had() -> None:
    answer = ANSWER | {"canvases": [], "finish_reason": "cancelled", "first_draft_ms": None}
    failure = {"reason": "cancelled", "sentence": "ended by a signal"}
    result = RESULT | {"status": "failed", "failure": failure, "answers": [answer]}
    assert parse_result(encoded(result))["answers"] == [answer]


def test_a_failed_result_may_have_no_numbers() -> None:
    failure = {"reason": "storage_full", "sentence": "no space left"}
    keep = ("protocol", "runtime", "versions", "memory")
    result = {name: RESULT[name] if name in keep else None for name in RESULT}
    result["answers"] = []
    result |= {"status": "failed", "failure": failure}
    result["memory"] = dict.fromkeys(RESULT["memory"])
    assert parse_result(encoded(result))["failure"] == failure


def test_an_older_protocol_is_refused() -> None:
    with pytest.raises(RunnerProtocolError, match=r"version 0.*one version"):
        parse_result(encoded(RESULT | {"protocol": 0}))


def test_a_newer_protocol_asks_for_an_update_of_whoever_reads() -> None:
    for content, parse in (
        (line("started", protocol=4), parse_event),
        (encoded({"protocol": 4}), parse_result),
    ):
        with pytest.raises(RunnerProtocolError, match=r"version 4.*update the host"):
            parse(content)
    with pytest.raises(RunnerProtocolError, match=r"version 4.*update the runner"):
        parse_request(encoded({"protocol": 4, "new": 1}))


def test_what_is_too_large_is_refused_unread() -> None:
    padding = b" " * MAXIMUM_LINE_BYTES
    assert parse_event(line("done") + padding[: -len(line("done"))])["event"] == "done"
    for content, parse in (
        (line("done") + padding, parse_event),
        (b" " * (MAXIMUM_RESULT_BYTES + 1), parse_result),
        (b" " * (MAXIMUM_REQUEST_BYTES + 1), parse_request),
    ):
        with pytest.raises(RunnerProtocolError, match="at most"):
            parse(content)


def test_a_line_that_no_host_would_read_is_not_written() -> None:
    with pytest.raises(RunnerProtocolError, match="at most"):
        event_line("text", 1.0, {"text": "a" * MAXIMUM_LINE_BYTES})


def test_numbers_that_are_not_finite_are_written_as_null() -> None:
    event = parse_event(line("step", mean_entropy=float("nan")))
    assert event["mean_entropy"] is None
    steps = ANSWER["canvases"][0]["steps"][0] | {"mean_entropy": float("inf")}
    canvas = ANSWER["canvases"][0] | {"steps": (steps,)}
    answers = (ANSWER | {"canvases": (canvas,)},)
    result = parse_result(result_bytes(RESULT | {"answers": answers}))
    assert result["answers"][0]["canvases"][0]["steps"][0]["mean_entropy"] is None


@given(st.text())
def test_any_text_becomes_a_sentence(text: str) -> None:
    assert parse_event(line("failed", sentence=sentence(text)))["event"] == "failed"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner),
    max_leaves=10,
)


@settings(max_examples=300)
@given(st.sampled_from(sorted(EVENTS)), st.data())
def test_an_event_with_any_value_is_read_or_refused(kind: str, data: st.DataObject) -> None:
    whole = {"event": kind, "t_ms": 1.0} | EXAMPLES[kind]
    name = data.draw(st.sampled_from(sorted(whole)))
    content = json.dumps(whole | {name: data.draw(JSON)}).encode()
    try:
        event = parse_event(content)
    except RunnerProtocolError:
        return
    json.dumps(event, allow_nan=False, ensure_ascii=False).encode()


@settings(max_examples=300)
@given(st.sampled_from([line(kind) for kind in sorted(EVENTS)]), st.data())
def test_damaged_bytes_are_read_or_refused(content: bytes, data: st.DataObject) -> None:
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        if not damaged:
            break
    for parse in (parse_event, parse_result, parse_request):
        try:
            parse(bytes(damaged))
        except RunnerProtocolError:
            continue
