"""What each generation style states: names, sampler settings, tensors at a program's border.

How its loop runs is left to the hosts, how its stages compute to models and heads.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from quantize.errors import BundleError, InputError

if TYPE_CHECKING:
    import numpy as np

    from export.contract.manifest import Decoding, ModelInfo, Sampler, StyleName

LAYERS_OUTPUTS = ("hidden",)
"""What a pass of the layers returns, in every style."""


@dataclass(frozen=True)
class SamplerSettings:
    """Base of the samplers' settings: frozen dataclasses of numbers, in the order of the graph."""

    @classmethod
    def array_fields(cls) -> tuple[str, ...]:
        """The fields that the head takes, in the order of its `settings` input."""
        return tuple(field.name for field in fields(cls))

    def as_array(self) -> np.ndarray:
        """The head's `settings` input, `[number of array_fields]` fp32."""
        import numpy as np  # here, because a plan reads settings without it

        return np.array([getattr(self, name) for name in self.array_fields()], dtype=np.float32)


class Style(ABC):
    """A generation style; a subclass is one file, and one line in `STYLES`."""

    name: ClassVar[StyleName]
    sampler: ClassVar[str]
    """Name of the one sampler it has."""
    settings: ClassVar[type[Any]]
    """The class of the sampler's settings."""
    layers_inputs: ClassVar[tuple[str, ...]]
    """Tensors that the loop hands to a pass of the layers, in order."""
    head_inputs: ClassVar[tuple[str, ...]]
    head_outputs: ClassVar[tuple[str, ...]]

    step_is_token: ClassVar[bool] = False
    """Whether a step of the loop is one token of the text."""
    masks: ClassVar[bool] = False
    """Whether positions that are not decided hold a mask token."""

    # What `export.plan` computes time and memory from; counts are those of export/heads.
    has_fixed_rows: ClassVar[bool] = False
    """Whether every pass has the canvas's rows, a short prompt chunk being padded."""
    walks_vocabulary: ClassVar[bool] = True
    """Whether the head computes logits in chunks that it does not keep, unless it truncates."""
    loads_head_whole: ClassVar[bool] = True
    """Whether one delegate packs all of the head's weights while their file is mapped."""
    head_rows_beyond_canvas: ClassVar[int] = 0
    values_per_logit: ClassVar[int]
    """fp32 values that simple operators of the head go through for each logit: a tanh, an exp, and
    what sums and compares them."""
    held_logits: ClassVar[int] = 6
    """Copies of a row's logits that a head holds which does not walk."""
    live_rows: ClassVar[float] = 2.0
    """fp32 tensors between delegates at the last layer, as multiples of rows x hidden size: what
    the memory planner of ExecuTorch 1.5 arrives at (benchmarks/results/plan_accuracy.txt)."""

    @property
    def step_name(self) -> str:
        """What a plan calls one step."""
        return "token" if self.step_is_token else "denoising step"

    @abstractmethod
    def decoding_problem(self, info: ModelInfo, decoding: Decoding | None) -> str | None:
        """Which lengths do not go together, as the end of a sentence; None if all do."""

    def usual_canvases(self, new_tokens: int, canvas_length: int) -> int:
        """Canvases that a measurement of about `new_tokens` takes."""
        return -(-new_tokens // canvas_length)

    def usual_steps(self, steps: int, canvas_length: int) -> int:
        """Steps that a measurement forces on each canvas: `steps`, or at most one a position."""
        return min(steps, canvas_length)

    def check_decoding(self, what: object, info: ModelInfo, decoding: Decoding | None) -> None:
        """Raise BundleError unless the lengths that the loop of `what` works with go together."""
        problem = self.decoding_problem(info, decoding)
        if problem:
            raise BundleError(
                f"{what} generates by {self.name} and {problem}; export the bundle again"
            )

    def read_settings(self, what: object, sampler: Sampler) -> Any:
        """The settings that the manifest of `what` states; BundleError if they cannot be used."""
        if sampler.name != self.sampler:
            raise BundleError(
                f"{what} has the sampler {sampler.name!r}, this program knows {self.sampler!r}; "
                "update the program"
            )
        try:
            return self.settings(**sampler.settings)
        except (TypeError, InputError) as error:
            raise BundleError(
                f"{what} has sampler settings that cannot be used ({error}); correct them in the "
                "checkpoint's generation_config.json and export it again"
            ) from error


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raise InputError for a setting out of range."""
    if not holds:
        raise InputError(f"{name} is {value}; give {expected}")


def set_whole(settings: SamplerSettings, *names: str) -> None:
    """Make these fields integers; raises InputError for a value that is none."""
    for name in names:
        value = getattr(settings, name)
        if not math.isfinite(value) or value != int(value):
            raise InputError(f"{name} is {value!r}; give a whole number")
        object.__setattr__(settings, name, int(value))


def check_truncation(temperature: float, top_p: float, top_k: int) -> None:
    """Raise InputError for one that is out of range."""
    require(temperature >= 0 and math.isfinite(temperature), "temperature", temperature,
            "at least 0")  # fmt: skip
    require(0 < top_p <= 1, "top_p", top_p, "more than 0 and at most 1")
    require(top_k >= 0, "top_k", top_k, "at least 0 (0: all tokens)")
