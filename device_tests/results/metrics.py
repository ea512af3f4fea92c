"""The metrics of a benchmark: each defined once, as a formula in words and a pure function.

How the numbers come about is `docs/metrics.md`; what several repeats say together is `report.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from device_tests.remote.sensors import is_cpu_sensor
from export.host.puzzles import KINDS
from quantize.errors import OutputError

Record = Mapping[str, Any]
Direction = Literal["lower", "higher", "none"]
Statistic = Literal["median", "p5", "p95"]

COLD_RESIDENT_LIMIT = 0.05
"""A load counts as cold when at most this share of the bundle was in the page cache before it."""

AUTOREGRESSIVE = "autoregressive"
"""The style of generation whose step is one token."""

_PERCENTILES: dict[Statistic, float] = {"median": 50.0, "p5": 5.0, "p95": 95.0}


@dataclass(frozen=True)
class Metric:
    """One number of one run.

    `formula` is over the fields of the record; `passes` are the passes it is taken from, and in
    every other pass it is None. `direction` says which way is better. `compute` gives the number of
    one record, or None where the record does not have it. For a metric over denoising steps `pool`
    gives the steps of one record and `statistic` what is taken of them, so that the steps of all
    repeats can be put together. For a share `trials` gives what it is the share of: prompt and
    whether its answer is right. `is_of_style`: what is counted is another thing for each style of
    generation and length of canvas, so that the numbers of two must not be set against each other.
    `token_title` is what such a metric is called where a step is one token; without, it says
    nothing there.
    """

    name: str
    unit: str
    title: str
    section: str
    formula: str
    direction: Direction
    passes: tuple[str, ...]
    compute: Callable[[Record], float | None]
    pool: Callable[[Record], list[float]] | None = None
    statistic: Statistic = "median"
    trials: Callable[[Record], list[tuple[str, bool]]] | None = None
    is_of_style: bool = False
    token_title: str = ""

    def title_in(self, style: str) -> str | None:
        """What a person reads in a style of generation; None where the metric says nothing."""
        if style == AUTOREGRESSIVE and self.is_of_style:
            return self.token_title or None
        return self.title


def compute(record: Record) -> dict[str, float | None]:
    """Every metric of one record by its name; None where the run, or its pass, does not give it.

    A run that failed has no metrics: all are None.
    """
    return {metric.name: value(metric, record) for metric in METRICS}


def value(metric: Metric, record: Record) -> float | None:
    """One metric of one record, finite or None."""
    if record.get("status") != "ok" or record.get("pass") not in metric.passes:
        return None
    return _number(metric.compute(record))


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


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The percentile by linear interpolation between order statistics (numpy's default); None of
    nothing."""
    return float(np.percentile(np.asarray(values, dtype=float), percent)) if values else None


def statistic_of(values: Sequence[float], statistic: Statistic) -> float | None:
    """Median, 5th or 95th percentile."""
    return percentile(values, _PERCENTILES[statistic])


# What a record says. Records come from a device: whatever is not there, or not a number, is None.


def trials(record: Record, kind: str | None = None) -> list[tuple[str, bool]]:
    """Prompt of each puzzle (of one kind), and whether the answer was exactly right."""
    graded = map(_mapping, _list(record.get("puzzles")))
    return [
        (str(puzzle.get("prompt")), puzzle["is_exact"])
        for puzzle in graded
        if isinstance(puzzle.get("is_exact"), bool) and kind in (None, puzzle.get("kind"))
    ]


def share_interval(found: Sequence[tuple[str, bool]]) -> tuple[float, float] | None:
    """The 95 % Wilson interval of the share that is right; None of nothing."""
    # Imported here: it takes a second.
    from scipy.stats import binomtest

    if not found:
        return None
    right = sum(is_exact for _, is_exact in found)
    low, high = binomtest(right, len(found)).proportion_ci(method="wilson")
    return float(low), float(high)


def _exact_match(kind: str | None) -> Callable[[Record], float | None]:
    def compute_share(record: Record) -> float | None:
        found = trials(record, kind)
        return _ratio(sum(is_exact for _, is_exact in found), len(found))

    return compute_share


