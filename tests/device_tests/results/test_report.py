"""The report as text, Markdown and JSON: right numbers, nothing dropped, nothing hostile alive."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from markdown_it import MarkdownIt

from device_tests.results import report
from device_tests.results.configuration import configurations, device_serial
from device_tests.results.plain_text import condition, markdown, plain, quantity
from device_tests.results.record_fields import step_times
from device_tests.results.summary import summarize
from tests.support import record_samples
from tests.support.record_samples import FAILURE, HOSTILE, bench, change, has_control, run


def quantity_of(records, name):
    (group,) = summarize(records).groups
    return next(found for found in group.quantities if found.metric.name == name)


def test_a_metric_over_repeats_is_their_median_and_linear_percentiles():
    records = bench()
    loads = [r["result"]["load_ms"] for r in records if r["pass"] == "speed"]
    found = quantity_of(records, "load_warm_ms")
    assert found.median == np.median(loads)
    assert (found.p5, found.p95) == (np.percentile(loads, 5), np.percentile(loads, 95))
    assert [repeat.value for repeat in found.repeats] == loads


def test_steps_are_put_together_and_each_repeat_is_kept():
    records = bench()
    speed = [r for r in records if r["pass"] == "speed"]
    pool = [ms for r in speed for ms in step_times(r)]
    found = quantity_of(records, "step_ms")
    assert (found.median, found.steps) == (np.median(pool), len(pool))
    assert (found.p5, found.p95) == (np.percentile(pool, 5), np.percentile(pool, 95))
    assert [each.value for each in found.repeats] == [np.median(step_times(r)) for r in speed]
    assert quantity_of(records, "step_ms_p95").median == np.percentile(pool, 95)


def test_failures_are_counted_beside_and_their_numbers_are_not_taken():
    good, mixed = bench(), bench(with_failure=True)
    assert quantity_of(mixed, "step_ms").median == quantity_of(good, "step_ms").median
    assert quantity_of(mixed, "step_ms").failed == 1
    assert quantity_of(mixed, "tokens_per_s").failed == 0, "of another pass"
    summary = summarize(mixed)
    assert (summary.runs, summary.failed) == (12, 1)
    for shown in (
        report.to_text(summary),
        report.to_markdown(summary),
        json.dumps(report.to_json(summary)),
    ):
        assert "oom" in shown and FAILURE["sentence"][:20] in shown.replace("\\", "")


def test_only_failures_make_a_report_too():
    records = [run("speed", repeat, failure=FAILURE) for repeat in range(3)]
    for record in records:
        record["conditions"]["versions"] = {}
    summary = summarize(records)
    assert summary.failed == 3
    assert report.to_text(summary).count("out_of_memory") == 3
    assert report.to_json(summary)["configurations"][0]["metrics"] == {}


def test_no_runs_make_an_empty_report():
    summary = summarize([])
    assert "0 runs" in report.to_text(summary)
    assert report.to_json(summary)["configurations"] == []


def test_json_is_compact_exact_and_finite():
    document = report.to_json(summarize(bench(with_failure=True)))
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    assert "\n" not in text
    metrics = json.loads(text)["configurations"][0]["metrics"]
    assert metrics["peak_rss_bytes"]["median"] == 271 * 2**20 + 4096
    assert len(metrics["step_ms"]["repeats"]) == 5


def test_bytes_are_mebibytes_for_people():
    assert "271.0 MiB" in report.to_text(summarize(bench()))


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (None, "ms", "-"),
        (12345.6, "ms", "12.35 s"),
        (1234.5, "ms", "1,234 ms"),
        (123.45, "ms", "123.5 ms"),
        (1.234, "ms", "1.23 ms"),
        (0.01234, "ms", "0.012 ms"),
        (3.0, "faults", "3 faults"),
        (0.987, "share", "98.7 %"),
        (1536 * 1024, "bytes", "1.5 MiB"),
    ],
)
def test_numbers_have_units(value, unit, shown):
    assert quantity(value, unit) == shown


# Configurations


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("conditions.threads", 4),
        ("conditions.bundle.sha256", "cd" * 32),
        ("conditions.device.serial", "OTHER"),
        ("conditions.device.build", "newer"),
        ("conditions.transport", "tcp"),
        ("conditions.poll_s", 0.5),
        ("conditions.workload.seed", 1),
        ("conditions.workload.settings", {"t_min": 0.1}),
        ("conditions.versions.executorch", "1.6.0"),
        ("gate.threshold_c", 40.0),
    ],
)
def test_other_conditions_are_another_configuration(path, value):
    records = bench(speed=1, natural=1)
    assert len(configurations([*records, *change(records, path, value)])) == 2


def test_all_passes_of_a_bench_are_one_configuration():
    (found,) = configurations(bench(with_failure=True))
    assert len(found.records) == 12
    assert found.leaves["workload.prompt_tokens"] == 64
    assert found.leaves["workload in the natural pass.prompt_text"] == "sort 3 1 2"


def test_two_numbers_of_forced_steps_are_two_configurations_with_their_natural_runs():
    one, other = bench(steps=8), bench(steps=16, bench_id="bench-2")
    found = configurations([*one, *other])
    assert [len(each.records) for each in found] == [len(one), len(other)]


def test_a_run_that_failed_early_stays_with_its_configuration():
    failed = run("speed", 1, failure=FAILURE)
    failed["conditions"]["versions"] = {"pocket_diffusion": "0.1.0"}
    for records in ([failed, *bench()], [*bench(), failed]):
        (found,) = configurations(records)
        assert failed in found.records


def test_clocks_that_changed_on_the_way_are_told():
    records = bench()
    records[4]["conditions"]["clocks"]["limits_mhz"]["cpu7"] = [500, 2000]
    records[5]["conditions"]["charging"] = False
    (group,) = summarize(records).groups
    notes = " ".join(group.notes)
    assert "clocks.limits_mhz was not the same" in notes and "charging was not the same" in notes


def test_threads_that_the_runtime_chose_are_told():
    (group,) = summarize(bench(threads=None)).groups
    assert "the runtime chose its threads: 2" in group.notes
    assert group.title.endswith("runtime's choice of threads")


@pytest.mark.parametrize(
    ("leaf", "value", "shown"),
    [
        ("threads", None, "the runtime's choice"),
        ("charging", None, "not told"),
        ("charging", False, "no"),
        ("polling.poll_s", 0.5, "0.5 s"),
        ("gate.threshold_c", 45.0, "45 °C"),
        ("workload.seed", 2**64 - 1, "18446744073709551615"),
        ("workload.settings", {"t_min": 0.1}, "t_min 0.1"),
        ("device.memory_bytes", 2**20, "1,048,576 bytes (1.0 MiB)"),
        ("clocks.governor", {"cpu0": "walt", "cpu1": "walt", "cpu2": "off"},
         "walt: cpu0, cpu1; off: cpu2"),
        ("clocks.limits_mhz", {"cpu0": [300, 2200.5]}, "300 to 2200.5 MHz: cpu0"),
    ],
)  # fmt: skip
def test_conditions_for_people(leaf, value, shown):
    assert condition(leaf, value) == shown


def test_no_thermal_sensor_is_told():
    text = report.to_text(summarize(bench(has_sensors=False)))
    assert "shows no CPU temperature" in text.replace("\n", " ")


def test_a_cold_load_that_was_not_cold_is_told():
    records = bench()
    records[0]["result"]["cold"]["resident_after"] = 0.9
    (group,) = summarize(records).groups
    assert any("not cold" in note for note in group.notes)
    assert quantity_of(records, "load_cold_ms").median is None


@pytest.mark.parametrize(
    ("serial", "same"),
    [
        ("127.0.0.1:45321", "127.0.0.1"),
        ("192.168.1.7:5555", "192.168.1.7"),
        ("R58M123ABC", "R58M123ABC"),
        ("usb:1-4", "usb:1-4"),
    ],
)
def test_a_device_on_the_network_is_the_same_on_another_port(serial, same):
    assert device_serial(serial) == same


# What a device may say


def test_hostile_text_in_a_terminal():
    text = report.to_text(summarize(record_samples.hostile_bench()))
    assert not has_control(text)
    assert "[bold red]h[/]" in text.replace("\n", ""), "markup is shown, not followed"
    assert all(len(line) <= 100 for line in text.splitlines())


def test_hostile_text_in_json():
    text = json.dumps(report.to_json(summarize(record_samples.hostile_bench())), ensure_ascii=False)
    assert not has_control(text)


def test_hostile_text_in_markdown():
    text = report.to_markdown(summarize(record_samples.hostile_bench()))
    assert not has_control(text)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    flat = [child for token in tokens for child in [token, *(token.children or ())]]
    assert not {token.type for token in flat} & {
        "html_block", "html_inline", "code_inline", "link_open", "image", "em_open",
    }  # fmt: skip
    assert "strong_open" not in {token.type for token in flat}, "no notes, so nothing is bold"
    widths: dict[int, set[int]] = {}
    row = 0
    for token in tokens:  # every row of a table as wide as its head
        if token.type == "table_open":
            row += 1
        elif token.type == "tr_open":
            cells = 0
        elif token.type in ("td_open", "th_open"):
            cells += 1
        elif token.type == "tr_close":
            widths.setdefault(row, set()).add(cells)
    assert row == 4 and all(len(found) == 1 for found in widths.values())


@pytest.mark.parametrize("text", [HOSTILE, "a|b", "a\\|b", "**x** _y_ ~~z~~", "![i](http://x)"])
def test_markdown_shows_text_as_it_is(text):
    rendered = (
        MarkdownIt("commonmark", {"html": True})
        .enable("table")
        .render(f"| h |\n|---|\n| {markdown(text)} |\n")
    )
    (cell,) = re.findall(r"<td>(.*?)</td>", rendered, re.DOTALL)
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        cell = cell.replace(entity, character)
    assert cell == plain(text).strip()


def test_plain_text_cuts_and_escapes():
    assert plain("a\nb\x1b[0m\u202e") == "a\\nb\\x1b[0m\\u202e"
    assert plain("é 漢 °C") == "é 漢 °C"
    assert len(plain("x" * 10_000)) == 301


def test_of_an_autoregressive_bundle_a_step_is_a_token():
    records = bench()
    for record in records:
        record["conditions"]["bundle"]["style"] = "autoregressive"
    (group,) = summarize(records).groups
    titles = {found.metric.name: found.title for found in group.quantities}
    assert titles["step_ms"] == "Token" and titles["first_draft_ms"] == "Time to first token"
    assert "accepted_per_step" not in titles, "says nothing of single tokens"
    summary = summarize(records)
    for shown in (report.to_text(summary), report.to_markdown(summary), report.to_html(summary)):
        assert "Denoising step" not in shown and "Token" in shown
