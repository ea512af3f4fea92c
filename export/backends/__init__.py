"""Backends: what lowers a stage to a program, and the table of them.

A backend is one folder here, whose module has a `BACKEND`, and one line in `BACKENDS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from export.contract.manifest import Delegation, TensorSpec
from export.models.staging import StageModule
from quantize.errors import LoweringError

BACKENDS = {
    "xnnpack": "export.backends.xnnpack",
}


@dataclass(frozen=True)
class LoweredStage:
    """A stage's program: `write` writes the `.pte` file, `outputs` are in the program's order."""

    write: Callable[[Path], None]
    outputs: tuple[TensorSpec, ...]
    delegation: Delegation


class Backend(ABC):
    """Lowers stages to programs; raises LoweringError for a stage that it cannot take."""

    @abstractmethod
    def lower(self, stage: StageModule) -> LoweredStage:
        """Lower one stage, and check that what should be delegated was."""

    def instantiate(self, stage: StageModule, folder: Path) -> LoweredStage:
        """Lower a stage that has a template, at best by exchanging the weights in a lowered one.

        `folder` is the backend's own: it is kept until all stages are lowered, also if the process
        is interrupted in between. A backend that cannot exchange weights leaves this as it is, and
        each stage is lowered in full.
        """
        return self.lower(stage)


def tensor_spec(
    name: str, dtype: torch.dtype, shape: Sequence[int], dynamic: Iterable[int] = ()
) -> TensorSpec:
    """Return a tensor as the manifest describes it."""
    kind: Any = str(dtype).removeprefix("torch.")  # checked when the manifest is sealed
    return TensorSpec(name, kind, tuple(shape), tuple(sorted(dynamic)))


def find_backend(name: str) -> Backend:
    """Return the backend of that name; raise LoweringError if the table has none."""
    if name not in BACKENDS:
        raise LoweringError(
            f"the backend {name!r} is not known; supported: {', '.join(sorted(BACKENDS))}"
        )
    return import_module(BACKENDS[name]).BACKEND


def lower_stage(stage: StageModule, backend: str) -> LoweredStage:
    """Lower one stage in full; see `Backend.lower`."""
    return find_backend(backend).lower(stage)
