"""What a plan allows and what each pass asks of the model; puzzles asked and graded."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_tests.adb.transport import Transport
from device_tests.bench.deploy import deploy
from device_tests.bench.measurement import bench
from device_tests.bench.plan import BenchPlan
from device_tests.bench.runner import LinuxRunner
from device_tests.bench.workload import prepare, random_prompt, workload
from device_tests.results import records
from export.contract.bundle import Bundle, open_bundle, write_bundle
from export.contract.manifest import ModelInfo, SpecialTokens, TokenizerInfo
from export.host.bundle_engine import open_engine
from export.host.evaluation import evaluate
from export.host.puzzles import held_out
from export.host.tokenizer import open_tokenizer
from quantize.errors import InputError
from tests.support import toy_model
from tests.support.bench_tools import DEPLOYMENT, QUICK, Scripted
from tests.support.demo import DEMO_MODEL
from tests.support.record_samples import ANSWER

# The plan.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"passes": {"fast": 1}}, "no pass 'fast'"),
        ({"passes": {"speed": -1}}, "repeats of the pass speed is -1"),
        ({"passes": {"speed": 0}}, "no run"),
        ({"threads": ()}, "threads"),
        ({"threads": (2, 2)}, "once"),
        ({"threads": (0,)}, "threads is 0"),
        ({"threads": (True,)}, "threads is True"),
        ({"prompt_text": " "}, "prompt_text is empty"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"canvases": 0}, "canvases is 0"),
        ({"force_steps": 1.5}, "force_steps is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"max_temperature_c": float("nan")}, "max_temperature_c is nan"),
        ({"gate_timeout_s": -1}, "gate_timeout_s is -1"),
        ({"poll_s": 0}, "poll_s is 0"),
        ({"hang_s": "60"}, "hang_s is '60'"),
        ({"memory_interval_ms": 0}, "memory_interval_ms is 0"),
        ({"memory_limit_bytes": 0}, "memory_limit_bytes is 0"),
        ({"memory_budget_bytes": 0}, "memory_budget_bytes is 0"),
        ({"puzzles": 0}, "puzzles is 0"),
        ({"passes": {"puzzles": 1}}, "say how many"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_name(change: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        BenchPlan(**change)


# Puzzles.


@pytest.fixture(scope="module")
def puzzle_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that only scripted runners could run, with a tokenizer that can write puzzles."""
    info = ModelInfo("toy", "toy", 64, 8, 6, 60)
    special = SpecialTokens(eos=(1, 5), pad=0, bos=2)
    manifest = toy_model.manifest(
        info, tokenizer=TokenizerInfo("t.json", None), special_tokens=special
    )
    tokenizer = (DEMO_MODEL / "tokenizer.json").read_bytes()
    files = {"layers.pte": b"layers", "head.pte": b"head", "t.json": tokenizer}
    return write_bundle(tmp_path_factory.mktemp("puzzles") / "bundle", manifest, files)


def test_puzzles_are_asked_only_if_their_number_is_given(puzzle_bundle: Bundle) -> None:
    assert BenchPlan().passes.get("puzzles", 0) == 0
    assert BenchPlan(puzzles=2).passes["puzzles"] == 3
    assert prepare(BenchPlan(), puzzle_bundle)[1] == ()
    workloads, puzzles = prepare(BenchPlan(puzzles=2, seed=4), puzzle_bundle)
    assert puzzles == tuple(held_out(2, 4)) and len(puzzles) == 6
    # A sudoku's answer and the end token are twenty tokens: four canvases of six.
    asked = workloads["puzzles"]
    assert (asked["max_new_tokens"], asked["puzzles"], asked["force_steps"]) == (24, 2, None)
    assert "puzzles" not in workloads["speed"], "as before there was such a pass"


def test_puzzles_for_a_bundle_that_cannot_write_them_are_refused(
    tmp_path: Path, toy_bundle: Path
) -> None:
    files = {"layers.pte": b"layers", "head.pte": b"head"}
    bare = write_bundle(tmp_path / "bare", toy_model.manifest(), files)
    with pytest.raises(InputError, match=r"without a tokenizer.*leave out --puzzles"):
        prepare(BenchPlan(puzzles=1), bare)
    with pytest.raises(InputError, match=r"no token for '[0-9]'"):
        prepare(BenchPlan(puzzles=1), open_bundle(toy_bundle))


