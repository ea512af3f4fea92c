"""Comparing two sets of runs: refusals by name, intervals of whole repeats, verdicts with proof."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from device_tests.results import compare_views as views
from device_tests.results.compare import AT_A_GLANCE, CompareRefused, compare
from device_tests.results.configuration import CONDITIONS, select
from device_tests.results.intervals import ratio_interval, share_ratio_interval
from device_tests.results.metrics import compute
from tests.support import record_samples
from tests.support.record_samples import HOSTILE, bench, change, has_control


def side(**options) -> list:
    """A bench with as many runs as a verdict asks for."""
    return bench(**({"speed": 6, "natural": 6} | options))


A = side()


def row(comparison, name):
    return next(found for found in comparison.rows if found.metric.name == name)


def test_a_set_against_itself_differs_in_nothing():
    found = compare(A, A)
    for each in found.rows:
        assert each.ratio is None or each.ratio == 1
        assert each.verdict in ("equal", "unclear", "not known")
        if each.interval is not None:
            assert each.interval[0] <= 1 <= each.interval[1]


def test_faster_steps_are_better_and_slower_ones_worse():
    fast = side(seed=1, step_ms=30.0)
    found = row(compare(A, fast), "step_ms")
    assert found.verdict == "better"
    assert found.ratio == found.b.median / found.a.median
    assert found.interval[0] <= found.ratio <= found.interval[1] < 1
    assert row(compare(A, fast), "tokens_per_s").verdict == "better", "more is better there"
    assert row(compare(fast, A), "step_ms").verdict == "worse"
    assert row(compare(fast, A), "tokens_per_s").verdict == "worse"


def test_the_median_is_over_repeats_and_not_over_steps():
    found = row(compare(A, A), "step_ms").a
    speed = [r for r in A if r["pass"] == "speed"]
    assert found.repeats == tuple(r["metrics"]["step_ms"] for r in speed)
    assert found.median == np.median(found.repeats)


def test_the_interval_resamples_repeats():
    """With five repeats, all 5**5 resamples of a side can be listed: the exact bootstrap."""
    a, b = [10.0, 11.0, 12.0, 13.0, 15.0], [20.0, 21.0, 23.0, 26.0, 30.0]
    grid = np.stack(np.meshgrid(*[range(5)] * 5), -1).reshape(-1, 5)
    medians_a = np.median(np.asarray(a)[grid], axis=1)
    medians_b = np.median(np.asarray(b)[grid], axis=1)
    ratios = (medians_b[:, None] / medians_a[None, :]).ravel()
    low, high = np.percentile(ratios, [2.5, 97.5])
    found = ratio_interval(a, b)
    # 9999 resamples know a probability of 2.5 % to about 0.16 %; the ratios are discrete, so the
    # interval may end at a neighbouring one, at most 5 % away here.
    assert found == pytest.approx((low, high), rel=0.05)
    assert found == ratio_interval(a, b), "the seed is fixed"


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Normal noise, 8 repeats a side, true ratio 1; 80 experiments, of which 95 % +- 5 % binomial
    noise and the known shortfall of a percentile interval of few leave at least 85 %."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(80):
        low, high = ratio_interval(random.normal(100, 5, 8), random.normal(100, 5, 8))
        held += low <= 1 <= high
    assert held >= 68


@pytest.mark.parametrize("repeats", [1, 2])
def test_too_few_repeats_have_a_ratio_and_no_verdict(repeats):
    found = row(compare(A, side(seed=1, step_ms=10.0, speed=repeats)), "step_ms")
    assert found.ratio == pytest.approx(0.25, rel=0.1)
    assert found.interval is None and found.verdict == "not known" and found.why == "too few runs"


@pytest.mark.parametrize(("repeats", "verdict"), [(3, "unclear"), (5, "unclear"), (6, "better")])
def test_a_verdict_asks_for_six_runs_of_each_side(repeats, verdict):
    fast = side(seed=1, step_ms=10.0)
    few = side(speed=repeats)
    for a, b, expected in ((few, fast, verdict), (fast, few, verdict.replace("better", "worse"))):
        comparison = compare(a, b)
        found = row(comparison, "step_ms")
        assert found.interval is not None and not found.interval[0] <= 1 <= found.interval[1]
        assert found.verdict == expected
        notes = [note for note in comparison.notes if "fewer than 6 runs" in note]
        assert len(notes) == (repeats < 6)
        assert all(f"(here {repeats})" in note for note in notes)


def test_what_never_varies_needs_no_six_runs():
    """A count is no sample of a noise."""
    other = side(speed=3)
    for record in other:
        if record["pass"] == "speed":
            record["result"]["delegation"]["layers"]["portable"] = 1000
            record["metrics"] = compute(record)
    found = row(compare(side(speed=3), other), "portable_operators")
    assert found.interval[0] == found.interval[1] == found.ratio > 1
    assert found.verdict == "worse"


def test_the_load_of_the_device_is_set_side_by_side():
    busy = side(seed=1)
    for records, load in ((A, 0.5), (busy, 4.0)):
        for record in records:
            for sample in record["sensors"]:
                sample["load_1m"] = load if sample["phase"] == "before" else None
    found = row(compare(A, busy), "load_before")
    assert (found.a.median, found.b.median, found.verdict) == (0.5, 4.0, "higher")


def test_no_ratio_of_temperatures_and_of_zero():
    found = compare(A, A)
    assert row(found, "hottest_during_c").ratio is None
    assert row(found, "battery_current_ma").ratio is None
    assert row(found, "peak_swap_bytes").ratio is None
    assert row(found, "peak_swap_bytes").why == "all are 0"


def test_a_metric_of_one_side_only_is_shown_without_a_ratio():
    found = row(compare(A, side(has_sensors=True)[:-1]), "peak_rss_bytes")
    assert (found.b.repeats, found.ratio, found.why) == ((), None, "B has no number")


DIFFERENT = [
    ("device", "conditions.device.serial", "OTHER"),
    ("device", "conditions.device.memory_bytes", 1),
    ("build", "conditions.device.kernel", "7.0"),
    ("clocks", "conditions.clocks.governor", {"cpu0": "performance"}),
    ("clocks", "conditions.clocks.limits_mhz", None),
    ("charging", "conditions.charging", False),
    ("transport", "conditions.transport", "tcp"),
    ("polling", "conditions.poll_s", 0.25),
    ("threads", "conditions.threads", 4),
    ("bundle", "conditions.bundle.sha256", "cd" * 32),
    ("workload", "conditions.workload.seed", 7),
    ("workload", "conditions.workload.max_new_tokens", 60),
    ("versions", "conditions.versions.executorch", "9.9"),
    ("gate", "gate.threshold_c", 39.0),
]


@pytest.mark.parametrize(("name", "path", "value"), DIFFERENT)
def test_another_condition_is_refused_with_both_values_unless_named(name, path, value):
    other = change(A, path, value)
    with pytest.raises(CompareRefused, match=name) as refused:
        compare(A, other)
    old = A[0]
    for key in path.split("."):
        old = old[key]
    if isinstance(old, (str, int)) and not isinstance(old, bool) and name != "device":
        assert str(old) in str(refused.value) and str(value) in str(refused.value)
    found = compare(A, other, across=(name,))
    assert [difference.leaf.split(".")[0] for difference in found.differences] == [name]
    wrong = "threads" if name != "threads" else "bundle"
    with pytest.raises(CompareRefused, match=name):
        compare(A, other, across=(wrong,))


def test_every_condition_can_be_refused():
    assert {name for name, _, _ in DIFFERENT} == set(CONDITIONS)


def test_all_differing_conditions_are_named_at_once():
    other = change(change(A, "conditions.threads", 4), "conditions.charging", False)
    with pytest.raises(
        CompareRefused, match=r"charging is yes in A and no in B.*threads is 2 in A"
    ):
        compare(A, other)


def test_a_side_under_two_conditions_is_refused_until_one_is_chosen():
    both = [*A, *side(threads=4, bench_id="bench-2")]
    with pytest.raises(CompareRefused, match="threads is 2 or 4 in A and 2 in B"):
        compare(both, A)
    assert compare(select(both, threads=2), A).runs == (len(A), len(A))
    assert len(select(both, bundle="abab")) == len(both)
    assert select(both, bundle="cd") == []


def test_one_governor_in_the_middle_of_a_side_is_refused():
    other = copy.deepcopy(A)
    other[4]["conditions"]["clocks"]["governor"]["cpu0"] = "powersave"
    with pytest.raises(CompareRefused, match=r"clocks.governor"):
        compare(A, other)


def test_passes_have_their_own_workload():
    with pytest.raises(CompareRefused, match=r"workload.force_steps is 8 in A and 16 in B"):
        compare(A, side(steps=16))
    natural = [r for r in side(steps=16) if r["pass"] == "natural"]
    assert row(compare(A, natural), "tokens_per_s").ratio is not None


def test_unknown_names_and_empty_sides_are_refused():
    with pytest.raises(CompareRefused, match="tread is no condition"):
        compare(A, A, across=("tread",))
    with pytest.raises(CompareRefused, match="B has no runs"):
        compare(A, [])
    with pytest.raises(CompareRefused, match="in common"):
        compare(A[:1], A[-1:])


def test_failures_are_counted_on_both_sides_and_listed():
    found = compare(A, side(with_failure=True))
    assert found.failed == (0, 1)
    assert (row(found, "step_ms").a.failed, row(found, "step_ms").b.failed) == (0, 1)
    assert "1 failed" in views.to_text(found) and "1 failed" in views.to_markdown(found)
    document = views.to_json(found)
    assert (document["b"]["failed"], document["metrics"]["step_ms"]["b_failed"]) == (1, 1)
    (failure,) = document["failures"]
    assert (failure["side"], failure["run"]) == ("B", "speed 2")
    assert failure["sentence"] == record_samples.FAILURE["sentence"]
    assert "the kernel killed the runner" in views.to_text(found)


def test_json_is_finite_and_text_fits_a_terminal():
    found = compare(A, side(seed=1), across=())
    json.dumps(views.to_json(found), allow_nan=False)
    assert all(len(line) <= 100 for line in views.to_text(found).splitlines())
    metrics = views.to_json(found)["metrics"]["step_ms"]
    assert len(metrics["a_repeats"]) == 6 and len(metrics["interval"]) == 2


def test_hostile_conditions_are_inert():
    hostile = record_samples.hostile_bench()
    with pytest.raises(CompareRefused) as refused:
        compare(A, hostile)
    assert not has_control(str(refused.value))
    found = compare(A, hostile, across=tuple(CONDITIONS))
    for shown in (views.to_text(found), views.to_markdown(found)):
        assert not has_control(shown) and HOSTILE not in shown
    assert "<script" not in views.to_markdown(found)


def test_a_mixed_side_is_refused_even_where_the_sides_may_differ() -> None:
    """Two thread counts in one median would be a number of neither."""
    mixed = side()
    for record in side():
        record["conditions"]["threads"] = 7
        mixed.append(record)
    with pytest.raises(CompareRefused, match=r"threads is .* or 7"):
        compare(mixed, side(), across=("threads",))


# Over families.

AUTOREGRESSIVE = {
    "sha256": "cd" * 32, "name": "twin", "family": "qwen3", "style": "autoregressive",
    "recipe": "int4-g32", "backend": "xnnpack", "bytes": 1_610_000,
}  # fmt: skip
WITH_PUZZLES = side(puzzles=3)


def twin(right: int | None = None, **workload) -> list:
    """The bench of an autoregressive model; `right` of its thirty answers are right."""
    found = copy.deepcopy(side(puzzles=3, seed=1, step_ms=4.0))
    for record in found:
        record["conditions"]["bundle"] = AUTOREGRESSIVE
        record["conditions"]["workload"] |= {"max_new_tokens": 64} | workload
        if record["conditions"]["workload"]["force_steps"] is not None:
            record["conditions"]["workload"]["force_steps"] = 1
        for number, puzzle in enumerate(record.get("puzzles", ())):
            puzzle["is_exact"] = puzzle["is_exact"] if right is None else number < right
    return found


@pytest.mark.parametrize("across", [(), ("bundle",)])
def test_two_styles_are_refused_and_the_way_is_named(across):
    with pytest.raises(CompareRefused, match="`--across family`"):
        compare(WITH_PUZZLES, twin(), across)


def test_across_family_lets_differ_what_follows_from_the_style_and_nothing_else():
    found = compare(WITH_PUZZLES, twin(), ["family"])
    leaves = {each.leaf.partition(".")[0] for each in found.differences}
    assert leaves == {"bundle", "workload"}
    with pytest.raises(CompareRefused, match=r"workload\.seed .*`--across family,workload`"):
        compare(WITH_PUZZLES, twin(seed=7), ["family"])
    other = change(twin(), "conditions.threads", 4)
    with pytest.raises(CompareRefused, match="`--across family,threads`"):
        compare(WITH_PUZZLES, other, ["family"])


def test_a_step_of_one_style_is_never_set_against_that_of_another():
    found = compare(WITH_PUZZLES, twin(), ["family"])
    steps = [each for each in found.rows if each.metric.name == "step_ms"]
    assert [(each.title, bool(each.a.repeats), bool(each.b.repeats)) for each in steps] == [
        ("Denoising step (uniform)", True, False),
        ("Token", False, True),
    ]
    for each in found.rows:
        if each.metric.is_of_style:
            assert each.ratio is None and each.verdict == "not known"
    for name in ("answer_tokens_per_s", "answer_first_text_ms", "answer_ms", "exact_match",
                 "load_warm_ms", "peak_rss_bytes", "peak_pss_bytes"):  # fmt: skip
        assert row(found, name).ratio is not None, name
    names = [each.name for each in found.rows]
    assert len(set(names)) == len(names)


def test_canvases_of_two_lengths_are_not_the_same_thing():
    longer = copy.deepcopy(twin())
    for record in longer:
        record["conditions"]["bundle"] = AUTOREGRESSIVE | {"style": "uniform_diffusion"}
        for answer in record["result"]["answers"]:
            for canvas in answer["canvases"]:
                canvas["tokens"] = canvas["tokens"] * 2
    found = compare(WITH_PUZZLES, longer, ["family"])
    titles = [each.title for each in found.rows if each.metric.name == "step_ms"]
    assert titles == ["Denoising step (uniform, canvas of 20)",
                      "Denoising step (uniform, canvas of 40)"]  # fmt: skip


def test_exact_match_resamples_puzzles_and_not_runs():
    found = row(compare(WITH_PUZZLES, twin(right=5), ["family"]), "exact_match")
    assert (found.a.median, found.b.median) == (0.7, 5 / 30)
    assert found.interval[0] < found.ratio < found.interval[1] < 1 and found.verdict == "worse"
    assert found.a.interval[0] < 0.7 < found.a.interval[1]
    nearly = row(compare(WITH_PUZZLES, twin(right=20), ["family"]), "exact_match")
    assert nearly.verdict == "unclear", "20 of 30 against 21 of 30"
    same = row(compare(WITH_PUZZLES, twin(), ["family"]), "exact_match")
    assert same.verdict == "equal"


def test_the_paired_interval_is_scipys():
    from scipy.stats import bootstrap

    random = np.random.default_rng(3)
    a = random.random(80) < 0.7
    b = np.where(random.random(80) < 0.8, a, ~a)
    expected = bootstrap(
        (a.astype(float), b.astype(float)), lambda one, other: other.mean() / one.mean(),
        paired=True, vectorized=False, n_resamples=9999, method="percentile", rng=random,
    ).confidence_interval  # fmt: skip
    # 9999 resamples know the end of an interval to about 2 % of its length.
    assert share_ratio_interval(a, b) == pytest.approx(tuple(expected), abs=0.02)


def test_other_puzzles_have_no_interval():
    other = twin()
    for record in other:
        for puzzle in record.get("puzzles", ()):
            puzzle["prompt"] += "0"
    found = row(compare(WITH_PUZZLES, other, ["family"]), "exact_match")
    assert found.interval is None and found.why == "other puzzles"


def test_where_no_battery_tells_of_energy_a_note_says_so():
    """Only where whole answers were measured: energy is told of them."""
    charging = [copy.deepcopy(WITH_PUZZLES), twin()]
    for records in charging:
        for record in records:
            for sample in record["sensors"]:
                sample["battery"]["status"] = "charging"
    for sides, is_told in (
        ((WITH_PUZZLES, twin()), False), (charging, True), ((side(), side()), False),
    ):  # fmt: skip
        notes = compare(*sides, ["family"]).notes
        assert any("energy is not known" in note for note in notes) == is_told


def test_of_families_what_decides_between_them_comes_first_and_every_row_once():
    found = compare(WITH_PUZZLES, twin(), ["family"])
    (title, first), (_, others) = found.groups
    assert title == "at a glance"
    assert tuple(each.metric.name for each in first) == AT_A_GLANCE
    assert sorted(each.name for each in (*first, *others)) == sorted(row.name for row in found.rows)
    for text in (views.to_text(found), views.to_markdown(found).lower()):
        assert text.index("at a glance") < text.index("hole answer") < text.index("everything")
    assert compare(side(), side()).groups[0][0] == ""


def test_each_side_says_what_it_is():
    found = compare(WITH_PUZZLES, twin(), ["family"])
    assert "A: int4, diffusion_gemma, uniform_diffusion, 0.8 MiB, int4-g32" in views.to_text(found)
    assert "- **B**: twin, qwen3, autoregressive, 1.5 MiB, int4-g32" in views.to_markdown(found)
    document = json.loads(json.dumps(views.to_json(found), allow_nan=False))
    assert document["b"]["bundle"] == AUTOREGRESSIVE
    assert document["metrics"]["exact_match"]["a_count"] == 30
    assert document["metrics"]["step_ms, autoregressive"]["a"] is None
