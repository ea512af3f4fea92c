"""Two sets of runs side by side: the ratio of each metric's medians with its interval.

It refuses runs that were made under different conditions, except for what is named as different on
purpose. What a metric is, and which repeats there are, is `metrics.py`; how a comparison is shown
`compare_views.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from device_tests.results.configuration import (
    CONDITIONS,
    MAY_VARY,
    Record,
    canonical,
    condition_of,
    leaves,
)
from device_tests.results.intervals import (
    LEVEL,
    RESAMPLES,
    Interval,
    ratio_interval,
    share_interval,
    share_ratio_interval,
)
from device_tests.results.metrics import METRICS, Metric, value
from device_tests.results.plain_text import condition, plain, plain_tree, quantity
from device_tests.results.record_fields import canvas_length, percentile
from quantize.errors import UserError

MINIMUM_REPEATS = 3
"""Of each side, for an interval."""

VERDICT_REPEATS = 6
"""Of each side, for a verdict on what is noisy. With fewer, not even the whole range of the repeats
holds the median in 95 % of cases: it does in 1 - 2 * 0.5**n, which is 93.75 % for 5. Of two equal
sides with three repeats each, the interval excludes 1 in 9 % (`benchmarks/false_verdicts.py`)."""

MINIMUM_PUZZLES = 10
"""On each side, for an interval of the ratio of exact matches."""

_NO_RATIO = ("°C", "mA")
"""Units in which twice as much is not twice the number, or a sign is only a convention."""

FAMILY = "family"
"""The name that `across` takes for two bundles of different families or styles of generation."""

_OF_FAMILY = frozenset({"workload.force_steps", "workload.max_new_tokens"})
"""Conditions that follow from the style: an autoregressive canvas is one token and one step."""

ENERGY = "charge_per_answer_uah"
"""The metric of energy, where a battery shows it."""

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
    def interval(self) -> Interval | None:
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
    so. verdict: how B stands to A, known only where the interval excludes 1 and each side has
    VERDICT_REPEATS, or neither varied at all. style: where a metric
    counts another thing on each side, the one that this row is about.
    """

    metric: Metric
    a: Side
    b: Side
    ratio: float | None
    interval: Interval | None
    verdict: Verdict
    why: str = ""
    style: str = ""

    @property
    def fewest(self) -> int:
        """Runs of the side that has fewer."""
        return min(len(self.a.repeats), len(self.b.repeats))

    @property
    def is_too_few(self) -> bool:
        """Whether an interval is shown of too few runs for a verdict."""
        return _is_too_few(self.metric, self.interval, self.fewest)

    @property
    def title(self) -> str:
        """What a person reads."""
        if not self.style:
            return self.metric.title
        own = self.metric.title_in(self.style)
        if own and own != self.metric.title:
            return own
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
    mixed = [
        found for found in differences if found.mixed and condition_of(found.leaf) not in MAY_VARY
    ]
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
    name = condition_of(found.leaf)
    of_family = name == "bundle" or found.leaf in _OF_FAMILY
    return name in across or (FAMILY in across and of_family)


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
    return plain_tree(dict(records[0]["conditions"]["bundle"]))


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
    one, other = (max(map(canvas_length, side)) for side in (a, b))
    if one == other or not (one and other):
        return None
    return f"{styles[0]}, canvas of {one}", f"{styles[0]}, canvas of {other}"


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
    """leaf -> canonical text -> value, over the records; a leaf that one lacks is None."""
    all_leaves = [leaves(record) for record in records]
    names = dict.fromkeys(name for found in all_leaves for name in found)
    return {
        name: {canonical(found.get(name)): found.get(name) for found in all_leaves}
        for name in names
    }


def _show(leaf: str, values: dict[str, Any]) -> str:
    shown = [condition(leaf, found) for found in values.values()]
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
    failed = sum(r["status"] != "ok" and r["pass"] == metric.pass_ for r in records)
    trials = metric.trials(found[0][0]) if found and metric.trials is not None else ()
    return Side(tuple(number for _, number in found), failed, tuple(trials))


def _ratio(metric: Metric, a: Side, b: Side) -> tuple[float | None, Interval | None, str]:
    """The ratio and its interval; where there is none, why."""
    if metric.unit in _NO_RATIO:
        return None, None, f"none of {metric.unit}"
    if a.median is None or b.median is None:
        return None, None, f"{'A' if a.median is None else 'B'} has no number"
    if min(a.repeats) <= 0:
        if min(*a.repeats, *b.repeats) == max(*a.repeats, *b.repeats):
            return None, None, "all are 0"
        return None, None, "A is 0 or less"
    ratio = b.median / a.median
    if metric.trials is not None:
        if [prompt for prompt, _ in a.trials] != [prompt for prompt, _ in b.trials]:
            return ratio, None, "other puzzles"
        if len(a.trials) < MINIMUM_PUZZLES:
            return ratio, None, "too few puzzles"
        one, other = ([is_exact for _, is_exact in side.trials] for side in (a, b))
        return ratio, share_ratio_interval(one, other), ""
    if min(len(a.repeats), len(b.repeats)) < MINIMUM_REPEATS:
        return ratio, None, "too few runs"
    return ratio, ratio_interval(a.repeats, b.repeats), ""


def _is_too_few(metric: Metric, interval: Interval | None, fewest: int) -> bool:
    """A share is over puzzles, and what never varied is a count and no sample of a noise."""
    if interval is None or metric.trials is not None or interval[0] == interval[1]:
        return False
    return fewest < VERDICT_REPEATS


def _verdict(metric: Metric, interval: Interval | None, fewest: int) -> Verdict:
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
