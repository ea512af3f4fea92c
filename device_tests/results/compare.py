"""Two sets of runs side by side: the ratio of each metric's medians with its interval.

It refuses runs that were made under different conditions, except for what is named as different on
purpose. What a metric is, and which repeats there are, is `metrics.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from device_tests.results import plain_text
from device_tests.results.configuration import (
    CONDITIONS,
    MAY_VARY,
    Record,
    canonical,
    condition_of,
    leaves,
)
from device_tests.results.metrics import (
    AUTOREGRESSIVE,
    METRICS,
    Metric,
    canvas_length,
    percentile,
    share_interval,
    value,
)
from device_tests.results.plain_text import markdown, plain, quantity
from quantize.errors import UserError

MINIMUM_REPEATS = 3
"""Of each side, for an interval."""

VERDICT_REPEATS = 6
"""Of each side, for a verdict on what is noisy. With fewer, not even the whole range of the repeats
holds the median in 95 % of cases: it does in 1 - 2 * 0.5**n, which is 93.75 % for 5. Of two equal
sides with three repeats each, the interval excludes 1 in 9 % (`benchmarks/false_verdicts.py`)."""

MINIMUM_PUZZLES = 10
"""On each side, for an interval of the ratio of exact matches."""

LEVEL = 0.95
RESAMPLES = 9999
_SEED = 20250117
_NO_RATIO = ("°C", "mA")
"""Units in which twice as much is not twice the number, or a sign is only a convention."""

FAMILY = "family"
"""The name that `across` takes for two bundles of different families or styles of generation."""

_OF_FAMILY = frozenset({"workload.force_steps", "workload.max_new_tokens"})
"""Conditions that follow from the style: an autoregressive canvas is one token and one step."""

ENERGY = "charge_per_answer_uah"
"""The metric that tells of energy, where a battery does."""

AT_A_GLANCE = (
    "exact_match",
    "answer_tokens_per_s",
    "answer_first_text_ms",
    "answer_ms",
    "answer_tokens_per_forward",
    ENERGY,
    "peak_rss_bytes",
)
"""What decides between two families: quality, speed, energy, memory; shown before all else."""

Verdict = Literal["better", "worse", "higher", "lower", "equal", "unclear", "not known"]
"""How B stands to A; `unclear`: the interval holds 1, or there are too few runs to say, `equal`: it
holds nothing else."""


class CompareRefused(UserError):
    """Two sets of runs whose numbers may not be set side by side."""


@dataclass(frozen=True)
class Side:
    """What one side has of one metric: each repeat's number, and the failed runs of its passes.

    trials: of a share, prompt and whether its answer is right; of the first repeat, since the
    others answer the same with the same seed.
    """

    repeats: tuple[float, ...]
    failed: int
    trials: tuple[tuple[str, bool], ...] = ()

    @property
    def median(self) -> float | None:
        """Median over the repeats."""
        return percentile(self.repeats, 50)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of a share: the 95 % Wilson interval."""
        return share_interval(self.trials)

    def show(self, unit: str) -> str:
        """The median with its unit, of a share also its interval."""
        shown = quantity(self.median, unit)
        if (interval := self.interval) is not None:
            shown += " ({:.1f} to {:.1f})".format(*(100 * end for end in interval))
        return shown


_NOTHING = Side((), 0)


@dataclass(frozen=True)
class Row:
    """One metric on both sides.

    ratio: median of B by median of A. interval: 95 %, None where there is none, and then `why` says
    so. verdict: how B stands to A, told only where the interval excludes 1 and each side has
    VERDICT_REPEATS, or neither varied at all. style: where a metric
    counts another thing on each side, the one that this row is about.
    """

    metric: Metric
    a: Side
    b: Side
    ratio: float | None
    interval: tuple[float, float] | None
    verdict: Verdict
    why: str = ""
    style: str = ""

    @property
    def fewest(self) -> int:
        """Runs of the side that has fewer."""
        return min(len(self.a.repeats), len(self.b.repeats))

    @property
    def is_too_few(self) -> bool:
        """Whether an interval is shown that is of too few runs to be believed."""
        return _is_too_few(self.metric, self.interval, self.fewest)

    @property
    def title(self) -> str:
        """What a person reads."""
        if not self.style:
            return self.metric.title
        if self.style == AUTOREGRESSIVE:
            return self.metric.title_in(self.style) or self.metric.title
        return f"{self.metric.title} ({self.style.replace('_diffusion', '')})"

    @property
    def name(self) -> str:
        """What a program reads, different for every row."""
        return f"{self.metric.name}, {self.style}" if self.style else self.metric.name