def _trials_of(kind: str | None) -> Callable[[Record], list[tuple[str, bool]]]:
    return lambda record: trials(record, kind)


def _answers(record: Record, *names: str) -> list[float]:
    """The sum of the named numbers for each answer that has all of them."""
    answers = map(_mapping, _list(_result(record).get("answers")))
    rows = ([_number(answer.get(name)) for name in names] for answer in answers)
    return [sum(row) for row in rows if None not in row]


def _steps_of_answers(record: Record) -> list[int]:
    """Denoising steps of each answer."""
    answers = map(_mapping, _list(_result(record).get("answers")))
    return [len(_steps_of(_canvases_of(answer))) for answer in answers]


def _median_of_answers(name: str) -> Callable[[Record], float | None]:
    return lambda record: statistic_of(_answers(record, name), "median")


def _answers_tokens_per_s(record: Record) -> float | None:
    tokens, ms = _answers(record, "new_tokens"), _answers(record, "total_ms")
    return _ratio(sum(tokens), sum(ms), 1000) if len(tokens) == len(ms) else None


def _forwards_per_answer(record: Record) -> float | None:
    steps, encodings = _steps_of_answers(record), _answers(record, "encodings")
    return _ratio(sum(steps) + sum(encodings), len(steps)) if len(steps) == len(encodings) else None


def _answers_tokens_per_forward(record: Record) -> float | None:
    tokens, steps = _answers(record, "new_tokens"), _steps_of_answers(record)
    return _ratio(sum(tokens), sum(steps)) if len(tokens) == len(steps) else None


def _charge_per_answer(record: Record) -> float | None:
    """None while charging: the current is then not the run's."""
    samples = [_mapping(sample.get("battery")) for sample in _sensors(record, "during")]
    if not samples or any(sample.get("status") != "discharging" for sample in samples):
        return None
    current, ms = _battery_current(record), _answers(record, "total_ms")
    return None if current is None else _ratio(abs(current) * sum(ms), len(ms) * 3600)


def _number(found: object) -> float | None:
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        return None
    try:
        number = float(found)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _ratio(above: float | None, below: float | None, factor: float = 1.0) -> float | None:
    return None if above is None or not below else factor * above / below


def _mapping(found: object) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {}


def _list(found: object) -> list[Any]:
    return list(found) if isinstance(found, (list, tuple)) else []


def _result(record: Record) -> Mapping[str, Any]:
    return _mapping(record.get("result"))


def answer(record: Record) -> Mapping[str, Any]:
    """The answer of a run of one prompt."""
    answers = _list(_result(record).get("answers"))
    return _mapping(answers[0]) if len(answers) == 1 else {}


def _field(name: str) -> Callable[[Record], float | None]:
    return lambda record: _number(_result(record).get(name))


def _answer_field(name: str) -> Callable[[Record], float | None]:
    return lambda record: _number(answer(record).get(name))


def _canvases(record: Record) -> list[Mapping[str, Any]]:
    return _canvases_of(answer(record))


