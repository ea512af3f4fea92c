"""The Linux runner: its answer is the library's, its failures have names, its files are whole.

CPU only; the toy bundle, in this process where the process itself is not what is tested.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from export.contract.bundle import Bundle, open_bundle, write_bundle
from export.contract.runner_protocol import parse_event, parse_result, read_request
from export.host.bundle_engine import open_engine
from export.host.runner.run import run
from export.host.tokenizer import open_tokenizer
from tests.support.runner_process import (
    REPOSITORY,
    TIMEOUT_S,
    expect_failure,
    read_back,
    start,
    tokens_of,
    wait_for_event,
    write_request,
)

ENDLESS = 1_000_000
"""Denoising steps; a run that is not ended from outside takes minutes."""


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize("force_steps", [None, 4])
def test_tokens_are_those_of_the_library(
    folder: Path, toy_bundle: Path, warmup_steps: int, force_steps: int | None
) -> None:
    request = write_request(
        folder,
        toy_bundle,
        prompts=("hello",),
        seed=2**64 - 1,
        warmup_steps=warmup_steps,
        force_steps=force_steps,
        settings={"entropy_bound": 0.2, "max_steps": 7},
    )
    assert run(request) == 0
    events, result = read_back(folder)
    bundle = open_bundle(toy_bundle)
    session, tokenizer = open_engine(bundle, 1).session(), open_tokenizer(bundle)
    prompt = tokenizer.encode_prompt("hello")
    settings = type(session.settings)(
        **(bundle.manifest.sampler.settings | {"entropy_bound": 0.2, "max_steps": 7})
    )
    expected = session.generate(prompt, 12, 2**64 - 1, settings=settings, force_steps=force_steps)
    [answer] = result["answers"]
    assert tokens_of(answer) == expected.tokens
    assert tuple(answer["answer_tokens"]) == expected.answer_tokens
    assert answer["text"] == tokenizer.decode(expected.answer_tokens)
    assert answer["prompt_tokens"] == len(prompt)
    assert answer["new_tokens"] == expected.new_tokens
    assert answer["finish_reason"] == expected.finish_reason
    assert [len(c["steps"]) for c in answer["canvases"]] == [
        len(c.steps) for c in expected.canvases
    ]
    assert [s["accepted"] for c in answer["canvases"] for s in c["steps"]] == [
        s.accepted for s in expected.steps
    ]
    # The events tell the same as the result.
    steps = [e for e in events if e["event"] == "step"]
    assert [s["layers_ms"] for s in steps] == [
        s["layers_ms"] for c in answer["canvases"] for s in c["steps"]
    ]
    assert [e["steps"] for e in events if e["event"] == "canvas"] == [
        len(c["steps"]) for c in answer["canvases"]
    ]
    assert [e["text"] for e in events if e["event"] == "text"][-1] == answer["text"]
    warmed_up = [e["steps"] for e in events if e["event"] == "warmed_up"]
    assert warmed_up == ([warmup_steps] if warmup_steps else [])
    assert (result["warmup_ms"] is None) == (warmup_steps == 0)


def test_a_process_of_its_own_tells_the_run_in_order(folder: Path, toy_bundle: Path) -> None:
    sha256 = hashlib.sha256((toy_bundle / "bundle.json").read_bytes()).hexdigest()
    process = start(
        write_request(
            folder, toy_bundle, bundle_sha256=sha256, verify=True, cold=True,
            memory_interval_ms=5, force_steps=200,
        )
    )  # fmt: skip
    _, stderr = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, stderr) == (0, b"")
    events, result = read_back(folder)
    sampled = [e for e in events if e["event"] == "memory"]
    told = [e for e in events if e["event"] not in ("memory", "temperature")]
    kinds = [e["event"] for e in told]
    assert kinds[:3] == ["started", "loaded", "warmed_up"] and kinds[-1] == "done"
    assert (
        kinds.index("prefill") < kinds.index("step") < kinds.index("canvas") < kinds.index("text")
    )
    assert all(a["t_ms"] <= b["t_ms"] for a, b in itertools.pairwise(told))
    started, loaded = told[:2]
    assert started["pid"] == process.pid and started["runtime"]["host"] == "python"
    assert {"torch", "executorch", "python"} <= set(started["versions"])
    assert loaded["t_ms"] - started["t_ms"] >= loaded["import_ms"] + loaded["load_ms"]
    assert loaded["cold"] == result["cold"]
    assert result["cold"]["requested"] and result["cold"]["method"] == "fadvise"
    # Taken while the model ran too, and like the runner's own.
    first_step = next(e["t_ms"] for e in told if e["event"] == "step")
    assert any(e["t_ms"] > first_step for e in sampled)
    for sample in [*sampled, result["memory"]["after_load"], result["memory"]["at_end"]]:
        assert sample["anonymous_bytes"] + sample["file_bytes"] == sample["rss_bytes"]
        assert 0 < sample["pss_bytes"] <= sample["rss_bytes"]
    peak = result["memory"]["peak_rss_bytes"]
    # The kernel counts resident pages in batches of some hundred a core (percpu_counter).
    assert max(e["rss_bytes"] for e in sampled) <= peak + 16 * 2**20
    assert result["memory"]["at_end"]["minor_faults"] >= sampled[-1]["minor_faults"]


@pytest.mark.slow
def test_demo_tokens_are_those_of_the_library(folder: Path, demo_bundle: Bundle) -> None:
    request = write_request(
        folder,
        demo_bundle.folder,
        prompts=("3+4=",),
        max_new_tokens=40,
        seed=5,
    )
    process = start(request)
    assert process.wait(TIMEOUT_S) == 0
    _, result = read_back(folder)
    prompt = open_tokenizer(demo_bundle).encode_prompt("3+4=")
    expected = open_engine(demo_bundle, 1).session().generate(prompt, 40, 5)
    assert tokens_of(result["answers"][0]) == expected.tokens
    assert set(result["delegation"]) == {"layers", "head"}
    assert all(entry["delegated"] > 0 for entry in result["delegation"].values())


def test_nothing_heavy_is_imported_for_what_is_refused(folder: Path, toy_bundle: Path) -> None:
    (toy_bundle / "head.pte").unlink()
    request = write_request(folder, toy_bundle)
    code = (
        "import sys, pathlib\n"
        "from export.host.runner.run import run\n"
        f"code = run(pathlib.Path({str(request)!r}))\n"
        "print(code, 'torch' in sys.modules, 'executorch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, timeout=TIMEOUT_S
    )
    assert done.stdout.split() == [b"3", b"False", b"False"]
    assert b"bundle_refused" in done.stderr and b"head.pte is missing" in done.stderr


def test_refuses_a_bundle_with_damage(folder: Path, toy_bundle: Path) -> None:
    content = bytearray((toy_bundle / "layers.pte").read_bytes())
    content[len(content) // 2] ^= 1
    (toy_bundle / "layers.pte").write_bytes(content)
    assert "damaged" in expect_failure(folder, toy_bundle, "bundle_refused", verify=True)


def test_refuses_another_bundle_than_the_one_meant(folder: Path, toy_bundle: Path) -> None:
    sentence = expect_failure(folder, toy_bundle, "bundle_refused", bundle_sha256="0" * 64)
    assert "deploy the bundle again" in sentence


def test_refuses_a_tokenizer_with_damage(folder: Path, toy_bundle: Path) -> None:
    size = (toy_bundle / "tokenizer.json").stat().st_size
    (toy_bundle / "tokenizer.json").write_bytes(b"{" * size)
    assert "tokenizer" in expect_failure(folder, toy_bundle, "bundle_refused")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": ((3, 29),)}, "has id 29"),
        ({"max_new_tokens": 39}, "only 36 fit"),
        ({"prompts": ("A",)}, "no token for 'A'"),
        ({"settings": {"tempo": 1.0}}, "tempo"),
        ({"settings": {"t_min": -1.0}}, "t_min is -1.0"),
    ],
)
def test_says_what_is_wrong_with_the_input(
    folder: Path, toy_bundle: Path, changes: dict[str, Any], words: str
) -> None:
    assert words in expect_failure(folder, toy_bundle, "input", **changes)


@pytest.mark.parametrize(
    ("content", "run_id", "words"),
    [
        (b"{", None, "not valid JSON"),
        (b'{"protocol": 1, "run_id": "../x"}', None, "breaks the runner protocol"),
        (b'{"protocol": 1, "run_id": "a.b", "colour": 1}', "a.b", "breaks the runner protocol"),
        (b'{"protocol": 4, "run_id": "a.b"}', "a.b", "update the runner"),
    ],
)
def test_a_request_that_cannot_be_read_leaves_a_result(
    folder: Path, content: bytes, run_id: str | None, words: str
) -> None:
    (folder / "request.json").write_bytes(content)
    assert run(folder / "request.json") == 3
    events, result = read_back(folder)
    assert [e["event"] for e in events] == ["started", "failed"]
    assert events[0]["run_id"] == result["run_id"] == run_id
    assert result["failure"]["reason"] == "input" and words in result["failure"]["sentence"]


def test_a_request_that_is_not_there_leaves_a_result(folder: Path) -> None:
    assert run(folder / "request.json") == 3
    assert "No such file" in read_back(folder)[1]["failure"]["sentence"]


@pytest.mark.parametrize("name", ["events.jsonl", "result.json"])
def test_never_writes_over_an_earlier_run(
    folder: Path, toy_bundle: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).write_bytes(b"evidence")
    request = write_request(folder, toy_bundle)
    assert run(request) == 3
    assert "holds a run already" in capsys.readouterr().err
    assert (folder / name).read_bytes() == b"evidence"
    assert sorted(p.name for p in folder.iterdir()) == sorted([name, "request.json"])


def test_sigkill_leaves_whole_lines_and_no_result(folder: Path, toy_bundle: Path) -> None:
    process = start(write_request(folder, toy_bundle, force_steps=ENDLESS, memory_interval_ms=20))
    wait_for_event(process, folder, "step")
    wait_for_event(process, folder, "memory")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1  # who samples the memory
    process.kill()
    assert process.wait(TIMEOUT_S) == -signal.SIGKILL
    process.communicate()
    assert not (folder / "result.json").exists()
    deadline = time.monotonic() + TIMEOUT_S
    while _is_running(int(children[0])):
        assert time.monotonic() < deadline, "the sampler outlives the run"
        time.sleep(0.05)
    content = (folder / "events.jsonl").read_bytes()
    assert content.endswith(b"\n")
    kinds = {parse_event(line)["event"] for line in content.splitlines()}
    assert {"started", "step"} <= kinds and not kinds & {"done", "failed"}


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def test_sigterm_ends_a_run_cleanly(folder: Path, toy_bundle: Path) -> None:
    process = start(write_request(folder, toy_bundle, force_steps=ENDLESS))
    wait_for_event(process, folder, "step")
    process.terminate()
    _, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 3 and b"cancelled" in stderr
    events, result = read_back(folder)
    assert events[-1]["event"] == "failed" and events[-1]["reason"] == "cancelled"
    assert result["failure"]["reason"] == "cancelled"
    [answer] = result["answers"]
    assert answer["finish_reason"] == "cancelled" and answer["canvases"] == []
    assert result["load_ms"] > 0


def test_a_memory_limit_ends_a_run_by_name_or_by_signal(folder: Path, toy_bundle: Path) -> None:
    process = start(write_request(folder, toy_bundle, memory_limit_bytes=300 * 2**20))
    process.communicate(timeout=TIMEOUT_S)
    if process.returncode == 3:
        _, result = read_back(folder)
        assert result["failure"]["reason"] == "out_of_memory"
        assert "314572800" in result["failure"]["sentence"]
    else:
        assert process.returncode not in (0, 2)
        assert not (folder / "result.json").exists()


def test_a_full_disk_is_told_in_the_reserved_result(folder: Path, toy_bundle: Path) -> None:
    mount = "mount -t tmpfs -o size=64k none"
    if (
        not shutil.which("unshare")
        or subprocess.run(
            ["unshare", "-rm", "sh", "-c", f"{mount} {folder}"], capture_output=True
        ).returncode
    ):
        pytest.skip("no small file system can be mounted here")
    request = write_request(folder.parent, toy_bundle, force_steps=2000)
    copies = folder.parent / "copies"
    copies.mkdir()
    script = (
        f"{mount} {folder} && cp {request} {folder} && "
        f"{sys.executable} -m export.host.runner {folder}/request.json; code=$?; "
        f"cp {folder}/* {copies}; exit $code"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        cwd=REPOSITORY, capture_output=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr.decode()
    result = parse_result((copies / "result.json").read_bytes())
    assert result["run_id"] == "r-1" and result["failure"]["reason"] == "storage_full"
    assert not (copies / "result.json.part").exists()
    content = (copies / "events.jsonl").read_bytes()
    assert len(content) > 32 * 1024 and content.endswith(b"\n")
    for line in content.splitlines():
        parse_event(line)


PROMPTS = ("hello", (3, 4, 5), "a")


def test_each_of_several_prompts_is_answered_as_if_it_were_alone(
    folder: Path, toy_bundle: Path
) -> None:
    request = write_request(folder, toy_bundle, prompts=PROMPTS, seed=2**64 - 2, warmup_steps=1)
    assert run(request) == 0
    events, result = read_back(folder)
    assert (result["protocol"], events[0]["protocol"]) == (1, 1)
    assert len([e for e in events if e["event"] == "loaded"]) == 1
    assert [(e["done"], e["total"]) for e in events if e["event"] == "answer"] == [
        (1, 3), (2, 3), (3, 3),
    ]  # fmt: skip
    bundle = open_bundle(toy_bundle)
    tokenizer = open_tokenizer(bundle)
    engine = open_engine(bundle, 1)
    for number, (text, answer) in enumerate(zip(PROMPTS, result["answers"], strict=True)):
        prompt = tokenizer.encode_prompt(text) if isinstance(text, str) else text
        expected = engine.session().generate(prompt, 12, (2**64 - 2 + number) % 2**64)
        assert tuple(answer["answer_tokens"]) == expected.answer_tokens
        assert answer["text"] == tokenizer.decode(expected.answer_tokens)
        assert [len(c["steps"]) for c in answer["canvases"]] == [
            len(c.steps) for c in expected.canvases
        ]
        assert answer["new_tokens"] == expected.new_tokens
        # A prompt of up to six tokens is one pass, each committed canvas but the last another.
        assert answer["encodings"] == -(-len(prompt) // 6) + len(expected.canvases) - 1
        assert 0 < answer["first_commit_ms"] <= answer["total_ms"]


@pytest.mark.parametrize("prompts", [("hello",), ("hello", "world")])
def test_a_setting_that_the_program_does_not_heed_is_refused_for_one_prompt_and_for_several(
    folder: Path, toy_programs: dict[str, bytes], toy_bundle: Path, prompts: tuple[str, ...]
) -> None:
    """The bundle's sampler states what its program heeds."""
    bundle = open_bundle(toy_bundle)
    heeded = {"max_steps": 5.0, "entropy_bound": 0.5}
    sampler = msgspec.structs.replace(bundle.manifest.sampler, settings=heeded)
    files = toy_programs | {"tokenizer.json": bundle.path("tokenizer.json").read_bytes()}
    path = folder.parent / "heeding"
    write_bundle(path, msgspec.structs.replace(bundle.manifest, sampler=sampler), files)
    sentence = expect_failure(folder, path, "input", prompts=prompts, settings={"t_max": 0.9})
    assert "has no setting t_max; it has max_steps, entropy_bound" in sentence
    assert read_back(folder)[1]["answers"] == []
    other = folder.parent / "heeded"
    other.mkdir()
    request = write_request(other, path, prompts=prompts, settings={"entropy_bound": 0.2})
    assert run(request) == 0
    assert len(read_back(other)[1]["answers"]) == len(prompts)