@dataclass(frozen=True)
class Difference:
    """A condition that is not the same: what A has, what B has, as text.

    mixed: it is not even the same within one side.
    """

    leaf: str
    a: str
    b: str
    mixed: bool = False

    @property
    def sentence(self) -> str:
        """Name and both values."""
        return f"{plain(self.leaf, 80)} is {self.a} in A and {self.b} in B"


@dataclass(frozen=True)
class Comparison:
    """Everything that two sets of runs say together; `across` differs on purpose."""

    rows: tuple[Row, ...]
    across: tuple[str, ...]
    differences: tuple[Difference, ...]
    runs: tuple[int, int]
    failed: tuple[int, int]
    failures: tuple[tuple[str, str, str, str], ...]
    """Side, run, reason and sentence of each run that failed."""
    bundles: tuple[dict[str, Any], dict[str, Any]]
    """What each side's bundle says of itself, its texts made plain."""

    @property
    def groups(self) -> tuple[tuple[str, tuple[Row, ...]], ...]:
        """The rows as they are shown, each group with its title: of families, the few that decide
        between them come first."""
        if FAMILY not in self.across:
            return (("", self.rows),)
        first = [row for name in AT_A_GLANCE for row in self.rows if row.metric.name == name]
        others = tuple(row for row in self.rows if row not in first)
        found = (("at a glance", tuple(first)), ("everything measured", others))
        return tuple((title, rows) for title, rows in found if rows)

    @property
    def headings(self) -> tuple[str, str]:
        """Of each side: name, family, style, size, recipe."""
        return _heading(self.bundles[0]), _heading(self.bundles[1])

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the intervals."""
        notes = [
            f"ratio: median of B by median of A, each over repeats; interval: {100 * LEVEL:.0f} %, "
            f"percentile bootstrap of the ratio, {RESAMPLES} resamples of whole repeats"
        ]
        if any(row.verdict == "unclear" and not row.is_too_few for row in self.rows):
            notes.append("unclear: the interval holds 1")
        if counts := [row.fewest for row in self.rows if row.is_too_few]:
            notes.append(
                f"unclear, and no verdict, with fewer than {VERDICT_REPEATS} runs a side (here "
                f"{min(counts)}): the interval holds the true ratio less often than its name says; "
                f"give `bench` at least {VERDICT_REPEATS} runs of the pass"
            )
        if any(row.ratio is not None and row.interval is None for row in self.rows):
            notes.append(
                f"no interval and no verdict with fewer than {MINIMUM_REPEATS} runs a side"
            )
        if any(row.metric.unit in _NO_RATIO for row in self.rows):
            notes.append(f"no ratio is formed of {' and '.join(_NO_RATIO)}: it would mean nothing")
        if any(row.a.trials and row.b.trials for row in self.rows):
            notes.append(
                "exact match: in brackets the 95 % Wilson interval of each side; its ratio's "
                "interval resamples puzzles instead of repeats, the same ones on both sides"
            )
        if any(row.a.trials or row.b.trials for row in self.rows) and not any(
            row.metric.name == ENERGY for row in self.rows
        ):
            notes.append(
                "energy is not known: on neither side did a battery discharge all through the runs"
            )
        if any(row.style for row in self.rows):
            notes.append(
                "a number in one column only counts what the other side's style of generation has "
                "not: a denoising step and a token are no match"
            )
        compared = sum(row.interval is not None for row in self.rows)
        if compared > 1:
            notes.append(
                f"{compared} intervals are shown: about one in twenty excludes 1 by chance alone"
            )
        return tuple(notes)


def compare(
    records_a: Iterable[Record], records_b: Iterable[Record], across: Iterable[str] = ()
) -> Comparison:
    """Set B beside A, metric by metric.

    across: names of CONDITIONS that differ on purpose, or FAMILY: the bundle, and of the workload
    what follows from its style of generation. Raises CompareRefused for a name that is
    not one, for a side without runs, and, naming each condition with both values, for any other
    condition that differs between the sides, and for any that differs within one.
    """
    a, b = list(records_a), list(records_b)
    across = tuple(across)
    unknown = [name for name in across if name not in (*CONDITIONS, FAMILY)]
    if unknown:
        raise CompareRefused(
            f"{', '.join(plain(name, 60) for name in unknown)} is no condition that may differ; "
            f"the conditions are {', '.join(CONDITIONS)}, and {FAMILY} for two bundles of "
            "different families or styles"
        )
    for name, records in (("A", a), ("B", b)):
        if not records:
            raise CompareRefused(f"{name} has no runs to compare; give a results file with some")
    differences = _differences(a, b)
    refused = [found for found in differences if not _is_on_purpose(found, across)]
    if refused:
        names = _to_be_named(differences, across)
        raise CompareRefused(
            "the runs were made under different conditions: "
            f"{'; '.join(found.sentence for found in refused)}; choose runs that agree, or say "
            f"that they differ on purpose with `--across {','.join(names)}`"
        )
    mixed = [found for found in differences if found.mixed and not _may_vary(found)]
    if mixed:
        raise CompareRefused(
            "runs of one side were made under different conditions: "
            f"{'; '.join(found.sentence for found in mixed)}; choose those of one configuration"
        )
    styles = _styles(a, b)
    rows = tuple(row for metric in METRICS for row in _rows(metric, a, b, styles))
    return Comparison(
        rows,
        across,
        tuple(differences),
        (len(a), len(b)),
        (_failed(a), _failed(b)),
        tuple(
            (side, f"{r['pass']} {r['repeat']}", r["failure"]["reason"],
             plain(r["failure"]["sentence"], 4000))
            for side, records in (("A", a), ("B", b))
            for r in records
            if r["status"] != "ok"
        ),
        (_bundle(a), _bundle(b)),
    )  # fmt: skip


def _is_on_purpose(found: Difference, across: Sequence[str]) -> bool:
    condition = condition_of(found.leaf)
    of_family = condition == "bundle" or found.leaf in _OF_FAMILY
    return condition in across or (FAMILY in across and of_family)


def _to_be_named(differences: Sequence[Difference], across: Sequence[str]) -> list[str]:
    """The names of `across` with which the comparison would be made: as little as it takes."""
    others = {leaf for found in differences if (leaf := found.leaf) in _OF_FAMILY}
    bundles_differ = any(condition_of(found.leaf) == "bundle" for found in differences)
    is_family = others and bundles_differ and "workload" not in across
    names = {*across} - {"bundle"} | {FAMILY} if is_family else {*across}
    return sorted(
        names | {condition_of(f.leaf) for f in differences if not _is_on_purpose(f, [*names])}
    )


def _bundle(records: Sequence[Record]) -> dict[str, Any]:
    return plain_text.plain_tree(dict(records[0]["conditions"]["bundle"]))


def _heading(bundle: dict[str, Any]) -> str:
    recipe = bundle["recipe"] or "not quantized"
    size = quantity(bundle["bytes"], "bytes")
    named = (bundle["name"], bundle["family"], bundle["style"], size, recipe)
    return ", ".join(plain(part, 60) for part in named)


def _styles(a: Sequence[Record], b: Sequence[Record]) -> tuple[str, str] | None:
    """What each side calls its steps, if they are not the same thing: style, or also its length."""
    styles = [plain(side[0]["conditions"]["bundle"]["style"], 60) for side in (a, b)]
    if styles[0] != styles[1]:
        return styles[0], styles[1]
    lengths = [max(map(canvas_length, side)) for side in (a, b)]
    if lengths[0] == lengths[1] or not all(lengths):
        return None
    return tuple(f"{styles[0]}, canvas of {length}" for length in lengths)


def _may_vary(found: Difference) -> bool:
    """Whether it changes by itself within a bench, and may if it is named in across."""
    return condition_of(found.leaf) in MAY_VARY


def _failed(records: Sequence[Record]) -> int:
    return sum(record["status"] != "ok" for record in records)


def _differences(a: Sequence[Record], b: Sequence[Record]) -> list[Difference]:
    """The conditions that differ, pass by pass for passes that both sides have.

    Each pass has its own workload, and only runs that went well give numbers; where a side has
    none of a pass, its failed ones are looked at.
    """
    found: dict[str, Difference] = {}
    by_pass_a, by_pass_b = _by_pass(a), _by_pass(b)
    shared = [name for name in by_pass_a if name in by_pass_b]
    if not shared:
        raise CompareRefused(
            f"A has the passes {', '.join(by_pass_a)}, and B {', '.join(by_pass_b)}; give results "
            "with a pass in common"
        )
    for name in shared:
        values_a, values_b = _values(by_pass_a[name]), _values(by_pass_b[name])
        for leaf in [*values_a, *(leaf for leaf in values_b if leaf not in values_a)]:
            one, other = values_a.get(leaf, {}), values_b.get(leaf, {})
            if len(one) != 1 or one.keys() != other.keys():
                mixed = max(len(one), len(other)) > 1
                shown = _show(leaf, one), _show(leaf, other)
                found.setdefault(leaf, Difference(leaf, *shown, mixed))
    return list(found.values())


def _by_pass(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["pass"], []).append(record)
    return {
        name: [record for record in runs if record["status"] == "ok"] or runs
        for name, runs in found.items()
    }


def _values(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """leaf -> canonical text -> value, over the records; a leaf that one lacks is told as None."""
    all_leaves = [leaves(record) for record in records]
    names = dict.fromkeys(name for found in all_leaves for name in found)
    return {
        name: {canonical(found.get(name)): found.get(name) for found in all_leaves}
        for name in names
    }


def _show(leaf: str, values: dict[str, Any]) -> str:
    shown = [plain_text.condition(leaf, found) for found in values.values()]
    return " or ".join(text if len(text) <= 120 else text[:120] + "…" for text in shown) or "absent"


def _rows(
    metric: Metric, a: Sequence[Record], b: Sequence[Record], styles: tuple[str, str] | None
) -> list[Row]:
    """One row, none without a number; one a side where the metric counts another thing on each."""
    sides = _side(metric, a), _side(metric, b)
    if metric.is_of_style and styles is not None:
        found = (
            Row(metric, sides[0], _NOTHING, None, None, "not known", "only in A", styles[0]),
            Row(metric, _NOTHING, sides[1], None, None, "not known", "only in B", styles[1]),
        )
        return [
            row
            for row in found
            if (row.a.repeats or row.b.repeats) and metric.title_in(row.style) is not None
        ]
    if not any(side.repeats for side in sides):
        return []
    ratio, interval, why = _ratio(metric, *sides)
    fewest = min(len(side.repeats) for side in sides)
    return [Row(metric, *sides, ratio, interval, _verdict(metric, interval, fewest), why)]


def _side(metric: Metric, records: Sequence[Record]) -> Side:
    found = [(r, number) for r in records if (number := value(metric, r)) is not None]
    failed = sum(r["status"] != "ok" and r["pass"] in metric.passes for r in records)
    trials = metric.trials(found[0][0]) if found and metric.trials is not None else ()
    return Side(tuple(number for _, number in found), failed, tuple(trials))


def _ratio(
    metric: Metric, a: Side, b: Side
) -> tuple[float | None, tuple[float, float] | None, str]:
    if metric.unit in _NO_RATIO:
        return None, None, f"none of {metric.unit}"
    if not a.repeats or not b.repeats:
        return None, None, f"{'B' if a.repeats else 'A'} has no number"
    if min(a.repeats) <= 0:
        if min(*a.repeats, *b.repeats) == max(*a.repeats, *b.repeats):
            return None, None, "all are 0"
        return None, None, "A is 0 or less"
    if metric.trials is not None:
        return _ratio_of_shares(a, b)
    ratio = b.median / a.median
    fewest = min(len(a.repeats), len(b.repeats))
    if fewest < MINIMUM_REPEATS:
        return ratio, None, "too few runs"
    return ratio, ratio_interval(a.repeats, b.repeats), ""


def _ratio_of_shares(a: Side, b: Side) -> tuple[float | None, tuple[float, float] | None, str]:
    ratio = b.median / a.median
    if [prompt for prompt, _ in a.trials] != [prompt for prompt, _ in b.trials]:
        return ratio, None, "other puzzles"
    right = [[is_exact for _, is_exact in side.trials] for side in (a, b)]
    if len(right[0]) < MINIMUM_PUZZLES:
        return ratio, None, "too few puzzles"
    return ratio, share_ratio_interval(*right), ""


def share_ratio_interval(a: Sequence[bool], b: Sequence[bool]) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of mean(b) / mean(a) over puzzles in pairs: number n
    of both is the same puzzle."""
    one, other = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    random = np.random.default_rng(_SEED)
    ratios = []
    for _ in range(RESAMPLES):
        drawn = random.integers(0, len(one), len(one))
        base = one[drawn].sum()
        # A resample without one right answer of A has no ratio: the interval is open there.
        ratios.append(other[drawn].sum() / base if base else np.inf)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail], method="nearest")
    return float(low), float(high)


