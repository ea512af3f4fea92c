"""A straight line through measurements, and how far they are from it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import linear_regression
from typing import NamedTuple


class Line(NamedTuple):
    """y = start + slope * x by least squares; `off` is the largest |y - line| / y."""

    start: float
    slope: float
    off: float


def line_through(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """Of two points or more whose x differ; raises statistics.StatisticsError for others."""
    slope, start = linear_regression(xs, ys)
    off = max(abs(y - start - slope * x) / y for x, y in zip(xs, ys, strict=True))
    return Line(start, slope, off)