def test_a_prompt_among_several_that_cannot_be_is_refused_before_loading(
    folder: Path, toy_bundle: Path
) -> None:
    request = {"prompts": ("hello", "1+1")}
    assert "no token for '1'" in expect_failure(folder, toy_bundle, "input", **request)
    assert read_back(folder)[1]["load_ms"] is None


def test_a_bundle_without_a_tokenizer_takes_tokens_and_gives_no_text(
    folder: Path, toy_programs: dict[str, bytes], tmp_path: Path
) -> None:
    from tests.support import toy_model

    write_bundle(tmp_path / "bare", toy_model.manifest(), toy_programs)
    assert run(write_request(folder, tmp_path / "bare")) == 0
    events, result = read_back(folder)
    assert result["answers"][0]["text"] is None and result["tokenizer_ms"] is None
    assert not any(e["event"] == "text" for e in events)
    assert read_request(folder / "request.json").prompts == ((3, 4, 5),)
    other = tmp_path / "other"
    other.mkdir()
    sentence = expect_failure(other, tmp_path / "bare", "input", prompts=("a",))
    assert "without a tokenizer" in sentence


@pytest.mark.skipif(sys.platform != "linux", reason="mappings and /proc are Linux's")
def test_a_memory_budget_gives_the_same_tokens_and_tells_what_it_took(
    tmp_path: Path, toy_bundle: Path
) -> None:
    packed = tmp_path / "packed"
    changes = ({}, {"memory_budget_bytes": 8 << 30, "packed_weights": str(packed)})
    results = []
    for number, change in enumerate(changes):
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        assert run(write_request(folder, toy_bundle, **change)) == 0
        results.append(read_back(folder)[1])
    plain, held = results
    assert tokens_of(held["answers"][0]) == tokens_of(plain["answers"][0])
    assert (plain["weights"], plain["pack_ms"]) == (None, None)
    assert held["pack_ms"] > 0
    assert held["weights"]["budget_bytes"] == 8 << 30
    assert [stage["name"] for stage in held["weights"]["stages"]] == ["layers", "head"]
    assert list(packed.glob("*.packed"))


def test_a_memory_budget_that_cannot_be_held_is_the_requests_fault(
    folder: Path, toy_bundle: Path
) -> None:
    sentence = expect_failure(
        folder, toy_bundle, "input", memory_budget_bytes=1000, packed_weights=str(folder / "packed")
    )
    assert "a memory budget of 1000 bytes is too small" in sentence
    assert not (folder / "packed").exists()
