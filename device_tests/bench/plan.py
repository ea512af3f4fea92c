"""What a benchmark measures: the passes, how often each is run, and under which limits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from device_tests.results.records import PASSES, Pass
from quantize.errors import InputError

DEFAULT_PUZZLE_RUNS = 3

_WHOLE = {
    "puzzles": (1, 10_000),
    "prompt_tokens": (1, 2**20),
    "canvases": (1, 2**20),
    "force_steps": (1, 2**20),
    "warmup_steps": (0, 2**20),
    "seed": (0, 2**64 - 1),
    "memory_interval_ms": (1, 60_000),
    "memory_limit_bytes": (1, 2**60),
    "memory_budget_bytes": (1, 2**60),
}
"""Fields of a plan that are whole numbers, and their least and largest value."""

_REAL = {
    "max_temperature_c": (0, 120),
    "gate_timeout_s": (0, 86_400),
    "hang_s": (0.1, 86_400),
    "poll_s": (0.01, 60),
    "gone_s": (0, 86_400),
}


@dataclass(frozen=True)
class BenchPlan:
    """What to measure; the runs are made in the order of threads, then of `PASSES`, then repeats.

    cold: the bundle is loaded from storage. warm_up: as speed, kept apart. speed: a fixed number of
    steps. natural: as many steps as the sampler takes. memory: as speed, memory sampled beside it.
    puzzles: `puzzles` held-out puzzles of each kind, answered one by one in one process, graded on
    the host; only if their number is given, and then three times by default.

    threads: None is the runtime's choice. prompt_text: for the natural pass (of a bundle with a
    tokenizer); every other prompt is `prompt_tokens` random tokens, by default 32 or what fits.
    canvases: by default one, or as many as hold 64 tokens where canvases are not of uniform
    diffusion (an autoregressive canvas is one token). force_steps: denoising steps of every canvas,
    except in the natural pass; by default 16, elsewhere at most one a position. Any number makes
    an autoregressive model go on behind its end token. max_temperature_c: a
    run begins only under it; after `gate_timeout_s` of waiting it is recorded as failed. hang_s:
    a run is killed after so long without an event. gone_s: how long a lost device is waited for.
    memory_budget_bytes: most memory that a run may have resident; weights are streamed to hold it.
    Raises InputError for a value out of range.
    """

    passes: Mapping[str, int] = field(
        default_factory=lambda: {"cold": 1, "warm_up": 1, "speed": 6, "natural": 6, "memory": 1}
    )
    threads: Sequence[int | None] = (None,)
    prompt_text: str | None = None
    prompt_tokens: int | None = None
    canvases: int | None = None
    force_steps: int | None = None
    warmup_steps: int = 2
    seed: int = 0
    settings: Mapping[str, float] | None = None
    max_temperature_c: float = 45.0
    gate_timeout_s: float = 300.0
    hang_s: float = 120.0
    poll_s: float = 1.0
    gone_s: float = 60.0
    memory_interval_ms: int = 50
    memory_limit_bytes: int | None = None
    memory_budget_bytes: int | None = None
    puzzles: int | None = None

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is None and item.default is None:
                continue
            if item.name in _WHOLE:
                _check_whole(item.name, value, *_WHOLE[item.name])
            elif item.name in _REAL:
                _check_real(item.name, value, *_REAL[item.name])
        passes = dict(self.passes)
        if self.puzzles is not None:
            passes = {"puzzles": DEFAULT_PUZZLE_RUNS} | passes
        elif passes.get("puzzles"):
            raise InputError("the pass puzzles has no puzzles; say how many of each kind")
        for name, count in passes.items():
            if name not in PASSES:
                raise InputError(f"there is no pass {name!r}; give some of {', '.join(PASSES)}")
            _check_whole(f"the repeats of the pass {name}", count, 0, 10_000)
        if not any(passes.values()):
            raise InputError("the plan has no run; give a pass at least one repeat")
        if not self.threads or len(set(self.threads)) != len(self.threads):
            raise InputError(f"threads is {list(self.threads)}; give each number of threads once")
        for threads in self.threads:
            if threads is not None:
                _check_whole("threads", threads, 1, 1024)
        if self.prompt_text is not None and not self.prompt_text.strip():
            raise InputError("prompt_text is empty; give a text, or none")
        # A frozen plan should stay as it was checked.
        object.__setattr__(self, "passes", MappingProxyType(passes))
        object.__setattr__(self, "threads", tuple(self.threads))

    @property
    def runs(self) -> Iterator[PlannedRun]:
        """Every run in the order in which they are made."""
        for threads in self.threads:
            for name in PASSES:
                repeats = self.passes.get(name, 0)
                for repeat in range(repeats):
                    yield PlannedRun(threads, name, repeat, repeats)


@dataclass(frozen=True)
class PlannedRun:
    """One run of a plan: number `repeat` of `repeats`, counted from 0, of a pass."""

    threads: int | None
    pass_: Pass
    repeat: int
    repeats: int


def _check_whole(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise InputError(f"{name} is {value!r}; give a whole number from {least} to {most}")


def _check_real(name: str, value: Any, least: float, most: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not least <= value <= most:
        raise InputError(f"{name} is {value!r}; give a number from {least:g} to {most:g}")
