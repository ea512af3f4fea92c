"""What a results file says: its configurations, each metric over the repeats, every run.

Metrics are defined in `metrics.py`; how a summary is shown is `report.py`. Whatever a device said
is untrusted and made plain text here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from device_tests.results.configuration import Configuration, Record, configurations
from device_tests.results.intervals import share_interval
from device_tests.results.metrics import BY_NAME, METRICS, Metric, pooled_steps, value
from device_tests.results.plain_text import condition, plain, plain_tree, quantity
from device_tests.results.prediction import Forecast
from device_tests.results.record_fields import percentile, step_times

HEADLINE = (
    "step_ms",
    "first_draft_ms",
    "first_commit_ms",
    "tokens_per_s",
    "tokens_per_forward",
    "exact_match",
    "answer_ms",
    "load_warm_ms",
    "peak_rss_bytes",
    "hottest_during_c",
)
"""The metrics on top of a configuration, as far as there are numbers."""


@dataclass(frozen=True)
class Repeat:
    """One run's number."""

    run_id: str
    repeat: int
    value: float


@dataclass(frozen=True)
class Quantity:
    """A metric over the repeats of its passes.

    title: what it is called in the bundle's style of generation.
    `median`, `p5` and `p95` are over the repeats, or over the steps of all repeats put together
    where the metric is one of steps (`steps` counts them); percentiles by linear interpolation.
    For a metric that is itself a percentile `median` holds that percentile and the others are None.
    `failed` counts the runs of the passes that failed. trials: of a share, prompt and whether its
    answer is right; of the first repeat, since the others answer the same with the same seed.
    """

    metric: Metric
    title: str
    median: float | None
    p5: float | None
    p95: float | None
    repeats: tuple[Repeat, ...]
    failed: int
    steps: int = 0
    trials: tuple[tuple[str, bool], ...] = ()

    def show(self, number: float | None) -> str:
        """A number of this quantity with its unit."""
        return quantity(number, self.metric.unit)

    @property
    def range(self) -> str:
        """From the 5th to the 95th percentile; of a share its 95 % interval."""
        if (interval := share_interval(self.trials)) is not None:
            return "{:.1f} to {:.1f} % (95 %)".format(*(100 * end for end in interval))
        if self.p5 is None or self.p95 is None or max(len(self.repeats), self.steps) < 2:
            return "-"
        if self.p5 == self.p95:
            return "all equal"
        low, high = self.show(self.p5), self.show(self.p95)
        number, _, unit = low.rpartition(" ")
        return f"{number} to {high}" if high.endswith(f" {unit}") else f"{low} to {high}"

    @property
    def count(self) -> str:
        """How many runs, and steps, the number is over."""
        runs = str(len(self.repeats))
        if self.trials:
            return f"{runs} ({len(self.trials)} puzzles)"
        return f"{runs} ({self.steps} steps)" if self.steps else runs


@dataclass(frozen=True)
class Run:
    """One line of the list of runs; `step` is its median step time, of whatever pass it is."""

    run_id: str
    pass_: str
    repeat: int
    started_at: str
    status: str
    begin_c: float | None
    waited_s: float
    step: str
    reason: str
    sentence: str
    evidence: str


@dataclass(frozen=True)
class Group:
    """One configuration: its conditions, what was measured under them, and what failed.

    forecast: what was predicted of it, if somebody asked (`planned.py`).
    """

    title: str
    subtitle: str
    conditions: tuple[tuple[str, str], ...]
    raw_conditions: dict[str, Any]
    notes: tuple[str, ...]
    quantities: tuple[Quantity, ...]
    runs: tuple[Run, ...]
    records: tuple[Record, ...]
    forecast: Forecast | None = None

    @property
    def failures(self) -> tuple[Run, ...]:
        """The runs that failed."""
        return tuple(run for run in self.runs if run.status != "ok")

    @property
    def passes(self) -> dict[str, tuple[int, int]]:
        """Pass -> runs that went well, runs that failed."""
        counts: dict[str, tuple[int, int]] = {}
        for run in self.runs:
            ok, failed = counts.get(run.pass_, (0, 0))
            is_ok = run.status == "ok"
            counts[run.pass_] = (ok + is_ok, failed + (not is_ok))
        return counts

    @property
    def headline(self) -> tuple[Quantity, ...]:
        """The main numbers."""
        by_name = {found.metric.name: found for found in self.quantities}
        return tuple(
            by_name[name]
            for name in HEADLINE
            if name in by_name and by_name[name].median is not None
        )

    @property
    def sections(self) -> dict[str, list[Quantity]]:
        """Quantities by section, those without a number left out."""
        found: dict[str, list[Quantity]] = {}
        for item in self.quantities:
            if item.median is not None:
                found.setdefault(item.metric.section, []).append(item)
        return found

    @property
    def missing(self) -> tuple[str, ...]:
        """What the metrics are called that no run gave."""
        return tuple(item.title for item in self.quantities if item.median is None)


@dataclass(frozen=True)
class Summary:
    """All configurations of a results file."""

    groups: tuple[Group, ...]
    runs: int
    failed: int

    @property
    def counted(self) -> str:
        """How many runs there are and how they ended."""
        configurations = len(self.groups)
        return (
            f"{self.runs} run{'s' * (self.runs != 1)} in {configurations} "
            f"configuration{'s' * (configurations != 1)}, {self.failed} failed"
        )


def summarize(records: Iterable[Record]) -> Summary:
    """What the records say, by configuration."""
    records = list(records)
    return Summary(
        tuple(_group(found) for found in configurations(records)),
        len(records),
        sum(record["status"] != "ok" for record in records),
    )


