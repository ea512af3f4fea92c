"""The table of backends that a stage can be lowered to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from export.contract.bundle import Delegation
from export.models.staging import StageModule
from quantize.errors import LoweringError

BACKENDS = {
    "xnnpack": "export.backends.xnnpack.lowering",
}
"""Each module has `lower_stage(stage) -> LoweredStage`."""


@dataclass(frozen=True)
class Output:
    """What a program gives: its type, and its shape at the largest lengths."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    dynamic: tuple[int, ...] = ()


@dataclass(frozen=True)
class LoweredStage:
    """A stage's program: how to write it, what it gives, and which operators run where.

    `write` writes the `.pte` file; `outputs` say dtype, largest shape and dynamic axes, in order.
    """

    write: Callable[[Path], None]
    outputs: tuple[Output, ...]
    delegation: Delegation


def check_backend(backend: str) -> None:
    """Raise LoweringError for a backend that is not in the table."""
    if backend not in BACKENDS:
        raise LoweringError(
            f"the backend {backend!r} is not known; supported: {', '.join(sorted(BACKENDS))}"
        )


def lower_stage(stage: StageModule, backend: str) -> LoweredStage:
    """Lower one stage to `backend`.

    Raises LoweringError for an unknown backend, and for an operator that was meant to be delegated
    and was not.
    """
    check_backend(backend)
    return import_module(BACKENDS[backend]).lower_stage(stage)
