"""Predicted beside measured: the rows that every form of a report shows of one configuration.

How they are predicted is `planned.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from device_tests.results.plain_text import quantity

HEADINGS = ("quantity", "predicted", "measured", "error", "roofline", "achieved")

EXPLANATION = (
    "error: predicted / measured - 1; roofline: the least time that the device's bandwidth and "
    "peak rates allow, and which of them bounds it; achieved: roofline / measured"
)


@dataclass(frozen=True)
class Roofline:
    """The least time of a pass: what it is, and which of memory and arithmetic bounds it."""

    best_ms: float
    bound: str


@dataclass(frozen=True)
class Prediction:
    """One quantity. measured: None where no run gave it. roofline: of times only."""

    name: str
    title: str
    unit: str
    predicted: float
    measured: float | None
    roofline: Roofline | None = None

    @property
    def error(self) -> float | None:
        """Of the prediction, relative: 0.1 is 10 % too much; None where nothing was measured."""
        return None if not self.measured else self.predicted / self.measured - 1.0

    @property
    def share(self) -> float | None:
        """Of the roofline, as measured: 1 is as fast as the device can be."""
        if self.roofline is None or not self.measured:
            return None
        return self.roofline.best_ms / self.measured

    @property
    def roofline_shown(self) -> str:
        """Its time and what bounds it."""
        if self.roofline is None:
            return "-"
        return f"{quantity(self.roofline.best_ms, 'ms')} ({self.roofline.bound})"

    @property
    def share_shown(self) -> str:
        """The achieved share in per cent."""
        return "-" if self.share is None else f"{100 * self.share:.0f} %"

    @property
    def cells(self) -> tuple[str, ...]:
        """A row of a table under HEADINGS."""
        return (
            self.title,
            quantity(self.predicted, self.unit),
            quantity(self.measured, self.unit),
            "-" if self.error is None else f"{100 * self.error:+.0f} %",
            self.roofline_shown,
            self.share_shown,
        )

    def to_json(self) -> dict[str, Any]:
        """For the report's document: numbers exact, None where there is none."""
        return {
            "unit": self.unit,
            "predicted": self.predicted,
            "measured": self.measured,
            "error": self.error,
            "roofline_ms": None if self.roofline is None else self.roofline.best_ms,
            "bound": None if self.roofline is None else self.roofline.bound,
            "share_of_roofline": self.share,
        }


@dataclass(frozen=True)
class Forecast:
    """What was predicted of one configuration, and for what: device, recipe (None: not quantized)
    and positions of the KV cache."""

    device: str
    recipe: str | None
    context: int
    rows: tuple[Prediction, ...]

    @property
    def basis(self) -> str:
        """What the plan was made for."""
        return (
            f"planned for {self.device}, {self.recipe or 'not quantized'}, KV cache of "
            f"{self.context:,} positions"
        )

    def to_json(self) -> dict[str, Any]:
        """For the report's document."""
        return {
            "device": self.device,
            "recipe": self.recipe,
            "context": self.context,
            "quantities": {row.name: row.to_json() for row in self.rows},
        }
