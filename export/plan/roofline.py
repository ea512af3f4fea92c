"""Time of a pass on a device: the least possible (the roofline), and the expected from rates.

The least: each piece of work takes what moving its bytes takes at the memory's bandwidth, or what
its operations take at the processor's peak, whichever is longer; the pieces follow one another.
Source: Williams, Waterman, Patterson, Roofline (CACM 52, 2009), applied an operator at a time.

The expected: products at the measured rate for their rows, softmax, simple operators and copies at
theirs, and what each call costs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from export.plan.device import Device
from export.plan.work import Pass, Work
from quantize.errors import InputError

Bound = Literal["memory", "arithmetic"]


@dataclass(frozen=True)
class Time:
    """Of one pass. best_ms: no program can be faster. expected_ms: from measured rates, None
    without. memory_ms, arithmetic_ms: what moving and computing take, each alone. bound: of the two
    the one that takes most of best_ms."""

    best_ms: float
    memory_ms: float
    arithmetic_ms: float
    bound: Bound
    expected_ms: float | None

    @property
    def ms(self) -> float:
        """What to count on: the expected where there is one, the best possible otherwise."""
        return self.best_ms if self.expected_ms is None else self.expected_ms

    def to_json(self) -> dict[str, Any]:
        """Its fields, and the share of the roofline."""
        return {**asdict(self), "share_of_roofline": self.share}

    @property
    def share(self) -> float | None:
        """Of the roofline, as expected."""
        return None if self.expected_ms is None else self.best_ms / self.expected_ms


def ridge(device: Device, arithmetic: str = "int8") -> float | None:
    """Operations a byte from which on arithmetic bounds and not memory; None if not known."""
    peak, bandwidth = device.peak_gops(arithmetic), device.value("memory_gb_s")
    return None if peak is None or bandwidth is None else peak / bandwidth


def time_of(work: Pass, device: Device) -> Time:
    """The time of a pass. Raises InputError for a device without bandwidth or peaks."""
    bandwidth, int8 = device.value("memory_gb_s"), device.peak_gops("int8")
    if bandwidth is None or int8 is None:
        raise InputError(
            f"device {device.name} says nothing of its "
            f"{'memory_gb_s' if bandwidth is None else 'int8_gops'}; add it to its file, or measure"
        )
    best = memory = arithmetic = by_memory = 0.0
    for item in work.work:
        moved = 1e-6 * item.bytes / bandwidth
        computed = 0.0
        if item.operations:
            computed = 1e-6 * item.operations / (device.peak_gops(item.arithmetic) or int8)
        best += max(moved, computed)
        by_memory += moved if moved >= computed else 0.0
        memory += moved
        arithmetic += computed
    return Time(
        best_ms=best,
        memory_ms=memory,
        arithmetic_ms=arithmetic,
        bound="memory" if by_memory >= best / 2 else "arithmetic",
        expected_ms=_expected_ms(work, device) if device.is_measured else None,
    )


def _expected_ms(work: Pass, device: Device) -> float:
    programs = 2 if work.name in ("denoising step", "token") else 1
    total = 1e-3 * (device.value("call_us") or 0.0) * programs
    return total + sum(_item_ms(item, device) for item in work.work)


def _item_ms(item: Work, device: Device) -> float:
    overhead = 1e-3 * (device.value("operator_us") or 0.0) * item.calls
    if item.what in ("product", "scores"):
        rate = device.rates.get(item.arithmetic) or device.rates["int8"]
        return overhead + 1e-6 * item.operations / rate.gops(item.rows)
    per_s = {
        "simple": device.value("simple_gvalues_s"),
        "softmax": device.value("softmax_gvalues_s"),
    }.get(item.what)
    if per_s is not None:
        return overhead + 1e-6 * item.values / per_s
    copied = device.value("copy_gb_s")
    return overhead + (1e-6 * item.bytes / copied if item.what == "copy" and copied else 0.0)
