"""The metrics: formulas against records worked out by hand, and records that lack things."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_tests.results import metrics
from device_tests.results.intervals import share_interval
from device_tests.results.metrics import BY_NAME, METRICS, compute
from device_tests.results.record_fields import hottest, percentile, trials
from device_tests.results.records import PASSES
from tests.support import record_samples

DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"

STEPS = [
    {"layers_ms": 8.0, "head_ms": 2.0, "accepted": 4, "mean_entropy": 1.0},
    {"layers_ms": 9.0, "head_ms": 3.0, "accepted": 10, "mean_entropy": 0.5},
    {"layers_ms": 16.0, "head_ms": 4.0, "accepted": 20, "mean_entropy": 0.1},
]
ANSWER = {
    "prompt_tokens": 50,
    "prompt_ms": 200.0,
    "encode_ms": 30.0,
    "total_ms": 500.0,
    "first_draft_ms": 210.5,
    "first_commit_ms": 222.25,
    "new_tokens": 33,
    "canvases": [
        {"canvas": 0, "tokens": [1] * 20, "converged": True, "steps": STEPS[:2]},
        {"canvas": 1, "tokens": [1] * 20, "converged": True, "steps": STEPS[2:]},
    ],
}
ANSWERS = [
    {"total_ms": 40.0, "first_commit_ms": 10.0, "new_tokens": 6,
     "canvases": [{"steps": STEPS[:1] * 5}], "encodings": 1},
    {"total_ms": 60.0, "first_commit_ms": 30.0, "new_tokens": 6,
     "canvases": [{"steps": STEPS[:1] * 9}], "encodings": 2},
    {"total_ms": 50.0, "first_commit_ms": 14.0, "new_tokens": 9,
     "canvases": [{"steps": STEPS[:1] * 6}], "encodings": 1},
]  # fmt: skip
RESULT = {
    "load_ms": 321.0,
    "cold": {"requested": True, "method": "fadvise", "resident_before": 1, "resident_after": 0.05},
    "memory": {
        "peak_rss_bytes": 5000,
        "after_load": {"rss_bytes": 1000, "pss_bytes": 900, "anonymous_bytes": 400,
                       "file_bytes": 600, "swap_bytes": 0},
        "at_end": {"rss_bytes": 3000, "pss_bytes": 2800, "anonymous_bytes": 2500,
                   "file_bytes": 500, "swap_bytes": 7},
        "major_faults": 12,
    },
    "delegation": {"layers": {"delegates": 2, "delegated": 30, "portable": 4},
                   "head": {"delegates": 1, "delegated": 5, "portable": 6}},
    "weights": {"kept_bytes": 700, "pass_bytes": 250, "storage_bytes": 6600,
                "streamed_stall_ms": 25.0},
}  # fmt: skip
SENSORS = [
    ("before", 30.0, 300.0, 81.0, None),
    ("before", 31.0, 300.0, 81.0, None),
    ("during", 40.0, 1000.0, 81.0, -500.0),
    ("during", 44.0, 2000.0, 81.0, -900.0),
    ("during", 42.0, 1800.0, 81.0, -700.0),
    ("after", 41.0, 300.0, 80.0, None),
    ("after", 35.0, 300.0, 80.0, None),
]
EXPECTED = {
    "load_cold_ms": 321.0,
    "cold_resident_share": 0.05,
    "load_warm_ms": 321.0,
    "prompt_ms": 200.0,
    "prefill_tokens_per_s": 250.0,
    "first_draft_ms": 210.5,
    "first_commit_ms": 222.25,
    "step_ms": 12.0,
    "step_ms_p5": 10.2,  # linear between 10 and 12
    "step_ms_p95": 19.2,  # linear between 12 and 20
    "layers_ms": 9.0,
    "head_ms": 3.0,
    "encode_ms": 30.0,
    "encode_ms_per_canvas": 30.0,
    "steps_per_canvas": 1.5,
    "accepted_per_step": 34 / 3,
    "tokens_per_forward": 11.0,
    "tokens_per_s": 66.0,
    "tokens_per_s_with_padding": 80.0,
    "exact_match": 0.6,
    "exact_match_sudoku": 0.5,
    "exact_match_sort": 1.0,
    "exact_match_add": 0.5,
    "answer_tokens_per_s": 140.0,  # 21 in 0.15 s
    "answer_first_text_ms": 14.0,
    "answer_ms": 50.0,
    "answer_tokens_per_forward": 1.05,  # 21 in 20 steps
    "forwards_per_answer": 8.0,
    "charge_per_answer_uah": 700 * 50 / 3600,
    "peak_rss_bytes": 5000.0,
    "peak_pss_bytes": 3900.0,
    "anonymous_bytes": 1500.0,
    "file_bytes": 2500.0,
    "peak_swap_bytes": 7.0,
    "major_faults": 12.0,
    "major_faults_cold": 12.0,
    "kept_weights_bytes": 700.0,
    "streamed_pass_bytes": 250.0,
    "storage_bytes_per_token": 200.0,
    "streaming_stall": 0.05,
    "hottest_before_c": 31.0,
    "hottest_during_c": 44.0,
    "hottest_after_c": 41.0,
    "clock_mhz": 1800.0,
    "load_before": 1.75,
    "battery_level_percent": 80.0,
    "battery_current_ma": -700.0,
    "delegated_operators": 35.0,
    "portable_operators": 10.0,
}


def record(pass_: str) -> dict[str, Any]:
    """A record whose numbers are those above; a hotter zone is no CPU's."""
    return {
        "status": "ok",
        "pass": pass_,
        "result": copy.deepcopy(
            RESULT | {"answers": ANSWERS if pass_ == "puzzles" else [ANSWER]}
        ),
        "memory": [
            {"t_ms": 10, "rss_bytes": 4000, "pss_bytes": 3900, "anonymous_bytes": 1500,
             "file_bytes": 2500, "swap_bytes": 0},
            {"t_ms": 20, "rss_bytes": 2000, "pss_bytes": None, "anonymous_bytes": 1900,
             "file_bytes": 100, "swap_bytes": 0},
        ],
        "sensors": [
            {"t_s": 0.0, "phase": phase, "temperature_c": {"cpu-0": heat, "battery": 90.0},
             "cpu_mhz": {"cpu0": clock / 2, "cpu1": clock},
             "battery": {"level_percent": level, "current_ma": current, "status": "discharging"},
             "load_1m": {"before": 1.75, "during": None, "after": 2.5}[phase]}
            for phase, heat, clock, level, current in SENSORS
        ],
        "puzzles": [
            {"kind": kind, "prompt": f"{kind} {number}", "is_exact": is_exact}
            for number, (kind, is_exact) in enumerate(
                [("sudoku", True), ("sudoku", False), ("sort", True), ("add", False), ("add", True)]
            )
        ],
    }  # fmt: skip