def test_puzzles_are_one_run_and_graded_here(
    transport: Transport, puzzle_bundle: Bundle, tmp_path: Path
) -> None:
    plan = BenchPlan(passes={"puzzles": 1}, puzzles=2, **QUICK)
    texts = [f" {puzzle.answer}\n" for puzzle in held_out(2, 0)]
    texts[-1] = texts[-1].strip() + "0"

    def run(texts: list[str], name: str) -> dict:
        answers = [ANSWER | {"text": text} for text in texts]
        runner = Scripted(changes={"answers": answers})
        file = tmp_path / name
        bench(transport, puzzle_bundle, DEPLOYMENT, runner, plan, file)
        (record,) = records.read(file)
        return record

    record = run(texts, "ok.jsonl")
    assert record["status"] == "ok" and record["schema_version"] == 1
    assert [puzzle["is_exact"] for puzzle in record["puzzles"]] == [True] * 5 + [False]
    assert record["metrics"]["exact_match"] == 5 / 6
    assert record["metrics"]["exact_match_sort"] == 1
    assert record["metrics"]["answer_ms"] == 80
    failed = run(texts[:-1], "few.jsonl")
    assert failed["failure"]["reason"] == "internal" and "puzzles" not in failed
    assert "5 answers to 6 puzzles" in failed["failure"]["sentence"]


@pytest.mark.slow
def test_the_device_and_evaluate_say_the_same_of_a_bundle(
    transport: Transport, demo_bundle: Bundle, tmp_path: Path
) -> None:
    """The demo model on the local device, and in this process with the same puzzles and seeds."""
    deployment = deploy(transport, demo_bundle)
    plan = BenchPlan(passes={"puzzles": 1}, puzzles=4, seed=3, threads=(1,), **QUICK)
    bench(transport, demo_bundle, deployment, LinuxRunner(), plan, tmp_path / "r.jsonl")
    (record,) = records.read(tmp_path / "r.jsonl")
    tallies = evaluate(
        open_engine(demo_bundle, 1), open_tokenizer(demo_bundle), held_out(4, 3), seed=3
    )
    for tally in tallies:
        name = "exact_match" if tally.kind == "all" else f"exact_match_{tally.kind}"
        assert record["metrics"][name] == tally.exact_match
    steps = [
        sum(len(canvas["steps"]) for canvas in answer["canvases"])
        for answer in record["result"]["answers"]
    ]
    assert sum(steps) / len(steps) == tallies[-1].mean_steps


def test_passes_differ_in_what_they_ask_for() -> None:
    manifest = toy_model.manifest(tokenizer=TokenizerInfo("t.json", None))
    plan = BenchPlan(prompt_text="hello", force_steps=4, canvases=2)
    speed, natural, cold = (workload(plan, name, manifest) for name in ("speed", "natural", "cold"))
    assert (speed["force_steps"], natural["force_steps"]) == (4, None)
    assert (speed["prompt_text"], natural["prompt_text"]) == (None, "hello")
    assert (speed["prompt_tokens"], natural["prompt_tokens"]) == (28, None)  # 40 - 2 canvases of 6
    assert speed["max_new_tokens"] == 12
    assert (speed["warmup_steps"], cold["warmup_steps"]) == (2, 0)
    without = workload(plan, "natural", toy_model.manifest())
    assert (without["prompt_text"], without["prompt_tokens"]) == (None, 28)


@pytest.mark.parametrize("change", [{"canvases": 7}, {"prompt_tokens": 35}])
def test_a_plan_that_does_not_fit_the_model_is_refused(change: dict) -> None:
    with pytest.raises(InputError, match="context of 40"):
        workload(BenchPlan(**change), "speed", toy_model.manifest())


def test_the_random_prompt_has_no_special_token_and_depends_on_the_seed() -> None:
    manifest = toy_model.manifest()
    drawn = random_prompt(manifest, 5000, 0)
    assert set(drawn) == set(range(3, 29))  # every token but <pad>, <eos>, <bos>
    assert random_prompt(manifest, 50, 0) == drawn[:50]
    assert random_prompt(manifest, 50, 1) != drawn[:50]
