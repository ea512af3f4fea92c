"""Confidence intervals: of a share, and of a ratio of two sides by bootstrap; always the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

LEVEL = 0.95
RESAMPLES = 9999
_SEED = 20250117

Interval = tuple[float, float]

# scipy.stats is imported where it is used: it takes a second that `--help` need not pay.


def share_interval(trials: Sequence[tuple[str, bool]]) -> Interval | None:
    """The 95 % Wilson interval of the share that is right; None of nothing."""
    from scipy.stats import binomtest

    if not trials:
        return None
    found = binomtest(sum(is_exact for _, is_exact in trials), len(trials))
    interval = found.proportion_ci(confidence_level=LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def ratio_interval(a: Sequence[float], b: Sequence[float]) -> Interval:
    """The 95 % percentile-bootstrap interval of median(b) / median(a) over whole repeats."""
    interval = _bootstrap(a, b, np.median, paired=False).confidence_interval
    return float(interval.low), float(interval.high)


def share_ratio_interval(a: Sequence[bool], b: Sequence[bool]) -> Interval:
    """The 95 % percentile-bootstrap interval of mean(b) / mean(a) over puzzles in pairs: number n
    of both is the same puzzle."""
    # A resample without one right answer of A has no ratio: the interval is open there, which
    # scipy's own interpolation between ratios cannot say.
    ratios = _bootstrap(a, b, np.mean, paired=True).bootstrap_distribution
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail], method="nearest")
    return float(low), float(high)


def _bootstrap(
    a: Sequence[float], b: Sequence[float], middle: Callable[..., Any], *, paired: bool
) -> Any:
    from scipy.stats import bootstrap

    def statistic(one: np.ndarray, other: np.ndarray, axis: int = -1) -> np.ndarray:
        above, below = middle(other, axis=axis), middle(one, axis=axis)
        return np.where(below == 0, np.inf, above / below)

    with np.errstate(divide="ignore", invalid="ignore"):  # of resamples without a ratio
        return bootstrap(
            (np.asarray(a, dtype=float), np.asarray(b, dtype=float)),
            statistic,
            n_resamples=RESAMPLES,
            vectorized=True,
            paired=paired,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(_SEED),
        )