def _canvases_of(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [_mapping(canvas) for canvas in _list(answer.get("canvases"))]


def _steps(record: Record) -> list[Mapping[str, Any]]:
    return _steps_of(_canvases(record))


def _steps_of(canvases: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [_mapping(step) for canvas in canvases for step in _list(canvas.get("steps"))]


def step_times(record: Record) -> list[float]:
    """Layers and head of every denoising step of the run, in ms, in their order."""
    return _times(_steps(record))


def _times(steps: Iterable[Mapping[str, Any]]) -> list[float]:
    pairs = ((_number(step.get("layers_ms")), _number(step.get("head_ms"))) for step in steps)
    return [layers + head for layers, head in pairs if layers is not None and head is not None]


def accepted_positions(record: Record) -> list[list[float]]:
    """Positions accepted at each step, canvas by canvas; steps that do not tell are left out."""
    return [
        _known(_number(_mapping(step).get("accepted")) for step in _list(canvas.get("steps")))
        for canvas in _canvases(record)
    ]


def canvas_length(record: Record) -> int:
    """Tokens of the longest canvas, 0 if there is none."""
    return max((len(_list(canvas.get("tokens"))) for canvas in _canvases(record)), default=0)


def event_step_times(record: Record) -> list[float]:
    """As `step_times`, from the events: what a run that failed left."""
    return _times(map(_mapping, _list(record.get("steps"))))


def _layers_times(record: Record) -> list[float]:
    return [ms for step in _steps(record) if (ms := _number(step.get("layers_ms"))) is not None]


def _head_times(record: Record) -> list[float]:
    return [ms for step in _steps(record) if (ms := _number(step.get("head_ms"))) is not None]


def _of_steps(
    pool: Callable[[Record], list[float]], statistic: Statistic
) -> Callable[[Record], float | None]:
    return lambda record: statistic_of(pool(record), statistic)


def _load_cold(record: Record) -> float | None:
    resident = _cold_resident(record)
    is_cold = resident is not None and resident <= COLD_RESIDENT_LIMIT
    return _number(_result(record).get("load_ms")) if is_cold else None


def _cold_resident(record: Record) -> float | None:
    return _number(_mapping(_result(record).get("cold")).get("resident_after"))


def _prefill_rate(record: Record) -> float | None:
    return _ratio(
        _number(answer(record).get("prompt_tokens")), _number(answer(record).get("prompt_ms")), 1000
    )


def _steps_per_canvas(record: Record) -> float | None:
    return _ratio(len(_steps(record)), len(_canvases(record)))


def _accepted_per_step(record: Record) -> float | None:
    accepted = [count for canvas in accepted_positions(record) for count in canvas]
    return _ratio(sum(accepted), len(accepted))


def _tokens_per_forward(record: Record) -> float | None:
    return _ratio(_number(answer(record).get("new_tokens")), len(_steps(record)))


def _tokens_per_s(record: Record) -> float | None:
    return _ratio(
        _number(answer(record).get("new_tokens")), _number(answer(record).get("total_ms")), 1000
    )


def _tokens_per_s_with_padding(record: Record) -> float | None:
    committed = sum(len(_list(canvas.get("tokens"))) for canvas in _canvases(record))
    return _ratio(committed, _number(answer(record).get("total_ms")), 1000)


def _encode_per_canvas(record: Record) -> float | None:
    return _ratio(_number(answer(record).get("encode_ms")), len(_canvases(record)) - 1)


def memory_samples(record: Record) -> list[Mapping[str, Any]]:
    """The memory samples of a run: those taken on the way, then after loading and at the end."""
    memory = _mapping(_result(record).get("memory"))
    ends = [_mapping(memory.get("after_load")), _mapping(memory.get("at_end"))]
    return [*map(_mapping, _list(record.get("memory"))), *(end for end in ends if end)]


def _memory_field(name: str) -> Callable[[Record], float | None]:
    return lambda record: _number(_mapping(_result(record).get("memory")).get(name))


def _weights_field(name: str) -> Callable[[Record], float | None]:
    return lambda record: _number(_mapping(_result(record).get("weights")).get(name))


def _storage_per_token(record: Record) -> float | None:
    read = _weights_field("storage_bytes")(record)
    return _ratio(read, _number(answer(record).get("new_tokens")))


def _stalled(record: Record) -> float | None:
    stalled = _weights_field("streamed_stall_ms")(record)
    return _ratio(stalled, _number(answer(record).get("total_ms")))


def _largest(name: str) -> Callable[[Record], float | None]:
    def compute_largest(record: Record) -> float | None:
        found = [_number(sample.get(name)) for sample in memory_samples(record)]
        return max((number for number in found if number is not None), default=None)

    return compute_largest


def _at_largest_rss(name: str) -> Callable[[Record], float | None]:
    def compute_at_peak(record: Record) -> float | None:
        samples = [sample for sample in memory_samples(record) if _number(sample.get("rss_bytes"))]
        peak = max(samples, key=lambda sample: sample["rss_bytes"], default={})
        return _number(peak.get(name))

    return compute_at_peak


def _sensors(record: Record, phase: str) -> list[Mapping[str, Any]]:
    samples = map(_mapping, _list(record.get("sensors")))
    return [sample for sample in samples if sample.get("phase") == phase]


def memory_series(record: Record, name: str) -> list[tuple[float, float]]:
    """Seconds since the process began and the value, for the samples taken on the way."""
    pairs = (
        (_number(sample.get("t_ms")), _number(sample.get(name)))
        for sample in map(_mapping, _list(record.get("memory")))
    )
    return [(t_ms / 1000, found) for t_ms, found in pairs if None not in (t_ms, found)]


def hottest(sample: Mapping[str, Any]) -> float | None:
    """The hottest CPU sensor of one sensor sample in °C, as the thermal gate sees it: the hottest
    zone where none is a CPU's by its name."""
    zones = _mapping(sample.get("temperature_c"))
    names = [name for name in zones if is_cpu_sensor(name)] or list(zones)
    return max(_known(_number(zones[name]) for name in names), default=None)


def fastest(sample: Mapping[str, Any]) -> float | None:
    """The clock of the fastest core in one sensor sample, in MHz."""
    cores = map(_number, _mapping(sample.get("cpu_mhz")).values())
    return max((core for core in cores if core is not None), default=None)


def _known(found: Iterable[float | None]) -> list[float]:
    return [number for number in found if number is not None]


def _hottest_before(record: Record) -> float | None:
    known = _known(map(hottest, _sensors(record, "before")))
    return known[-1] if known else None


def _hottest_during(record: Record) -> float | None:
    return max(_known(map(hottest, _sensors(record, "during"))), default=None)


def _hottest_after(record: Record) -> float | None:
    known = _known(map(hottest, _sensors(record, "after")))
    return known[0] if known else None


def _clock(record: Record) -> float | None:
    return statistic_of(_known(map(fastest, _sensors(record, "during"))), "median")


def _battery(record: Record, phases: Sequence[str], name: str) -> list[float]:
    samples = [sample for phase in phases for sample in _sensors(record, phase)]
    return _known(_number(_mapping(sample.get("battery")).get(name)) for sample in samples)


def _load_before(record: Record) -> float | None:
    known = _known(_number(sample.get("load_1m")) for sample in _sensors(record, "before"))
    return known[-1] if known else None


def _battery_level(record: Record) -> float | None:
    levels = _battery(record, ("before", "during", "after"), "level_percent")
    return levels[-1] if levels else None


def _battery_current(record: Record) -> float | None:
    return statistic_of(_battery(record, ("during",), "current_ma"), "median")


def _operators(where: str) -> Callable[[Record], float | None]:
    def count(record: Record) -> float | None:
        stages = _mapping(_result(record).get("delegation"))
        counts = [_mapping(stage).get(where) for stage in stages.values()]
        totals = _known(
            sum(_known(map(_number, found.values())))
            if isinstance(found, Mapping)
            else _number(found)
            for found in counts
        )
        return sum(totals) if totals else None

    return count


_SPEED, _NATURAL, _MEMORY, _COLD = ("speed",), ("natural",), ("memory",), ("cold",)
_PUZZLES = ("puzzles",)

METRICS: tuple[Metric, ...] = (
    Metric(
        "load_cold_ms", "ms", "Load, cold", "Time to load",
        "result.load_ms of a run whose bundle was dropped from the page cache before loading; only "
        f"if result.cold.resident_after <= {COLD_RESIDENT_LIMIT}",
        "lower", _COLD, _load_cold,
    ),
    Metric(
        "cold_resident_share", "share", "In page cache at cold load", "Time to load",
        "result.cold.resident_after: pages of the bundle's files that mincore finds in the page "
        "cache after the drop, by all their pages (0 to 1)",
        "lower", _COLD, _cold_resident,
    ),
    Metric(
        "load_warm_ms", "ms", "Load, warm", "Time to load",
        "result.load_ms of a run with the bundle in the page cache, left there by an earlier run",
        "lower", _SPEED, _field("load_ms"),
    ),
    Metric(
        "prompt_ms", "ms", "Prompt encoded", "Latency",
        "answer.prompt_ms: sum of the layers' time over the chunks of the prompt",
        "lower", _SPEED, _answer_field("prompt_ms"),
    ),
    Metric(
        "prefill_tokens_per_s", "tokens/s", "Prefill", "Latency",
        "1000 * answer.prompt_tokens / answer.prompt_ms; the padding of the last chunk costs time "
        "and is not counted as tokens",
        "higher", _SPEED, _prefill_rate,
    ),
    Metric(
        "first_draft_ms", "ms", "Time to first draft", "Latency",
        "answer.first_draft_ms: from the call to the end of the first denoising step, prompt "
        "included, loading excluded",
        "lower", _SPEED, _answer_field("first_draft_ms"), is_of_style=True,
        token_title="Time to first token",
    ),
    Metric(
        "first_commit_ms", "ms", "Time to first committed text", "Latency",
        "answer.first_commit_ms: from the call to the first canvas committed, prompt included, "
        "loading excluded; the sampler decides how many steps that takes",
        "lower", _NATURAL, _answer_field("first_commit_ms"),
    ),
    Metric(
        "step_ms", "ms", "Denoising step", "Steps",
        "median over denoising steps of layers_ms + head_ms; over repeats: of the steps of all "
        "repeats put together",
        "lower", _SPEED, _of_steps(step_times, "median"), step_times, "median", is_of_style=True,
        token_title="Token",
    ),
    Metric(
        "step_ms_p5", "ms", "Denoising step, p5", "Steps",
        "5th percentile of the same steps",
        "lower", _SPEED, _of_steps(step_times, "p5"), step_times, "p5", is_of_style=True,
        token_title="Token, p5",
    ),
    Metric(
        "step_ms_p95", "ms", "Denoising step, p95", "Steps",
        "95th percentile of the same steps",
        "lower", _SPEED, _of_steps(step_times, "p95"), step_times, "p95", is_of_style=True,
        token_title="Token, p95",
    ),
    Metric(
        "layers_ms", "ms", "Layers of a step", "Steps",
        "median over denoising steps of layers_ms",
        "lower", _SPEED, _of_steps(_layers_times, "median"), _layers_times, "median",
        is_of_style=True,
        token_title="Layers of a token",
    ),
    Metric(
        "head_ms", "ms", "Head of a step", "Steps",
        "median over denoising steps of head_ms; the sampler is in it",
        "lower", _SPEED, _of_steps(_head_times, "median"), _head_times, "median", is_of_style=True,
        token_title="Head of a token",
    ),
    Metric(
        "encode_ms", "ms", "Committed canvases encoded", "Steps",
        "answer.encode_ms: sum of the layers' time over the chunks of committed canvases; the last "
        "canvas is never encoded, so it is 0 for one canvas",
        "lower", _SPEED, _answer_field("encode_ms"), is_of_style=True,
    ),
    Metric(
        "encode_ms_per_canvas", "ms", "Commit of a canvas", "Steps",
        "answer.encode_ms / (canvases - 1); none for one canvas",
        "lower", _SPEED, _encode_per_canvas, is_of_style=True,
    ),
    Metric(
        "steps_per_canvas", "steps", "Steps per canvas", "Yield",
        "denoising steps / canvases, the sampler's own stop",
        "lower", _NATURAL, _steps_per_canvas, is_of_style=True,
    ),
    Metric(
        "accepted_per_step", "positions", "Accepted per step", "Yield",
        "sum of accepted over denoising steps / denoising steps; a step accepts anew over the "
        "whole canvas, so a position may count in several steps",
        "higher", _NATURAL, _accepted_per_step, is_of_style=True,
    ),
    Metric(
        "tokens_per_forward", "tokens", "Tokens per forward", "Yield",
        "answer.new_tokens / denoising steps; new_tokens are committed tokens that are not "
        "padding, and encoding passes are not counted as steps",
        "higher", _NATURAL, _tokens_per_forward,
    ),
    Metric(
        "tokens_per_s", "tokens/s", "Tokens per second", "Yield",
        "1000 * answer.new_tokens / answer.total_ms; total_ms is the whole call, prompt included, "
        "loading excluded",
        "higher", _NATURAL, _tokens_per_s,
    ),
    Metric(
        "tokens_per_s_with_padding", "tokens/s", "Tokens per second with padding", "Yield",
        "1000 * committed tokens of all canvases, padding after the end included / "
        "answer.total_ms",
        "higher", _NATURAL, _tokens_per_s_with_padding, is_of_style=True,
    ),
    Metric(
        "exact_match", "share", "Exact match", "Puzzles",
        "puzzles whose answer, white space around it apart, is exactly the right one / puzzles (0 "
        "to 1), over all kinds; with its 95 % Wilson interval",
        "higher", _PUZZLES, _exact_match(None), trials=trials,
    ),
    *(
        Metric(
            f"exact_match_{kind}", "share", f"Exact match, {kind}", "Puzzles",
            f"the same over the puzzles of the kind {kind}",
            "higher", _PUZZLES, _exact_match(kind), trials=_trials_of(kind),
        )
        for kind in KINDS
    ),
    Metric(
        "answer_tokens_per_s", "tokens/s", "Tokens per second of answers", "Puzzles",
        "1000 * sum of new_tokens / sum of total_ms over result.answers: committed tokens without "
        "padding, by the whole time of the calls, prompts included",
        "higher", _PUZZLES, _answers_tokens_per_s,
    ),
    Metric(
        "answer_first_text_ms", "ms", "First text of an answer", "Puzzles",
        "median over result.answers of first_commit_ms: from the call to the first text that stays "
        "(a canvas, a block, an autoregressive token), prompt included",
        "lower", _PUZZLES, _median_of_answers("first_commit_ms"),
    ),
    Metric(
        "answer_ms", "ms", "Whole answer", "Puzzles",
        "median over result.answers of total_ms: from the call to the end of the text, prompt "
        "included, loading excluded",
        "lower", _PUZZLES, _median_of_answers("total_ms"),
    ),
    Metric(
        "answer_tokens_per_forward", "tokens", "Tokens per forward of answers", "Puzzles",
        "sum of new_tokens / sum of steps over result.answers; as tokens_per_forward, encoding "
        "passes are not counted",
        "higher", _PUZZLES, _answers_tokens_per_forward,
    ),
    Metric(
        "forwards_per_answer", "forwards", "Forwards per answer", "Puzzles",
        "mean over result.answers of steps + encodings: every pass of the layers, those for the "
        "prompt and for committed canvases included; passes are of different lengths",
        "none", _PUZZLES, _forwards_per_answer,
    ),
    Metric(
        "charge_per_answer_uah", "µAh", "Charge per answer", "Puzzles",
        "median of the absolute current_ma during the run * mean total_ms of "
        "result.answers / 3600; the whole device, screen included; none while it charges",
        "lower", _PUZZLES, _charge_per_answer,
    ),
    Metric(
        "peak_rss_bytes", "bytes", "Peak RSS", "Memory",
        "result.memory.peak_rss_bytes: VmHWM of /proc/self/status at the end of the run",
        "lower", _MEMORY, _memory_field("peak_rss_bytes"),
    ),
    Metric(
        "peak_pss_bytes", "bytes", "Peak PSS", "Memory",
        "largest pss_bytes of the memory samples; what rises and falls between two samples is "
        "not seen",
        "lower", _MEMORY, _largest("pss_bytes"),
    ),
    Metric(
        "anonymous_bytes", "bytes", "Anonymous at the peak", "Memory",
        "anonymous_bytes of the memory sample with the largest rss_bytes",
        "lower", _MEMORY, _at_largest_rss("anonymous_bytes"),
    ),
    Metric(
        "file_bytes", "bytes", "File-backed at the peak", "Memory",
        "file_bytes of the memory sample with the largest rss_bytes",
        "lower", _MEMORY, _at_largest_rss("file_bytes"),
    ),
    Metric(
        "peak_swap_bytes", "bytes", "Peak swap", "Memory",
        "largest swap_bytes of the memory samples; above 0, RSS and PSS say too little",
        "lower", _MEMORY, _largest("swap_bytes"),
    ),
    Metric(
        "major_faults", "faults", "Major page faults", "Memory",
        "result.memory.major_faults: page faults of the whole process that waited for storage",
        "lower", _MEMORY, _memory_field("major_faults"),
    ),
    Metric(
        "major_faults_cold", "faults", "Major page faults, cold", "Memory",
        "the same in the cold pass",
        "lower", _COLD, _memory_field("major_faults"),
    ),
    Metric(
        "kept_weights_bytes", "bytes", "Weights kept in memory", "Memory",
        "result.weights.kept_bytes: of the packed weights, within the memory budget",
        "none", _SPEED, _weights_field("kept_bytes"),
    ),
    Metric(
        "streamed_pass_bytes", "bytes", "Weights read in a pass", "Memory",
        "result.weights.pass_bytes: what each pass reads because the budget has no room for it",
        "lower", _SPEED, _weights_field("pass_bytes"),
    ),
    Metric(
        "storage_bytes_per_token", "bytes", "Read from storage per token", "Memory",
        "result.weights.storage_bytes / answer.new_tokens: what the process had read from storage "
        "while it generated (read_bytes of /proc/self/io), with a memory budget",
        "lower", _NATURAL, _storage_per_token,
    ),
    Metric(
        "streaming_stall", "share", "Time waiting for weights", "Memory",
        "result.weights.streamed_stall_ms / answer.total_ms",
        "lower", _SPEED, _stalled,
    ),
    Metric(
        "hottest_before_c", "°C", "Hottest sensor before", "Temperature and power",
        "hottest CPU sensor (hottest zone where none is named as one) in the last sensor sample "
        "before the run",
        "none", _SPEED, _hottest_before,
    ),
    Metric(
        "hottest_during_c", "°C", "Hottest sensor during", "Temperature and power",
        "the same, maximum over the sensor samples during the run",
        "none", _SPEED, _hottest_during,
    ),
    Metric(
        "hottest_after_c", "°C", "Hottest sensor after", "Temperature and power",
        "the same in the first sensor sample after the run",
        "none", _SPEED, _hottest_after,
    ),
    Metric(
        "clock_mhz", "MHz", "Clock of the fastest core", "Temperature and power",
        "median over the sensor samples during the run of the highest cpu_mhz of any core",
        "none", _SPEED, _clock,
    ),
    Metric(
        "load_before", "threads", "Load average before", "Temperature and power",
        "load_1m of the last sensor sample before the run: threads that ran or waited for a "
        "processor or storage, over a minute; earlier runs are in it",
        "none", _SPEED, _load_before,
    ),
    Metric(
        "battery_level_percent", "%", "Battery level", "Temperature and power",
        "level_percent of the last sensor sample that has it",
        "none", _SPEED, _battery_level,
    ),
    Metric(
        "battery_current_ma", "mA", "Battery current", "Temperature and power",
        "median over the sensor samples during the run of current_ma, with the device's own sign",
        "none", _SPEED, _battery_current,
    ),
    Metric(
        "delegated_operators", "operators", "Operators in the backend", "Backend",
        "sum over stages of result.delegation[stage].delegated",
        "none", _SPEED, _operators("delegated"),
    ),
    Metric(
        "portable_operators", "operators", "Operators outside the backend", "Backend",
        "sum over stages of result.delegation[stage].portable",
        "lower", _SPEED, _operators("portable"),
    ),
)  # fmt: skip

BY_NAME: dict[str, Metric] = {metric.name: metric for metric in METRICS}


def markdown_table() -> str:
    """The table of `docs/metrics.md`, one row a metric; a test holds the document to it."""
    lines = [
        "| metric | name | unit | better | pass | formula |",
        "|---|---|---|---|---|---|",
    ]
    for metric in METRICS:
        better = "" if metric.direction == "none" else metric.direction
        lines.append(
            f"| {metric.title} | `{metric.name}` | {metric.unit} | {better} | "
            f"{', '.join(metric.passes)} | {metric.formula} |"
        )
    return "\n".join(lines) + "\n"


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
