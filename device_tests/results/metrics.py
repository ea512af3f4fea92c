"""The metrics of a benchmark: each defined once, as a formula in words and a pure function.

How the numbers come about is `docs/metrics.md`; what several repeats say together is `summary.py`.
A new metric is one entry of METRICS.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from device_tests.results.metric_formulas import (
    COLD_RESIDENT_LIMIT,
    Compute,
    accepted_per_step,
    answers_tokens_per_forward,
    answers_tokens_per_s,
    at,
    at_largest_rss,
    battery_current,
    charge_per_answer,
    forwards_per_answer,
    largest,
    last_sensed,
    load_cold,
    median_at,
    median_sensed,
    operators,
    per_canvas,
    quotient,
    sensed,
    steps_per_canvas,
    tokens_per_forward,
    tokens_per_s_with_padding,
)
from device_tests.results.record_fields import (
    Record,
    as_number,
    fastest,
    hottest,
    number,
    numbers,
    percentile,
    ratio,
    step_times,
    trials,
)
from device_tests.results.records import Pass
from device_tests.results.tables import Table
from export.contract.styles import STYLES
from export.host.puzzles import KINDS
from quantize.errors import OutputError

Direction = Literal["lower", "higher", "none"]
Trials = list[tuple[str, bool]]


@dataclass(frozen=True)
class Metric:
    """One number of one run.

    `formula` is over the fields of the record; `pass_` is the pass it is taken from, and in every
    other pass it is None. `direction` says which way is better. It is computed in one of three
    ways. compute: the number of one record, or None where the record does not have it. pool: the
    steps of one record, of which the number is the `percent`th percentile, so that the steps of all
    repeats can be put together. trials: what it is the share of: prompts, and whether the answer is
    right. token_title: given where what is counted is another thing for each style of generation
    and length of canvas, so that the numbers of two must not be set against each other; it is what
    the metric is called where a step is one token, "" where it says nothing there.
    """

    name: str
    unit: str
    title: str
    pass_: Pass
    formula: str
    compute: Compute | None = None
    direction: Direction = "lower"
    pool: Callable[[Record], list[float]] | None = None
    percent: float = 50.0
    trials: Callable[[Record], Trials] | None = None
    token_title: str | None = None
    section: str = ""

    @property
    def is_of_style(self) -> bool:
        """Whether it counts another thing in each style of generation."""
        return self.token_title is not None

    def title_in(self, style: str) -> str | None:
        """What a person reads in a style of generation; None where the metric says nothing."""
        if self.is_of_style and style in STYLES and STYLES[style].step_is_token:
            return self.token_title or None
        return self.title


def compute(record: Record) -> dict[str, float | None]:
    """Every metric of one record by its name; None where the run, or its pass, does not have it.

    A run that failed has no metrics: all are None.
    """
    return {metric.name: value(metric, record) for metric in METRICS}


def value(metric: Metric, record: Record) -> float | None:
    """One metric of one record, finite or None."""
    if record.get("status") != "ok" or record.get("pass") != metric.pass_:
        return None
    if metric.pool is not None:
        return as_number(percentile(metric.pool(record), metric.percent))
    if metric.trials is not None:
        found = metric.trials(record)
        return ratio(sum(is_exact for _, is_exact in found), len(found))
    return None if metric.compute is None else as_number(metric.compute(record))


def pooled_steps(metric: Metric, records: Iterable[Record]) -> list[float]:
    """The steps of all records that the metric is taken from, one after the other."""
    if metric.pool is None:
        return []
    return [
        step
        for record in records
        if value(metric, record) is not None
        for step in metric.pool(record)
    ]


def _section(title: str, *metrics: Metric) -> tuple[Metric, ...]:
    return tuple(dataclasses.replace(metric, section=title) for metric in metrics)


# fmt: off
METRICS: tuple[Metric, ...] = (
    *_section(
        "Time to load",
        Metric("load_cold_ms", "ms", "Load, cold", "cold",
            "result.load_ms of a run whose bundle was dropped from the page cache before loading; "
            f"only if result.cold.resident_after <= {COLD_RESIDENT_LIMIT}", load_cold),
        Metric("cold_resident_share", "share", "In page cache at cold load", "cold",
            "result.cold.resident_after: pages of the bundle's files that mincore finds in the "
            "page cache after the drop, by all their pages (0 to 1)",
            at("result.cold.resident_after")),
        Metric("load_warm_ms", "ms", "Load, warm", "speed",
            "result.load_ms of a run with the bundle in the page cache, left there by an earlier "
            "run", at("result.load_ms")),
    ),
    *_section(
        "Latency",
        Metric("prompt_ms", "ms", "Prompt encoded", "speed",
            "answer.prompt_ms: sum of the layers' time over the chunks of the prompt",
            at("answer.prompt_ms")),
        Metric("prefill_tokens_per_s", "tokens/s", "Prefill", "speed",
            "1000 * answer.prompt_tokens / answer.prompt_ms; the padding of the last chunk costs "
            "time and is not counted as tokens",
            quotient("answer.prompt_tokens", "answer.prompt_ms", 1000), "higher"),
        Metric("first_draft_ms", "ms", "Time to first draft", "speed",
            "answer.first_draft_ms: from the call to the end of the first denoising step, prompt "
            "included, loading excluded",
            at("answer.first_draft_ms"), token_title="Time to first token"),
        Metric("first_commit_ms", "ms", "Time to first committed text", "natural",
            "answer.first_commit_ms: from the call to the first canvas committed, prompt included, "
            "loading excluded; the sampler decides how many steps that takes",
            at("answer.first_commit_ms")),
    ),
    *_section(
        "Steps",
        Metric("step_ms", "ms", "Denoising step", "speed",
            "median over denoising steps of layers_ms + head_ms; over repeats: of the steps of all "
            "repeats put together", pool=step_times, token_title="Token"),
        Metric("step_ms_p5", "ms", "Denoising step, p5", "speed",
            "5th percentile of the same steps",
            pool=step_times, percent=5, token_title="Token, p5"),
        Metric("step_ms_p95", "ms", "Denoising step, p95", "speed",
            "95th percentile of the same steps",
            pool=step_times, percent=95, token_title="Token, p95"),
        Metric("layers_ms", "ms", "Layers of a step", "speed",
            "median over denoising steps of layers_ms",
            pool=partial(numbers, path="answer.canvases.steps.layers_ms"),
            token_title="Layers of a token"),
        Metric("head_ms", "ms", "Head of a step", "speed",
            "median over denoising steps of head_ms; the sampler is in it",
            pool=partial(numbers, path="answer.canvases.steps.head_ms"),
            token_title="Head of a token"),
        Metric("encode_ms", "ms", "Committed canvases encoded", "speed",
            "answer.encode_ms: sum of the layers' time over the chunks of committed canvases; the "
            "last canvas is never encoded, so it is 0 for one canvas",
            at("answer.encode_ms"), token_title=""),
        Metric("encode_ms_per_canvas", "ms", "Commit of a canvas", "speed",
            "answer.encode_ms / (canvases - 1); none for one canvas", per_canvas, token_title=""),
    ),
    *_section(
        "Yield",
        Metric("steps_per_canvas", "steps", "Steps per canvas", "natural",
            "denoising steps / canvases, the sampler's own stop", steps_per_canvas, token_title=""),
        Metric("accepted_per_step", "positions", "Accepted per step", "natural",
            "sum of accepted over denoising steps / denoising steps; a step accepts anew over the "
            "whole canvas, so a position may count in several steps",
            accepted_per_step, "higher", token_title=""),
        Metric("tokens_per_forward", "tokens", "Tokens per forward", "natural",
            "answer.new_tokens / denoising steps; new_tokens are committed tokens that are not "
            "padding, and encoding passes are not counted as steps", tokens_per_forward, "higher"),
        Metric("tokens_per_s", "tokens/s", "Tokens per second", "natural",
            "1000 * answer.new_tokens / answer.total_ms; total_ms is the whole call, prompt "
            "included, loading excluded",
            quotient("answer.new_tokens", "answer.total_ms", 1000), "higher"),
        Metric("tokens_per_s_with_padding", "tokens/s", "Tokens per second with padding", "natural",
            "1000 * committed tokens of all canvases, padding after the end included / "
            "answer.total_ms", tokens_per_s_with_padding, "higher", token_title=""),
    ),
    *_section(
        "Puzzles",
        Metric("exact_match", "share", "Exact match", "puzzles",
            "puzzles whose answer, white space around it apart, is exactly the right one / puzzles "
            "(0 to 1), over all kinds; with its 95 % Wilson interval",
            direction="higher", trials=trials),
        *(
            Metric(
                f"exact_match_{kind}", "share", f"Exact match, {kind}", "puzzles",
                f"the same over the puzzles of the kind {kind}",
                direction="higher", trials=partial(trials, kind=kind))
            for kind in KINDS
        ),
        Metric("answer_tokens_per_s", "tokens/s", "Tokens per second of answers", "puzzles",
            "1000 * sum of new_tokens / sum of total_ms over result.answers: committed tokens "
            "without padding, by the whole time of the calls, prompts included",
            answers_tokens_per_s, "higher"),
        Metric("answer_first_text_ms", "ms", "First text of an answer", "puzzles",
            "median over result.answers of first_commit_ms: from the call to the first text that "
            "stays (a canvas, a block, an autoregressive token), prompt included",
            median_at("result.answers.first_commit_ms")),
        Metric("answer_ms", "ms", "Whole answer", "puzzles",
            "median over result.answers of total_ms: from the call to the end of the text, prompt "
            "included, loading excluded", median_at("result.answers.total_ms")),
        Metric("answer_tokens_per_forward", "tokens", "Tokens per forward of answers", "puzzles",
            "sum of new_tokens / sum of steps over result.answers; as tokens_per_forward, encoding "
            "passes are not counted", answers_tokens_per_forward, "higher"),
        Metric("forwards_per_answer", "forwards", "Forwards per answer", "puzzles",
            "mean over result.answers of steps + encodings: every pass of the layers, those for "
            "the prompt and for committed canvases included; passes are of different lengths",
            forwards_per_answer, "none"),
        Metric("charge_per_answer_uah", "µAh", "Charge per answer", "puzzles",
            "median of the absolute current_ma during the run * mean total_ms of result.answers / "
            "3600; the whole device, screen included; none while it charges", charge_per_answer),
    ),
    *_section(
        "Memory",
        Metric("peak_rss_bytes", "bytes", "Peak RSS", "memory",
            "result.memory.peak_rss_bytes: VmHWM of /proc/self/status at the end of the run",
            at("result.memory.peak_rss_bytes")),
        Metric("peak_pss_bytes", "bytes", "Peak PSS", "memory",
            "largest pss_bytes of the memory samples; what rises and falls between two samples is "
            "not seen", largest("pss_bytes")),
        Metric("anonymous_bytes", "bytes", "Anonymous at the peak", "memory",
            "anonymous_bytes of the memory sample with the largest rss_bytes",
            at_largest_rss("anonymous_bytes")),
        Metric("file_bytes", "bytes", "File-backed at the peak", "memory",
            "file_bytes of the memory sample with the largest rss_bytes",
            at_largest_rss("file_bytes")),
        Metric("peak_swap_bytes", "bytes", "Peak swap", "memory",
            "largest swap_bytes of the memory samples; above 0, RSS and PSS say too little",
            largest("swap_bytes")),
        Metric("major_faults", "faults", "Major page faults", "memory",
            "result.memory.major_faults: page faults of the whole process that waited for storage",
            at("result.memory.major_faults")),
        Metric("major_faults_cold", "faults", "Major page faults, cold", "cold",
            "the same in the cold pass", at("result.memory.major_faults")),
        Metric("kept_weights_bytes", "bytes", "Weights kept in memory", "speed",
            "result.weights.kept_bytes: of the packed weights, within the memory budget",
            at("result.weights.kept_bytes"), "none"),
        Metric("streamed_pass_bytes", "bytes", "Weights read in a pass", "speed",
            "result.weights.pass_bytes: what each pass reads because the budget has no room for it",
            at("result.weights.pass_bytes")),
        Metric("storage_bytes_per_token", "bytes", "Read from storage per token", "natural",
            "result.weights.storage_bytes / answer.new_tokens: what the process had read from "
            "storage while it generated (read_bytes of /proc/self/io), with a memory budget",
            quotient("result.weights.storage_bytes", "answer.new_tokens")),
        Metric("streaming_stall", "share", "Time waiting for weights", "speed",
            "result.weights.streamed_stall_ms / answer.total_ms",
            quotient("result.weights.streamed_stall_ms", "answer.total_ms")),
    ),
    *_section(
        "Temperature and power",
        Metric("hottest_before_c", "°C", "Hottest sensor before", "speed",
            "hottest CPU sensor (hottest zone where none is named as one) in the last sensor "
            "sample before the run", last_sensed(hottest, "before"), "none"),
        Metric("hottest_during_c", "°C", "Hottest sensor during", "speed",
            "the same, maximum over the sensor samples during the run",
            lambda record: max(sensed(record, hottest, "during"), default=None), "none"),
        Metric("hottest_after_c", "°C", "Hottest sensor after", "speed",
            "the same in the first sensor sample after the run",
            lambda record: next(iter(sensed(record, hottest, "after")), None), "none"),
        Metric("clock_mhz", "MHz", "Clock of the fastest core", "speed",
            "median over the sensor samples during the run of the highest cpu_mhz of any core",
            median_sensed(fastest), "none"),
        Metric("load_before", "threads", "Load average before", "speed",
            "load_1m of the last sensor sample before the run: threads that ran or waited for a "
            "processor or storage, over a minute; earlier runs are in it",
            last_sensed(lambda sample: number(sample, "load_1m"), "before"), "none"),
        Metric("battery_level_percent", "%", "Battery level", "speed",
            "level_percent of the last sensor sample that has it",
            last_sensed(lambda s: number(s, "battery.level_percent"), "before", "during", "after"),
            "none"),
        Metric("battery_current_ma", "mA", "Battery current", "speed",
            "median over the sensor samples during the run of current_ma, with the device's own "
            "sign", battery_current, "none"),
    ),
    *_section(
        "Backend",
        Metric("delegated_operators", "operators", "Operators in the backend", "speed",
            "sum over stages of result.delegation[stage].delegated",
            operators("delegated"), "none"),
        Metric("portable_operators", "operators", "Operators outside the backend", "speed",
            "sum over stages of result.delegation[stage].portable", operators("portable")),
    ),
)
# fmt: on

BY_NAME: dict[str, Metric] = {metric.name: metric for metric in METRICS}


def markdown_table() -> str:
    """The table of `docs/metrics.md`, one row a metric; a test holds the document to it."""
    rows = tuple(
        (m.title, f"`{m.name}`", m.unit, "" if m.direction == "none" else m.direction, m.pass_,
         m.formula)
        for m in METRICS
    )  # fmt: skip
    headings = ("metric", "name", "unit", "better", "pass", "formula")
    return "\n".join(Table(headings, rows).to_markdown(str)) + "\n"


_MARKER = (
    "<!-- metrics: generated by `python -m device_tests.results.metrics docs/metrics.md` -->\n"
)


def with_table(document: str) -> str:
    """`docs/metrics.md` with the table of METRICS behind its marker, where the document ends."""
    before, marker, _ = document.partition(_MARKER)
    if not marker:
        raise OutputError(
            f"the document has no line {_MARKER.strip()}; put it where the table goes"
        )
    return f"{before}{marker}\n{markdown_table()}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
