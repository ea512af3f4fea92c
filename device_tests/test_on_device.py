"""Deploy, run, measure and clean up on a real device: `pytest device_tests --device SERIAL`.

Without a serial the device is adbd on this machine. The demo model's bundle is run unless another
is given; what is compared is then that bundle on the host.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from device_tests.adb.transport import Transport
from device_tests.bench.deploy import Deployment, deploy
from device_tests.bench.device_lock import DeviceLock
from device_tests.bench.events import BenchOutcome
from device_tests.bench.inventory import bundle_sha256, clean, deployed
from device_tests.bench.measurement import bench
from device_tests.bench.plan import BenchPlan
from device_tests.bench.runner import Runner
from device_tests.conftest import pocketdiff
from device_tests.errors import DeviceBusy
from device_tests.remote.shell import DEVICE_ROOT
from device_tests.results import records, report
from device_tests.results.summary import summarize
from export.contract.bundle import Bundle
from export.contract.manifest import MANIFEST_FILE
from tests.support.browser import measure
from tests.support.interpreter import interpreter_bytes

pytestmark = pytest.mark.device

PROMPT = "sort 66403971"
PLAN = BenchPlan(
    passes={"cold": 1, "warm_up": 0, "speed": 2, "natural": 1, "memory": 1},
    prompt_text=PROMPT,
    force_steps=4,
    poll_s=0.5,
    max_temperature_c=80.0,
    threads=(1,),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results") / "results.jsonl"


@pytest.fixture(scope="module")
def outcome(
    transport: Transport, bundle: Bundle, deployment: Deployment, runner: Runner, results: Path
) -> BenchOutcome:
    """One benchmark of every pass."""
    return bench(transport, bundle, deployment, runner, PLAN, results)


def of_pass(outcome: BenchOutcome, name: str) -> list[records.Record]:
    return [record for record in outcome.records if record["pass"] == name]


def tokens_of(record: records.Record) -> list[int]:
    """Tokens of all canvases of a run of one prompt."""
    [answer] = record["result"]["answers"]
    return [token for canvas in answer["canvases"] for token in canvas["tokens"]]


def test_a_deployed_bundle_is_whole_and_is_not_sent_again(
    transport: Transport, bundle: Bundle, deployment: Deployment
) -> None:
    assert deployment.bundle_sha256 == bundle_sha256((bundle.folder / MANIFEST_FILE).read_bytes())
    [found] = [b for b in deployed(transport) if b.bundle_id == deployment.bundle_id]
    assert found.complete
    again = deploy(transport, bundle)
    assert again.bytes_sent == 0
    assert again.bytes_present == again.bytes_total > bundle.total_bytes


def test_every_run_of_the_plan_goes_well(outcome: BenchOutcome, results: Path) -> None:
    assert [record["failure"] for record in outcome.records] == [None] * 5
    assert outcome.ended_early is None
    assert records.read(results) == list(outcome.records)


def test_the_device_says_what_the_host_says_for_the_same_seed(
    outcome: BenchOutcome, bundle: Bundle
) -> None:
    """Token for token: the same programs, random numbers and loop."""
    host = json.loads(
        pocketdiff(
            *("generate", bundle.folder, "--prompt", PROMPT, "--seed", PLAN.seed),
            *("--max-new-tokens", bundle.manifest.model.canvas_length, "--no-live", "--json"),
        ).splitlines()[-1]
    )
    [natural] = of_pass(outcome, "natural")
    [answer] = natural["result"]["answers"]
    assert tokens_of(natural) == host["tokens"]
    assert answer["text"] == host["text"]
    assert [len(c["steps"]) for c in answer["canvases"]] == [
        len(c["steps"]) for c in host["canvases"]
    ]


def test_repeats_of_one_seed_have_the_same_tokens(outcome: BenchOutcome) -> None:
    tokens = {tuple(tokens_of(record)) for record in of_pass(outcome, "speed")}
    assert len(tokens) == 1


def test_the_speed_metrics_are_there_and_sane(outcome: BenchOutcome, bundle: Bundle) -> None:
    canvas_length = bundle.manifest.model.canvas_length
    for record in of_pass(outcome, "speed"):
        metrics, [answer] = record["metrics"], record["result"]["answers"]
        assert len(record["steps"]) == PLAN.force_steps
        assert 0 < metrics["step_ms_p5"] <= metrics["step_ms"] <= metrics["step_ms_p95"]
        assert metrics["step_ms"] <= metrics["first_draft_ms"] <= answer["first_commit_ms"]
        assert answer["first_commit_ms"] <= answer["total_ms"]
        assert metrics["load_warm_ms"] > 0
        assert metrics["prefill_tokens_per_s"] > 0
        assert all(0 <= step["accepted"] <= canvas_length for step in record["steps"])
        assert metrics["delegated_operators"] > metrics["portable_operators"]
    [natural] = of_pass(outcome, "natural")
    metrics = natural["metrics"]
    assert 1 <= metrics["steps_per_canvas"] <= 48
    assert 0 < metrics["tokens_per_s"] <= metrics["tokens_per_s_with_padding"]
    assert metrics["tokens_per_forward"] * metrics["steps_per_canvas"] <= canvas_length
    [cold] = of_pass(outcome, "cold")
    assert cold["metrics"]["load_cold_ms"] > 0


def test_memory_stays_within_the_budget_and_its_parts_add_up(
    outcome: BenchOutcome, bundle: Bundle, request: pytest.FixtureRequest
) -> None:
    budget_bytes = request.config.getoption("--memory-budget")
    if budget_bytes is None and request.config.getoption("--device") is not None:
        budget_bytes = 512 * 2**20
    elif budget_bytes is None:
        budget_bytes = interpreter_bytes() + 256 * 2**20
    [record] = of_pass(outcome, "memory")
    metrics = record["metrics"]
    assert bundle.total_bytes < metrics["peak_rss_bytes"] <= budget_bytes
    assert metrics["peak_pss_bytes"] <= metrics["peak_rss_bytes"]
    assert len(record["memory"]) >= 2
    for sample in record["memory"]:
        parts = sample["anonymous_bytes"] + sample["file_bytes"]
        assert parts == pytest.approx(sample["rss_bytes"], rel=0.02)
    assert metrics["major_faults"] >= 0


def test_conditions_and_sensors_stand_in_every_record(
    outcome: BenchOutcome, deployment: Deployment
) -> None:
    for record in outcome.records:
        conditions = record["conditions"]
        assert conditions["threads"] == 1
        assert conditions["bundle"]["sha256"] == deployment.bundle_sha256
        assert conditions["device"]["cores"] >= 1
        assert conditions["device"]["memory_bytes"] > 2**28
        assert {"pocket_diffusion", "executorch"} <= set(conditions["versions"])
        assert {sample["phase"] for sample in record["sensors"]} == {"before", "during", "after"}
        assert record["gate"]["threshold_c"] == PLAN.max_temperature_c


def test_a_finished_benchmark_resumed_runs_nothing(
    outcome: BenchOutcome,
    transport: Transport,
    bundle: Bundle,
    deployment: Deployment,
    runner: Runner,
    results: Path,
) -> None:
    again = bench(transport, bundle, deployment, runner, PLAN, results, resume=True)
    assert (again.skipped, again.records) == (5, ())


def test_a_second_benchmark_is_refused_with_the_name_of_the_first(
    transport: Transport, bundle: Bundle, deployment: Deployment, runner: Runner, tmp_path: Path
) -> None:
    results = tmp_path / "results.jsonl"
    with DeviceLock(transport, "the-first"), pytest.raises(DeviceBusy, match="the-first"):
        bench(transport, bundle, deployment, runner, PLAN, results)
    assert not results.exists() or records.read(results) == []


def test_the_report_tells_of_all_runs(outcome: BenchOutcome, results: Path) -> None:
    found = records.read(results)
    [group] = report.to_json(summarize(found))["configurations"]
    assert group["passes"] == {
        "cold": {"ok": 1, "failed": 0},
        "speed": {"ok": 2, "failed": 0},
        "natural": {"ok": 1, "failed": 0},
        "memory": {"ok": 1, "failed": 0},
    }


def test_the_reports_page_stands_in_a_browser(
    outcome: BenchOutcome,
    results: Path,
    bundle: Bundle,
    chromium: str,
    tmp_path: Path,
) -> None:
    """Of these very runs: every plot drawn that there are data for, nothing beyond the screen."""
    page = report.to_html(summarize(records.read(results)))
    assert bundle.manifest.model.name in page
    for width in (400, 1200):
        found = measure(chromium, tmp_path, page, width)
        assert found["wide"] <= width and found["beyond"] == []
        drawn = {plot["name"]: plot for plot in found["plots"]}
        assert {"steps", "step-spread", "accepted", "memory"} <= set(drawn)
        for plot in drawn.values():
            left, top, right, bottom = plot["box"]
            assert right - left > 300 and bottom - top > 150 and plot["marks"] > 5
            assert plot["cut"] == []


def test_nothing_of_the_bundle_is_left_after_clean(
    outcome: BenchOutcome,
    transport: Transport,
    deployment: Deployment,
    request: pytest.FixtureRequest,
) -> None:
    """Runs last: the other tests need the bundle. Other bundles on somebody's device stay."""
    if request.config.getoption("--device") is not None:
        assert clean(transport, deployment.bundle_id).bundles == 1
    else:
        transport.shell("mkdir -p /data/local/tmp/of_somebody_else")
        assert clean(transport).bundles == 1
        assert transport.stat(DEVICE_ROOT) is None
        assert transport.stat("/data/local/tmp/of_somebody_else") is not None
    assert deployment.bundle_id not in [found.bundle_id for found in deployed(transport)]
    assert transport.stat(deployment.remote_folder) is None