def test_every_formula_against_numbers_worked_out_by_hand():
    assert EXPECTED.keys() == BY_NAME.keys()
    for metric in METRICS:
        found = compute(record(metric.pass_))[metric.name]
        assert found == pytest.approx(EXPECTED[metric.name], rel=1e-12), metric.name


@pytest.mark.parametrize("pass_", PASSES)
def test_a_metric_is_taken_from_its_passes_only(pass_):
    given_names = {name for name, found in compute(record(pass_)).items() if found is not None}
    assert given_names == {metric.name for metric in METRICS if pass_ == metric.pass_}


def test_no_charge_is_told_while_charging():
    found = record("puzzles")
    found["sensors"][3]["battery"]["status"] = "charging"
    assert compute(found)["charge_per_answer_uah"] is None


def test_the_interval_of_exact_match_is_wilsons():
    from scipy.stats import binomtest

    expected = binomtest(3, 5).proportion_ci(0.95, method="wilson")
    found = share_interval(trials(record("puzzles")))
    assert found == pytest.approx((expected.low, expected.high))
    assert share_interval([]) is None


def test_forced_steps_give_no_yield():
    assert compute(record("speed"))["tokens_per_s"] is None
    assert compute(record("memory"))["step_ms"] is None, "sampling makes steps slower"


def test_a_failed_run_has_no_metrics():
    failed = record("speed") | {"status": "failed"}
    assert set(compute(failed).values()) == {None}


@pytest.mark.parametrize("resident", [0.051, 1.0, None])
def test_a_load_that_was_not_cold_is_no_cold_load(resident):
    found = record("cold")
    found["result"]["cold"]["resident_after"] = resident
    assert compute(found)["load_cold_ms"] is None


def test_one_canvas_has_no_commit_time():
    found = record("speed")
    del found["result"]["answers"][0]["canvases"][1]
    assert compute(found)["encode_ms_per_canvas"] is None


def test_battery_without_a_current():
    found = record("speed")
    for sample in found["sensors"]:
        sample["battery"] = None
    assert compute(found)["battery_level_percent"] is None
    assert compute(found)["battery_current_ma"] is None


def test_no_cpu_zone_by_name_takes_the_hottest_zone():
    assert hottest({"temperature_c": {"zone-a": 30.0, "zone-b": 50.0}}) == 50.0
    assert hottest({"temperature_c": {}}) is None


def test_percentiles_are_those_of_numpy_and_scipy():
    from scipy.stats import scoreatpercentile

    values = list(np.random.default_rng(0).lognormal(size=37))
    for percent in (5, 50, 95):
        assert percentile(values, percent) == np.percentile(values, percent)
        assert percentile(values, percent) == pytest.approx(
            float(scoreatpercentile(values, percent)), rel=1e-12
        )
    assert percentile([], 50) is None


# What a device may send where a number, a list or an object belongs.
_JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def _paths(value: Any, path: tuple = ()) -> list[tuple]:
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path] * bool(path) + [
        below for key, child in children for below in _paths(child, (*path, key))
    ]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_junk_in_a_record_raises_or_gives_what_is_not_a_number(data):
    found = record(data.draw(st.sampled_from(PASSES)))
    places = [path for path in _paths(found) if path not in {("status",), ("pass",)}]
    for _ in range(3):
        *above, last = data.draw(st.sampled_from(places))
        target: Any = found
        try:
            for key in above:
                target = target[key]
            target[last] = data.draw(_JUNK)
        except (TypeError, KeyError, IndexError):
            continue  # an earlier draw replaced what was above
    numbers = compute(found)
    assert numbers.keys() == BY_NAME.keys()
    assert all(number is None or math.isfinite(number) for number in numbers.values())
    json.dumps(numbers, allow_nan=False)


def test_the_sample_bench_gives_every_metric():
    given_names = {
        name
        for record in record_samples.bench(puzzles=1)
        for name, number in record["metrics"].items()
        if number is not None
    }
    assert given_names == set(BY_NAME)


def test_names_are_unique_and_every_metric_is_explained():
    assert len(BY_NAME) == len(METRICS)
    for metric in METRICS:
        assert metric.formula and metric.title and metric.unit and metric.section
        assert metric.pass_ in PASSES


def test_the_document_has_the_table_of_the_metrics():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == metrics.with_table(text), (
        "docs/metrics.md is not up to date; "
        "run `python -m device_tests.results.metrics docs/metrics.md`"
    )


def test_every_cell_of_the_table_is_one_cell():
    lines = metrics.markdown_table().splitlines()
    assert len(lines) == len(METRICS) + 2
    assert {line.count("|") for line in lines} == {7}