def ratio_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of median(b) / median(a), always the same."""
    # Imported here: scipy.stats takes a second that `--help` need not pay.
    from scipy.stats import bootstrap

    def statistic(one: np.ndarray, other: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.median(other, axis=axis) / np.median(one, axis=axis)

    interval = bootstrap(
        (np.asarray(a, dtype=float), np.asarray(b, dtype=float)),
        statistic,
        n_resamples=RESAMPLES,
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _is_too_few(metric: Metric, interval: tuple[float, float] | None, fewest: int) -> bool:
    """A share is over puzzles, and what never varied is a count and no sample of a noise."""
    if interval is None or metric.trials is not None or interval[0] == interval[1]:
        return False
    return fewest < VERDICT_REPEATS


def _verdict(metric: Metric, interval: tuple[float, float] | None, fewest: int) -> Verdict:
    if interval is None:
        return "not known"
    if _is_too_few(metric, interval, fewest):
        return "unclear"
    low, high = interval
    if low <= 1 <= high:
        return "equal" if low == high else "unclear"
    rises = low > 1
    if metric.direction == "none":
        return "higher" if rises else "lower"
    return "better" if rises == (metric.direction == "higher") else "worse"


def _cells(row: Row) -> tuple[str, ...]:
    interval = row.why if row.interval is None else "{:.3f} to {:.3f}".format(*row.interval)
    return (
        row.title,
        row.a.show(row.metric.unit),
        row.b.show(row.metric.unit),
        f"{_count(row.a)}, {_count(row.b)}",
        "-" if row.ratio is None else f"{row.ratio:.3f}",
        interval,
        "" if row.verdict == "not known" else row.verdict,
    )


def _count(side: Side) -> str:
    return f"{len(side.repeats)} (+{side.failed} failed)" if side.failed else f"{len(side.repeats)}"


_HEADINGS = ("metric", "A", "B", "runs A, B", "B / A", "95 % interval", "B is")


def _summary(comparison: Comparison) -> str:
    (runs_a, runs_b), (failed_a, failed_b) = comparison.runs, comparison.failed
    return f"A: {runs_a} runs, {failed_a} failed; B: {runs_b} runs, {failed_b} failed"


def _table(title: str, rows: Sequence[Row]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title or None, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for index, heading in enumerate(_HEADINGS):
        table.add_column(
            heading,
            justify="right" if 0 < index < 6 else "left",
            style="cyan" if index == 0 else "",
            overflow="fold",
        )
    styles = {"better": "green", "worse": "red"}
    for row in rows:
        *cells, verdict = _cells(row)
        table.add_row(*map(Text, cells), Text(verdict, style=styles.get(row.verdict, "")))
    return table


def to_rich(comparison: Comparison) -> Any:
    """The comparison for a terminal: one renderable of rich, readable at a width of 100."""
    from rich.console import Group
    from rich.text import Text

    shown: list[Any] = [
        Text(f"{side}: {heading}", style="bold")
        for side, heading in zip("AB", comparison.headings, strict=True)
    ]
    shown.append(Text(_summary(comparison)))
    shown += [
        Text(f"on purpose: {found.sentence}", style="yellow") for found in comparison.differences
    ]
    shown += [_table(title, rows) for title, rows in comparison.groups]
    shown += [
        Text(f"failed: {side} {run}: {reason}: {sentence}", style="red")
        for side, run, reason, sentence in comparison.failures
    ]
    shown += [Text(note, style="dim") for note in comparison.notes]
    return Group(*shown)


def to_text(comparison: Comparison, width: int = 100) -> str:
    """The comparison as plain text of at most `width` columns, without colours."""
    from rich.console import Console

    console = Console(width=width, highlight=False, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(to_rich(comparison))
    return capture.get()


def to_markdown(comparison: Comparison) -> str:
    """The comparison as Markdown with tables."""
    lines = [
        f"- **{side}**: {markdown(heading)}"
        for side, heading in zip("AB", comparison.headings, strict=True)
    ]
    lines += ["", f"{_summary(comparison)}.", ""]
    if comparison.differences:
        lines += ["| different on purpose | A | B |", "|---|---|---|"]
        for found in comparison.differences:
            cells = map(markdown, (found.leaf, found.a, found.b))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    for title, rows in comparison.groups:
        lines += [f"**{title.capitalize()}**", ""] if title else []
        lines += [f"| {' | '.join(_HEADINGS)} |", "|---|---:|---:|---:|---:|---:|---|"]
        lines += [f"| {' | '.join(map(markdown, _cells(row)))} |" for row in rows]
        lines.append("")
    if comparison.failures:
        lines += ["| failed run | reason | what happened |", "|---|---|---|"]
        for side, run, reason, sentence in comparison.failures:
            cells = map(markdown, (f"{side} {run}", reason, sentence))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += [f"- {markdown(note)}." for note in comparison.notes]
    return "\n".join(lines) + "\n"


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as one JSON document, all numbers exact and finite."""
    return {
        "compare": "pocketdiff",
        "schema_version": 1,
        "across": list(comparison.across),
        "differences": [
            {"condition": plain(found.leaf), "a": found.a, "b": found.b}
            for found in comparison.differences
        ],
        **{
            side: {
                "runs": comparison.runs[index],
                "failed": comparison.failed[index],
                "bundle": comparison.bundles[index],
            }
            for index, side in enumerate("ab")
        },
        "level": LEVEL,
        "metrics": {
            row.name: {
                "unit": row.metric.unit,
                "a": row.a.median,
                "b": row.b.median,
                "a_repeats": list(row.a.repeats),
                "b_repeats": list(row.b.repeats),
                "a_failed": row.a.failed,
                "b_failed": row.b.failed,
                **_share_json(row),
                "ratio": row.ratio,
                "interval": _finite(row.interval),
                "verdict": row.verdict,
                "why": row.why,
            }
            for row in comparison.rows
        },
        "failures": [
            {"side": side, "run": run, "reason": reason, "sentence": sentence}
            for side, run, reason, sentence in comparison.failures
        ],
        "notes": list(comparison.notes),
    }


def _finite(interval: tuple[float, float] | None) -> list[float | None] | None:
    """JSON has no infinity: an end that is open is null."""
    return None if interval is None else [end if np.isfinite(end) else None for end in interval]


def _share_json(row: Row) -> dict[str, Any]:
    """What a share has more: how many of how many, and each side's own interval."""
    if row.metric.trials is None:
        return {}
    return {
        f"{name}_{what}": found
        for name, side in (("a", row.a), ("b", row.b))
        for what, found in (
            ("correct", sum(is_exact for _, is_exact in side.trials)),
            ("count", len(side.trials)),
            ("interval_95", None if side.interval is None else list(side.interval)),
        )
    }
