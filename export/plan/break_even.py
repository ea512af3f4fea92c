"""When diffusion overtakes its autoregressive twin on a device, and at which block length.

A canvas of B tokens costs S denoising steps over B rows and one commit of B rows (layers alone);
the twin, the same layers decoding one token at a time, costs B passes over one row. With T(n) the
time of a step over n rows and C the commit, diffusion is faster when

    S T(B) + C < B T(1),   that is   tokens per forward  B / S  >  B T(B) / (B T(1) - C).

Without the commit this is T(B) / T(1). Where the commit alone takes as long as B tokens of the
twin, no number of steps is small enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

from export.families.shapes import ModelShape
from export.plan.device import Device
from export.plan.roofline import Time, time_of
from export.plan.work import Experts, Pass, chosen_experts, layers_pass, step_pass
from quantize.errors import InputError
from quantize.recipe import Recipe

LENGTHS = (4, 8, 16, 32, 64, 128, 256)
"""Canvas and block lengths that are compared."""


@dataclass(frozen=True)
class Acceptance:
    """Tokens accepted per forward pass by canvas length, stated or measured.

    A canvas of one token accepts one; from there to the points, and between them, log-log (a power
    of the length); beyond the last point as many as there, since nothing is known.
    """

    points: Mapping[int, float]

    def __post_init__(self) -> None:
        for length, accepted in self.points.items():
            if length < 1 or not 0 < accepted <= length:
                raise InputError(
                    f"{accepted:g} tokens per forward at a canvas of {length} cannot be; give more "
                    "than 0 and at most the canvas"
                )

    def at(self, length: int) -> float:
        """Tokens per forward at a canvas of `length`."""
        points = {1: 1.0} | dict(self.points)
        known = sorted(points)
        if length >= known[-1]:
            return points[known[-1]]
        high = next(size for size in known if size >= length)
        if high == length:
            return points[high]
        low = max(size for size in known if size < length)
        share = log(length / low) / log(high / low)
        return points[low] * exp(share * log(points[high] / points[low]))


@dataclass(frozen=True)
class Point:
    """One canvas length on one device.

    ratio: T(length) / T(1). needed: tokens per forward from which diffusion is faster, the commit
    included; None if it never is. accepted, tokens_per_s: at the stated acceptance, None without.
    """

    length: int
    step: Time
    commit: Time
    ratio: float
    needed: float | None
    accepted: float | None = None
    tokens_per_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Its numbers."""
        return {
            "canvas_length": self.length,
            "step_ms": self.step.ms,
            "commit_ms": self.commit.ms,
            "ratio": self.ratio,
            "tokens_per_forward_needed": self.needed,
            "tokens_per_forward_accepted": self.accepted,
            "tokens_per_s": self.tokens_per_s,
        }


@dataclass(frozen=True)
class BreakEven:
    """All canvas lengths on one device. token: of the twin. is_expected: whether the times are from
    measured rates; else they are the best possible."""

    device: str
    token: Time
    points: tuple[Point, ...]
    is_expected: bool

    def to_json(self) -> dict[str, Any]:
        """The twin's token and every point; ms, tokens/s."""
        return {
            "token": self.token.to_json(),
            "twin_tokens_per_s": self.twin_tokens_per_s,
            "break_even": [point.to_json() for point in self.points],
            "best_canvas_length": None if self.best is None else self.best.length,
        }

    @property
    def twin_tokens_per_s(self) -> float:
        """Of the autoregressive twin."""
        return 1000.0 / self.token.ms

    @property
    def best(self) -> Point | None:
        """The length with the most tokens a second at the stated acceptance."""
        known = [point for point in self.points if point.tokens_per_s is not None]
        return max(known, key=lambda point: point.tokens_per_s or 0.0, default=None)


@dataclass(frozen=True)
class Claim:
    """Some tokens in some steps against the twin: the times of both, ms, and which is shorter."""

    tokens: int
    steps: int
    diffusion_ms: float
    twin_ms: float

    @property
    def holds(self) -> bool:
        """Whether diffusion is faster."""
        return self.diffusion_ms < self.twin_ms


def break_even(
    shape: ModelShape,
    recipe: Recipe | None,
    device: Device,
    *,
    context: int,
    lengths: Sequence[int] = LENGTHS,
    acceptance: Acceptance | None = None,
) -> BreakEven:
    """Compare canvas lengths of a diffusion model with its twin. Raises what `time_of` raises."""
    token = time_of(step_pass(shape.twin(), recipe, context=context), device)
    points = []
    for length in sorted({*lengths, shape.canvas_length} - {1}):
        step, commit = _canvas(shape, recipe, device, context, length)
        spare = length * token.ms - commit.ms
        accepted = None if acceptance is None else acceptance.at(length)
        rate = None
        if accepted is not None:
            rate = 1000.0 * length / (length / accepted * step.ms + commit.ms)
        points.append(
            Point(
                length=length,
                step=step,
                commit=commit,
                ratio=step.ms / token.ms,
                needed=length * step.ms / spare if spare > 0 else None,
                accepted=accepted,
                tokens_per_s=rate,
            )
        )
    return BreakEven(device.name, token, tuple(points), token.expected_ms is not None)


def claim(
    shape: ModelShape,
    recipe: Recipe | None,
    device: Device,
    *,
    context: int,
    tokens: int,
    steps: int,
) -> Claim:
    """Whether a canvas of `tokens` in `steps` is faster than the twin's tokens on a device."""
    token = time_of(step_pass(shape.twin(), recipe, context=context), device)
    step, commit = _canvas(shape, recipe, device, context, tokens)
    return Claim(tokens, steps, steps * step.ms + commit.ms, tokens * token.ms)


def canvas_passes(
    shape: ModelShape, recipe: Recipe | None, *, context: int, experts: Experts = "routed"
) -> tuple[Pass, Pass]:
    """A denoising step of the model's canvas and the commit after it."""
    step = step_pass(shape, recipe, context=context, experts=experts)
    rows = shape.step_rows
    commit = layers_pass(shape, recipe, rows=rows, context=context, experts=experts, name="commit")
    return step, commit


def _canvas(
    shape: ModelShape, recipe: Recipe | None, device: Device, context: int, length: int
) -> tuple[Time, Time]:
    sized = shape.with_canvas(length)
    experts: Experts = chosen_experts(sized) if device.is_measured else "routed"
    step, commit = canvas_passes(sized, recipe, context=context, experts=experts)
    return time_of(step, device), time_of(commit, device)