def quantities(records: Sequence[Record]) -> tuple[Quantity, ...]:
    """Every metric over the records of one configuration that means something in its style."""
    style = records[0]["conditions"]["bundle"]["style"]
    return tuple(
        _quantity(metric, title, records)
        for metric in METRICS
        if (title := metric.title_in(style)) is not None
    )


def _quantity(metric: Metric, title: str, records: Sequence[Record]) -> Quantity:
    repeats = tuple(
        Repeat(plain(record["run_id"]), record["repeat"], number)
        for record in records
        if (number := value(metric, record)) is not None
    )
    failed = sum(record["status"] != "ok" and record["pass"] == metric.pass_ for record in records)
    steps = pooled_steps(metric, records)
    numbers = [repeat.value for repeat in repeats] if metric.pool is None else steps
    is_median = metric.percent == 50
    return Quantity(
        metric,
        title,
        percentile(numbers, metric.percent),
        percentile(numbers, 5) if is_median else None,
        percentile(numbers, 95) if is_median else None,
        repeats,
        failed,
        len(steps),
        tuple(_trials(metric, records)),
    )


def _trials(metric: Metric, records: Sequence[Record]) -> Sequence[tuple[str, bool]]:
    if metric.trials is None:
        return ()
    return next((metric.trials(r) for r in records if value(metric, r) is not None), ())


def _group(found: Configuration) -> Group:
    leaves = found.leaves
    threads = leaves["threads"]
    model = " ".join(
        plain(leaves[f"device.{name}"], 60)
        for name in ("manufacturer", "model")
        if leaves[f"device.{name}"]
    )
    if not model:
        model = plain(leaves["device.soc"] or leaves["device.serial"], 60)
    title = f"{plain(leaves['bundle.name'], 60)} on {model}, "
    title += (
        "runtime's choice of threads"
        if threads is None
        else f"{threads} thread{'s' * (threads != 1)}"
    )
    return Group(
        title,
        _workload(leaves),
        tuple((plain(leaf, 80), condition(leaf, leaves[leaf])) for leaf in leaves),
        plain_tree(leaves),
        tuple(_notes(found)),
        quantities(found.records),
        tuple(_run(record) for record in found.records),
        tuple(found.records),
    )


def _workload(leaves: Mapping[str, Any]) -> str:
    natural = "workload in the natural pass"
    forced = leaves["workload.force_steps"]
    shown = _prompt(leaves, "workload")
    if f"{natural}.prompt_text" in leaves:
        shown += f" (natural pass: {_prompt(leaves, natural)})"
    puzzles = leaves.get("workload in the puzzles pass.puzzles")
    if puzzles is not None:
        shown += f" (puzzles pass: {puzzles} held-out puzzles of each kind)"
    shown += f", up to {leaves['workload.max_new_tokens']} new tokens"
    shown += f", seed {leaves['workload.seed']}"
    return shown if forced is None else f"{shown}, {forced} steps a canvas forced for speed"


def _prompt(leaves: Mapping[str, Any], workload: str) -> str:
    text, tokens = (leaves.get(f"{workload}.prompt_{kind}") for kind in ("text", "tokens"))
    if (puzzles := leaves.get(f"{workload}.puzzles")) is not None:
        return f"{puzzles} held-out puzzles of each kind"
    if text is not None:
        return f"prompt “{plain(text, 60)}”"
    return "prompt not told" if tokens is None else f"random prompt of {tokens} tokens"


def _notes(found: Configuration) -> Iterable[str]:
    """What a reader must know before believing a number."""
    records = found.records
    for leaf, counts in found.varied.items():
        yield (
            f"{plain(leaf)} was not the same in all runs: {len(counts)} values over "
            f"{len(records)} runs; the runs are kept together, compare refuses them"
        )
    results = [record["result"] for record in records if record["status"] == "ok"]
    chosen = Counter(plain(result.get("threads"), 20) for result in results)
    if found.leaves["threads"] is None and chosen:
        yield f"the runtime chose its threads: {', '.join(chosen)}"
    unseen = [record for record in records if record["gate"]["sensor"] is None]
    if unseen:
        yield (
            f"the device shows no CPU temperature in {len(unseen)} of {len(records)} runs: the "
            "thermal gate could not hold them back, and heat may be in the numbers"
        )
    cold = [r for r in records if r["pass"] == "cold" and r["status"] == "ok"]
    warm = sum(value(BY_NAME["load_cold_ms"], record) is None for record in cold)
    if warm:
        yield (
            f"{warm} of {len(cold)} cold loads were not cold: the device did not let the bundle "
            "be dropped from the page cache, so there is no cold load time of them"
        )
    counts = Counter(record["pass"] for record in records if record["status"] == "ok")
    if 0 < counts["speed"] < 3:
        yield f"only {counts['speed']} speed run(s): the spread over repeats is not known"


def _run(record: Record) -> Run:
    failure = record["failure"] or {"reason": "", "sentence": "", "evidence": {}}
    evidence = "; ".join(f"{key} {item}" for key, item in failure["evidence"].items())
    gate = record["gate"]
    return Run(
        plain(record["run_id"]),
        record["pass"],
        record["repeat"],
        plain(record["started_at"]),
        record["status"],
        gate["begin_c"],
        gate["waited_s"],
        quantity(percentile(step_times(record), 50), "ms"),
        plain(failure["reason"]),
        plain(failure["sentence"], 4000),
        plain(evidence, 1000),
    )
